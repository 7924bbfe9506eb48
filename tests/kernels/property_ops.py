"""What is drawn for each op, and what is right: the truth, the bounds, and what is left open.

Left open by the contract, so that only shapes, dtypes, untouched inputs and repeats are judged:
- row_gradient, row_update, code_gram: infinities and NaN. A slot of coefficient 0 may or may not
  multiply them.
- distill with a teacher: infinite logits. Their divergence is inf - inf.
- gradients where an input is not finite, for the same reason, or where a score may be NaN (a sum
  overflows in both directions); infinite upstream gradients are judged.
- linear_code: everything where its overflow flag says that the code is not the layer's.
Never drawn, since the contract excludes it: a sample that names an active neuron twice
(count_active, code_gram), gaba > 1, gaba <= 0 in linear_active and linear_code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import ssd_kernels as sk
from ssd_kernels import _dispatch, reference
from ssd_kernels.linear_code import Shadow
from tests.kernels.property_bounds import NAN_KEY, Bounds, Ranking, finite, rounding, scores
from tests.kernels.property_draws import EXACT, STYLES, Draw, Numbers

STRANGE = ["special", "infinite"]
Arguments = dict[str, Any]
Outputs = dict[str, Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass
class Case:
    """One call, on the CPU, and what is known of it."""

    draw: Draw
    dtype: torch.dtype
    arguments: Arguments = field(default_factory=dict)
    grains: dict[str, float] = field(default_factory=dict)
    in_place: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()  # what a gradient is asked for
    grad: bool = True  # off: under no_grad
    upstream: Outputs = field(default_factory=dict)  # gradients of the outputs
    upstream_grain: float = 0.0
    open: bool = False
    fault: str | None = None
    truth: Any = None

    def give(self, **shapes: tuple[int, ...]) -> None:
        """Floating arguments of the case's dtype and style."""
        for name, shape in shapes.items():
            self.add(name, self.draw.numbers(shape, self.dtype, 2 if "bias" in name else 1))

    def add(self, name: str, numbers: Numbers | Tensor, expand: bool = True) -> None:
        tensor, grain = numbers if isinstance(numbers, Numbers) else (numbers, 0.0)
        self.arguments[name] = self.draw.strided(tensor, expand)
        self.grains[name] = grain

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def grain(self, *names: str) -> float:
        """Of a product of these; 0 if one of them has none."""
        product = 1.0
        for name in names:
            product *= self.upstream_grain if name == "upstream" else self.grains[name]
        return product

    def counters(self, neurons: int, *names: str) -> None:
        dtype = self.draw.pick([torch.int64, torch.int32])
        for name in names:
            self.add(name, torch.from_numpy(self.draw.rng.integers(0, 9, neurons)).to(dtype), False)
            self.in_place += (name,)

    def ask(self, *names: str) -> None:
        """Gradients of some of these, unless an input is not finite or a score may be NaN."""
        self.grad = self.draw.chance(0.85)
        present = [name for name in names if self[name] is not None]
        wants = self.draw.some(present)
        nan = isinstance(self.truth, Scores) and bool(self.truth.ranking.high.eq(NAN_KEY).any())
        if not nan and all(bool(self[name].isfinite().all()) for name in present):
            self.wants = wants

    def answer(self, **shapes: tuple[int, ...]) -> None:
        """Upstream gradients of the outputs that are part of the loss."""
        style = self.draw.style
        style = style if style in ("integers", "scaled") else "normal"
        if style == "normal" and self.draw.chance(0.08):
            style = "infinite"
        for name, shape in shapes.items():
            numbers = self.draw.numbers(shape, self.dtype, style=style)
            self.upstream[name] = self.draw.strided(numbers.tensor)
            self.upstream_grain = numbers.grain


class Op:
    """An op: what to draw, how to call it, what is right."""

    name = ""
    prefixes: tuple[str, ...] = ()  # of its errors

    def draw(self, d: Draw) -> Case:
        raise NotImplementedError

    def implementations(self) -> list[str]:
        return list(_module(self.name).IMPLEMENTATIONS)

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        out = getattr(sk, self.name)(**arguments, impl=impl)
        if out is None:
            return {}
        return {"out": out} if isinstance(out, Tensor) else named(out)

    def shapes(self, case: Case) -> Shapes:
        """Of the outputs."""
        raise NotImplementedError

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        """What is wrong with outputs and with arguments updated in place."""
        raise NotImplementedError

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        raise NotImplementedError

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        """Arguments to replace, each of which must be refused."""
        raise NotImplementedError


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"ssd_kernels.{name}")


def named(out: Any) -> Outputs:
    return {name: t for name, t in out._asdict().items() if t is not None}


def off(name: str, got: Tensor, bounds: Bounds) -> Iterator[str]:
    """The first entry outside its bounds."""
    wrong = bounds.wrong(got)
    if not wrong.any():
        return
    at = tuple(int(i) for i in wrong.nonzero()[0])
    low, high = bounds.lower[at].item(), bounds.upper[at].item()
    yield (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} entries wrong, {name}{list(at)} = "
        f"{got[at].item():.9g}, expected {low:.9g} .. {high:.9g}"
    )


def same(name: str, got: Tensor, expected: Tensor) -> Iterator[str]:
    yield from off(name, got, Bounds.of(expected.double(), expected.double()))


def descending(values: Tensor) -> Iterator[str]:
    """NaN first."""
    rows = values.double()
    if not ((rows[:, 1:] <= rows[:, :-1]) | rows[:, :-1].isnan()).all() or (rows < 0).any():
        yield "values are negative or do not descend"


def floats(case: Case, *names: str) -> Iterator[tuple[str, Arguments]]:
    """Faults of floating arguments, of which the first is always there."""
    for name in names:
        tensor = case[name]
        if tensor is None:
            continue
        yield f"{name} int64", {name: torch.ones(tensor.shape, dtype=torch.int64)}
        if name != names[0]:
            other = torch.float16 if case.dtype != torch.float16 else torch.float32
            yield f"{name} {other}", {name: tensor.to(other)}
            yield f"{name} on meta", {name: tensor.to("meta")}
            yield (
                f"{name} longer",
                {name: torch.ones(*tensor.shape[:-1], tensor.shape[-1] + 1).to(tensor)},
            )


def ks(k: int, neurons: int) -> Iterator[tuple[str, Arguments]]:
    for wrong in (0, -1, neurons + 1, True, float(k)):
        yield f"k={wrong!r}", {"k": wrong}


def codes(case: Case, neurons: int) -> Iterator[tuple[str, Arguments]]:
    indices = case["indices"]
    yield "indices int32", {"indices": indices.int()}
    yield "indices longer", {"indices": F.pad(indices, (0, 1))}
    yield "indices on meta", {"indices": indices.to("meta")}
    if indices.numel():
        for wrong in (-1, neurons, -(2**40)):
            changed = indices.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[case.draw.upto(0, indices.numel() - 1)] = wrong
            yield f"index {wrong}", {"indices": changed}


def counting(case: Case, neurons: int, name: str = "counts") -> Iterator[tuple[str, Arguments]]:
    if case[name] is not None:
        yield f"{name} float", {name: torch.zeros(neurons)}
        yield f"{name} on meta", {name: torch.zeros(neurons, dtype=torch.int64, device="meta")}
        if name != "counts" or case["indices"] is None:
            yield f"{name} longer", {name: torch.zeros(neurons + 1, dtype=torch.int64)}


class TopK(Op):
    name = "topk"

    def draw(self, d: Draw) -> Case:
        d.style = d.pick([*STYLES, *STRANGE * 2])
        case = Case(d, d.dtype())
        neurons = d.neurons()
        case.give(scores=(*d.batch(), neurons))
        case.arguments["k"] = d.k(neurons)
        if d.chance(0.3):
            style = d.pick([d.style, "integers", "zeros", "infinite", "normal"])
            case.add("boost", d.numbers((neurons,), case.dtype, style=style))
        if d.chance(0.3):
            share = d.pick([0.0, 0.1, 0.5, 0.9, 1.0])
            case.add("mask", torch.from_numpy(d.rng.random(neurons) < share))
        case.wants, case.grad = d.some(["scores", "boost"]), d.chance(0.85)
        case.wants = tuple(name for name in case.wants if case[name] is not None)
        case.answer(values=(*case["scores"].shape[:-1], case["k"]))
        case.truth = self.expected(case)
        return case

    def expected(self, case: Case) -> sk.TopKOutput:
        """Keys are products in the accumulation dtype, and so exact everywhere."""
        accumulate = reference.accumulation_dtype(case.dtype)
        boost, mask = case["boost"], case["mask"]
        boost = None if boost is None else boost.to(accumulate)
        return reference.topk(case["scores"].to(accumulate), case["k"], boost=boost, mask=mask)

    def shapes(self, case: Case) -> Shapes:
        shape = (*case["scores"].shape[:-1], case["k"])
        return {"values": (shape, case.dtype), "indices": (shape, torch.int64)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        yield from same("indices", got["indices"], case.truth.indices)
        yield from same("values", got["values"], case.truth.values)

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        gradient = case.upstream["values"].double()
        indices = case.truth.indices
        if case["mask"] is not None:
            gradient = torch.where(case["mask"][indices], gradient, 0.0)
        dense = torch.zeros(case["scores"].shape, dtype=torch.float64)
        dense = dense.scatter(-1, indices, gradient)
        bounds = {"scores": Bounds.of(dense, dense)}
        if case["boost"] is not None:  # it selects only
            zeros = torch.zeros(case["boost"].shape, dtype=torch.float64)
            bounds["boost"] = Bounds.of(zeros, zeros)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        neurons = case["scores"].shape[-1]
        yield from ks(case["k"], neurons)
        yield from floats(case, "scores", "boost")
        yield "scores 0-d", {"scores": torch.ones((), dtype=case.dtype)}
        yield "mask int64", {"mask": torch.ones(neurons, dtype=torch.int64)}
        yield "mask longer", {"mask": torch.ones(neurons + 1, dtype=torch.bool)}
        yield "mask on meta", {"mask": torch.ones(neurons, dtype=torch.bool, device="meta")}


class Scores:
    """The truth of a layer's scores [S B, R] and of its inhibition."""

    def __init__(self, case: Case) -> None:
        self.blocks = case["blocks"] or 1
        self.grain = case.grain("x", "weight")
        self.bounds = scores(case["x"], case["weight"], case["bias"], self.blocks, self.grain)
        self.ranking = Ranking(self.bounds)
        self.activation = self.bounds.map(torch.relu)
        rows, self.neurons = self.bounds.lower.shape
        self.first = self.neurons * (torch.arange(rows) // max(1, rows // self.blocks)).unsqueeze(1)
        self.k = case["k"]
        zeros = torch.zeros(rows, dtype=torch.float64)
        self.cut = Bounds.of(zeros, zeros)
        if self.k < self.neurons:
            self.cut = self.ranking.largest(self.k).map(torch.relu)
        self.accumulate = reference.accumulation_dtype(case.dtype)

    def surplus(self, activation: Bounds, response: Tensor | float = 1.0) -> Bounds:
        """activation - response * I."""
        below, above = (response * bound.unsqueeze(-1) for bound in self.cut[:2])
        below, above = torch.minimum(below, above), torch.maximum(below, above)
        size = activation.upper.abs() + torch.maximum(below.abs(), above.abs())
        # Responses are multiples of 1/8. What overflows does so by rounding, and the bounds with it.
        error = rounding(finite(size) / 4, 1, self.accumulate, self.grain / 32) * 4
        free = activation.free | self.cut.free.unsqueeze(-1)
        return Bounds.of(activation.lower - above - error, activation.upper - below + error, free)


class LinearTopK(Op):
    name = "linear_topk"

    def draw(self, d: Draw) -> Case:
        case = layer(d)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        case.arguments["threshold"] = d.chance(0.5)
        case.arguments["preactivations"] = d.chance(0.2)
        return self.finish(case)

    def finish(self, case: Case) -> Case:
        case.truth = truth = Scores(case)
        case.ask("x", "weight", "bias")
        batch, k = case["x"].shape[:-1], case["k"]
        answered = {"values": (*batch, k)}
        if case["threshold"]:
            answered["threshold"] = batch
        if case["preactivations"]:
            answered["preactivations"] = (*batch, truth.neurons)
        case.answer(**answered)
        if case["threshold"]:
            # A loss on a threshold only where rounding cannot make it that of another neuron.
            sure = torch.ones(len(truth.cut.lower), dtype=torch.bool)
            if k < truth.neurons:
                sure = truth.ranking.certain(k)[1]
                sure &= (truth.cut.lower > 0) | (truth.cut.upper <= 0)
            case.upstream["threshold"] = torch.where(
                sure.view(batch), case.upstream["threshold"], 0.0
            ).to(case.dtype)
        return case

    def shapes(self, case: Case) -> Shapes:
        batch = tuple(case["x"].shape[:-1])
        shapes: Shapes = {
            "values": ((*batch, case["k"]), case.dtype),
            "indices": ((*batch, case["k"]), torch.int64),
        }
        if case["threshold"]:
            shapes["threshold"] = (batch, case.dtype)
        if case["preactivations"]:
            shapes["preactivations"] = ((*batch, case.truth.neurons), case.dtype)
        return shapes

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth, k = case.truth, case["k"]
        values = got["values"].reshape(len(truth.first), k)
        indices = got["indices"].reshape(len(truth.first), k) - truth.first
        problem = truth.ranking.wrong(indices)
        if problem:
            yield problem
            return
        bounds = truth.activation.gather(indices)
        if case["inhibition"] == "subtract":
            bounds = truth.surplus(bounds).map(torch.relu)
        yield from off("values", values, bounds)
        yield from descending(values)
        if "threshold" in got:
            yield from off("threshold", got["threshold"].flatten(), truth.cut)
        if "preactivations" in got:
            dense = got["preactivations"].reshape(truth.bounds.lower.shape)
            yield from off("preactivations", dense, truth.bounds)
        if case["counts"] is not None:
            expected = case["counts"].clone()
            reference.count_active(values, indices + truth.first, expected)
            yield from same("counts", after["counts"], expected)

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        truth, k = case.truth, case["k"]
        rows = len(truth.first)
        indices = got["indices"].reshape(rows, k) - truth.first
        active = got["values"].reshape(rows, k) > 0
        coefficients = torch.where(active, case.upstream["values"].reshape(rows, k).double(), 0.0)
        slope = torch.zeros(rows, truth.neurons, dtype=torch.float64)
        slope = slope.scatter(1, indices, coefficients)
        magnitude, terms = finite(slope), k + 1
        parts = []
        if "threshold" in case.upstream and k < truth.neurons:
            neuron = truth.ranking.certain(k)[0].unsqueeze(1)
            part = case.upstream["threshold"].reshape(rows, 1).double()
            part = torch.where(truth.cut.lower.unsqueeze(1) > 0, part, 0.0)
            parts.append(torch.zeros_like(slope).scatter(1, neuron, part))
        if "preactivations" in case.upstream:
            parts.append(case.upstream["preactivations"].reshape(slope.shape).double())
            terms += truth.neurons
        for part in parts:
            slope, magnitude = slope + part, magnitude + finite(part)
        return layer_gradients(case, slope, magnitude, torch.zeros_like(slope), terms)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)


def layer(d: Draw, networks: bool = True, flat: bool = False, sign: bool = False) -> Case:
    """x, weight, k, and perhaps bias, counts and blocks."""
    d.style = d.pick([*STYLES, *STRANGE])
    case = Case(d, d.dtype())
    blocks = d.pick([1] * 5 + [2, 3]) if networks else 1
    batch = d.batch(blocks)
    if flat:
        batch = (blocks * d.pick([0, 1, 2, 3, 5]),) if blocks > 1 else (d.samples(),)
    features, neurons = d.features(), d.neurons()
    case.give(x=(*batch, features), weight=(blocks * neurons, features))
    if sign and d.chance(0.6):  # a shadow serves what is not negative
        case.add("x", Numbers(case["x"].abs(), case.grains["x"]))
        case.add("weight", Numbers(case["weight"].abs(), case.grains["weight"]))
    case.arguments["k"] = d.k(neurons)
    case.arguments["blocks"] = blocks
    if not flat:
        if d.chance(0.5):
            case.give(bias=(blocks * neurons,))
        if d.chance(0.4):
            case.counters(blocks * neurons, "counts")
    return case


def layer_faults(case: Case) -> Iterator[tuple[str, Arguments]]:
    x, weight, blocks = case["x"], case["weight"], case["blocks"] or 1
    rows = weight.shape[0]
    yield from ks(case["k"], rows // blocks)
    yield from floats(case, "x", "weight", "bias")
    yield "x 0-d", {"x": torch.ones((), dtype=x.dtype)}
    yield "weight 1-d", {"weight": torch.ones(rows, dtype=x.dtype)}
    yield from counting(case, rows)
    if "inhibition" in case.arguments:
        yield "inhibition", {"inhibition": "divide"}
    if "blocks" in case.arguments:
        for wrong in (0, -1, rows + 1):
            yield f"blocks={wrong}", {"blocks": wrong}
    if case["gaba"] is not None:
        yield "gaba longer", {"gaba": torch.ones(rows + 1, dtype=x.dtype)}
        yield "gaba on meta", {"gaba": torch.ones(rows, dtype=x.dtype, device="meta")}


def layer_gradients(
    case: Case, slope: Tensor, magnitude: Tensor, error: Tensor, terms: int
) -> dict[str, Bounds]:
    """Of x, weight and bias where scores [S B, R] have these gradients, known up to `error`."""
    blocks = case["blocks"] or 1
    slope, magnitude, error = (reference.by_network(t, blocks) for t in (slope, magnitude, error))
    features = case["x"].shape[-1]
    rows = slope.shape[0] * slope.shape[1]
    x = reference.by_network(case["x"].reshape(rows, features), blocks)
    weight = reference.by_network(case["weight"], blocks)

    def product(left: list[Tensor], right: Tensor, terms: int, grain: float) -> Bounds:
        exact, size = left[0] @ right.double(), left[1] @ finite(right)
        bound = rounding(size, terms, case.dtype, grain) + left[2] @ finite(right)
        return Bounds.around(exact, bound)

    backward = [slope.mT, magnitude.mT, error.mT]
    ones = torch.ones(blocks, slope.shape[1], 1)
    samples = slope.shape[1]
    bounds = {
        "x": product(
            [slope, magnitude, error], weight, terms, case.grain("upstream", "weight")
        ).reshape(*case["x"].shape),
        "weight": product(backward, x, samples, case.grain("upstream", "x")).reshape(
            *case["weight"].shape
        ),
    }
    if case["bias"] is not None:
        bias = product(backward, ones, samples, case.grain("upstream"))
        bounds["bias"] = bias.reshape(*case["bias"].shape)
    return bounds


class LinearInhibit(Op):
    name = "linear_inhibit"

    def draw(self, d: Draw) -> Case:
        case = layer(d)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        weight = case["weight"]
        if d.chance(0.75):
            low = d.pick([-1.0, 0.0, 0.125])
            case.add("gaba", d.positive((len(weight),), case.dtype, low))
        case.truth = truth = Scores(case)
        self.decide(case)
        learned = ("gaba",) if case["inhibition"] == "subtract" else ()
        case.ask("x", "weight", "bias", *learned)
        case.answer(out=(*case["x"].shape[:-1], truth.neurons))
        gradient = case.upstream["out"]
        sure = truth.sure.view(gradient.shape)
        case.upstream["out"] = torch.where(sure, gradient, 0.0).to(case.dtype)
        return case

    @staticmethod
    def decide(case: Case) -> None:
        """What fires, what it is, and where rounding cannot change whether the gradient passes."""
        truth = case.truth
        truth.response = torch.ones(1, 1, dtype=torch.float64)
        if case["gaba"] is not None:
            own = case["gaba"].double().view(truth.blocks, truth.neurons)
            each = len(truth.first) // truth.blocks
            truth.response = own.repeat_interleave(each, dim=0)
        truth.excess = excess = truth.surplus(truth.activation, truth.response)
        certain = ~excess.free & ~truth.bounds.free
        truth.fires = certain & (excess.lower > 0)
        nan = excess.lower.isnan()
        truth.silent = certain & ((excess.upper <= 0) | nan)
        truth.sure = (truth.fires | truth.silent) & (
            (truth.bounds.lower > 0) | (truth.bounds.upper <= 0) | (truth.bounds.lower.isnan())
        )

    def shapes(self, case: Case) -> Shapes:
        return {"out": ((*case["x"].shape[:-1], case.truth.neurons), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth = case.truth
        hidden = got["out"].reshape(truth.bounds.lower.shape)
        yield from self.dense(case, hidden)
        if case["counts"] is not None:
            active = (reference.by_network(hidden, truth.blocks) > 0).sum(1).flatten()
            yield from same("counts", after["counts"], case["counts"] + active)

    @staticmethod
    def dense(case: Case, hidden: Tensor, kept: Tensor | None = None) -> Iterator[str]:
        """What is wrong with the layer's activations [S B, R], in the rows that are kept."""
        truth = case.truth
        if case["inhibition"] == "subtract":
            wrong = truth.excess.map(torch.relu).wrong(hidden)
        else:
            zero = torch.zeros_like(truth.bounds.lower)
            blocked, passed = Bounds.of(zero, zero).wrong(hidden), truth.activation.wrong(hidden)
            wrong = (blocked | truth.fires) & (passed | truth.silent)
        if kept is not None:
            wrong &= kept.unsqueeze(1)
        if wrong.any():
            at = tuple(int(i) for i in wrong.nonzero()[0])
            yield (
                f"h: {int(wrong.sum())} of {wrong.numel()} entries wrong, h{list(at)} = "
                f"{hidden[at].item():.9g}, a = {truth.activation.lower[at].item():.9g}, "
                f"a - g I = {truth.excess.lower[at].item():.9g}"
            )

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        truth = case.truth
        gradient = case.upstream["out"].reshape(truth.bounds.lower.shape).double()
        slope = torch.where(truth.fires & (truth.bounds.lower > 0), gradient, 0.0)
        bounds = layer_gradients(case, slope, finite(slope), torch.zeros_like(slope), truth.neurons)
        if "gaba" in case.wants:
            slope = torch.where(truth.fires, gradient, 0.0)
            cut = truth.cut.lower.unsqueeze(1)
            doubt = (truth.cut.upper.unsqueeze(1) - cut) * finite(slope)
            own = [
                reference.by_network(t, truth.blocks).sum(1).flatten()
                for t in (-slope * cut, finite(slope) * cut.abs(), doubt)
            ]
            grain = case.upstream_grain * truth.grain
            terms = len(slope) // truth.blocks
            error = rounding(own[1] + own[2], terms, truth.accumulate, grain) + own[2]
            bounds["gaba"] = Bounds.around(own[0], error)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)


class LinearActive(Op):
    name = "linear_active"

    def draw(self, d: Draw) -> Case:
        case = layer(d, networks=False, flat=True)
        del case.arguments["blocks"]
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        neurons = len(case["weight"])
        if d.chance(0.75):
            case.add("gaba", d.positive((neurons,), case.dtype, 0.125))
        if d.chance(0.4):
            case.counters(neurons, "counts")
        case.truth = Scores(case)
        LinearInhibit.decide(case)
        return case

    def shapes(self, case: Case) -> Shapes:
        return {}  # known to `judge`, as n is

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth, values, neurons = case.truth, got["values"], got["neurons"]
        if neurons.dtype != torch.int64 or values.dtype != case.dtype:
            yield f"dtypes {values.dtype}, {neurons.dtype}"
        if neurons.dim() != 1 or values.shape != (len(case["x"]), len(neurons)):
            yield f"values {list(values.shape)} for neurons {list(neurons.shape)}"
            return
        inside = (neurons >= 0) & (neurons < truth.neurons)
        if not inside.all() or not (neurons.diff() > 0).all():
            yield "neurons out of range or not ascending"
            return
        if not (~(values <= 0)).any(0).all():
            yield "a neuron that does not fire"
        hidden = torch.zeros(truth.bounds.lower.shape, dtype=case.dtype)
        hidden[:, neurons] = values
        yield from LinearInhibit.dense(case, hidden)
        if case["counts"] is not None:
            yield from same("counts", after["counts"], case["counts"] + (hidden > 0).sum(0))

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)
        yield "x 3-d", {"x": case["x"].unsqueeze(0)}


class LinearCode(Op):
    name = "linear_code"

    def draw(self, d: Draw) -> Case:
        case = layer(d, flat=True, sign=True)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        neurons, k = len(case["weight"]) // case["blocks"], case["k"]
        case.arguments["width"] = d.pick([k, min(neurons, 2 * k), d.upto(k, neurons), neurons])
        if d.chance(0.75):
            case.add("gaba", d.positive((len(case["weight"]),), case.dtype, 0.125))
        positive = all(bool((case[name] >= 0).all()) for name in ("x", "weight"))
        if positive and case["blocks"] == 1 and case.dtype == torch.float32:
            case.arguments["shadow"] = d.pick([None, torch.float32, torch.bfloat16])
        case.truth = Scores(case)
        LinearInhibit.decide(case)
        return case

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        """With a shadow also the result without, which has the same bits."""
        arguments = dict(arguments)
        dtype = arguments.pop("shadow", None)
        shadow = None if dtype is None else Shadow(arguments["weight"], dtype)
        code, overflow = sk.linear_code(**arguments, shadow=shadow, impl=impl)
        outputs = {**named(code), "overflow": overflow}
        if shadow is not None:
            plain, overflow = sk.linear_code(**arguments, impl=impl)
            outputs |= {f"plain {name}": t for name, t in named(plain).items()}
            outputs["plain overflow"] = overflow
        return outputs

    def shapes(self, case: Case) -> Shapes:
        shape, blocks = (len(case["x"]), case["width"]), case["blocks"]
        shapes: Shapes = {
            "values": (shape, case.dtype),
            "indices": (shape, torch.int64),
            "overflow": ((blocks,) if blocks > 1 else (), torch.bool),
        }
        if case["shadow"] is not None:
            shapes |= {f"plain {name}": of for name, of in shapes.items()}
        return shapes

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth, blocks, width = case.truth, case["blocks"], case["width"]
        values, indices = got["values"], got["indices"] - truth.first
        if not ((indices >= 0) & (indices < truth.neurons)).all():
            yield "indices out of range"
            return
        yield from descending(values)
        overflow = got["overflow"].reshape(blocks)
        least = torch.finfo(case.dtype).tiny
        surely = (truth.fires & (truth.excess.lower > least)).sum(1) > width
        perhaps = (~truth.silent).sum(1) > width
        surely, perhaps = (t.view(blocks, len(values) // blocks).any(1) for t in (surely, perhaps))
        if (surely & ~overflow).any() or (overflow & ~perhaps).any():
            yield f"overflow is {overflow.tolist()}, expected {surely.tolist()}"
        fires = ~(values <= 0)
        hidden = torch.zeros(truth.bounds.lower.shape, dtype=case.dtype)
        if (hidden.long().scatter_add(1, indices, fires.long()) > 1).any():
            yield "a neuron twice in a row"
        hidden.scatter_add_(1, indices, torch.where(fires, values, 0.0))
        kept = ~overflow.repeat_interleave(len(values) // blocks)
        yield from LinearInhibit.dense(case, hidden, kept)
        if case["shadow"] is not None:
            yield from same("values", values, got["plain values"])
            plain = got["plain indices"] - truth.first
            yield from same("indices", indices * fires, plain * fires)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)
        yield "x 3-d", {"x": case["x"].unsqueeze(0)}
        for width in (case["k"] - 1, len(case["weight"]) // case["blocks"] + 1):
            yield f"width={width}", {"width": width}


def code(d: Draw, style: list[str], flat: bool, distinct: float) -> tuple[Case, int]:
    """values and indices of a code, and the number of its neurons."""
    d.style = d.pick(style)
    case = Case(d, d.dtype())
    batch = (d.samples(),) if flat else d.batch()
    neurons = d.neurons()
    unique = d.chance(distinct)
    slots = min(d.k(neurons), neurons if unique else 40)
    if d.chance(0.05):
        slots = 0
    case.give(values=(*batch, slots))
    if d.chance(0.5):
        case.add("values", Numbers(case["values"].relu(), case.grains["values"]))
    case.add("indices", d.indices(batch, slots, neurons, unique))
    return case, neurons


def spread(
    coefficients: Tensor,
    inputs: Tensor,
    indices: Tensor,
    neurons: int,
    dtype: torch.dtype,
    grain: float,
) -> Bounds:
    """row_gradient within its rounding."""  # fmt: skip
    exact = reference.row_gradient(coefficients.double(), inputs.double(), indices, neurons)
    size = reference.row_gradient(finite(coefficients), finite(inputs), indices, neurons)
    terms = torch.bincount(indices.flatten(), minlength=neurons).unsqueeze(1)
    return Bounds.around(exact, rounding(size, terms, dtype, grain))


class SparseLinear(Op):
    name = "sparse_linear"

    def draw(self, d: Draw) -> Case:
        case, neurons = code(d, [*STYLES, *STRANGE], flat=False, distinct=0.5)
        outputs = d.features()
        case.give(weight=(neurons, outputs))
        if d.chance(0.5):
            case.give(bias=(outputs,))
        return self.finish(case)

    def finish(self, case: Case) -> Case:
        case.ask("values", "weight", "bias")
        case.answer(out=(*case["values"].shape[:-1], case["weight"].shape[1]))
        return case

    def shapes(self, case: Case) -> Shapes:
        return {"out": ((*case["values"].shape[:-1], case["weight"].shape[1]), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        arguments = [case[name] for name in ("values", "indices", "weight", "bias")]
        yield from off("out", got["out"], decoded(case, *arguments))

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        values, indices, weight = (case[name] for name in ("values", "indices", "weight"))
        slots, (neurons, outputs) = values.shape[-1], weight.shape
        rows = values.shape[:-1].numel()
        values, indices = values.reshape(rows, slots), indices.reshape(rows, slots)
        gradient = case.upstream["out"].reshape(rows, outputs)
        own = slot_gradient(case, gradient, weight, indices).reshape(*case["values"].shape)
        bounds = {"values": own}
        grain = case.grain("upstream", "values")
        bounds["weight"] = spread(values, gradient, indices, neurons, case.dtype, grain)
        if case["bias"] is not None:
            size = finite(gradient).sum(0)
            error = rounding(size, rows, case.dtype, case.upstream_grain)
            bounds["bias"] = Bounds.around(gradient.double().sum(0), error)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from codes(case, len(case["weight"]))
        yield from floats(case, "values", "bias")
        weight = case["weight"]
        yield "weight int64", {"weight": weight.isnan().long()}
        yield "weight 1-d", {"weight": weight.new_ones(len(weight))}
        yield "weight on meta", {"weight": weight.to("meta")}


def decoded(
    case: Case, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None
) -> Bounds:
    """sparse_linear within its rounding, which may be that of its dtype for each term."""
    double = None if bias is None else bias.double()
    exact = reference.sparse_linear(values.double(), indices, weight.double(), double)
    size = reference.sparse_linear(
        finite(values), indices, finite(weight), None if bias is None else finite(bias)
    )
    grain = case.grain("values", "weight") if "values" in case.grains else 0.0
    return Bounds.around(exact, rounding(size, values.shape[-1] + 1, case.dtype, grain))


def slot_gradient(case: Case, gradient: Tensor, weight: Tensor, indices: Tensor) -> Bounds:
    """<gradient[b], weight[indices[b, s]]> of each slot [B, K] within its rounding."""
    rows = weight[indices]
    exact = (gradient.double().unsqueeze(1) * rows.double()).sum(2)
    size = (finite(gradient).unsqueeze(1) * finite(rows)).sum(2)
    grain = case.grain("upstream", "weight" if "values" in case.grains else "decoder")
    return Bounds.around(exact, rounding(size, weight.shape[1], case.dtype, grain))


class RowGradient(Op):
    name = "row_gradient"

    def draw(self, d: Draw) -> Case:
        case, neurons = code(d, [*STYLES, *STRANGE], flat=True, distinct=0.4)
        case.arguments["coefficients"] = case.arguments.pop("values")
        case.grains["coefficients"] = case.grains.pop("values")
        case.give(inputs=(len(case["indices"]), d.features()))
        case.arguments["neurons"] = neurons
        case.open = d.style in STRANGE
        return case

    def shapes(self, case: Case) -> Shapes:
        return {"out": ((case["neurons"], case["inputs"].shape[1]), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        grain = case.grain("coefficients", "inputs")
        bounds = spread(
            case["coefficients"], case["inputs"], case["indices"], case["neurons"], case.dtype,
            grain,
        )  # fmt: skip
        yield from off("out", got["out"], bounds)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from codes(case, case["neurons"])
        yield from floats(case, "coefficients")
        inputs = case["inputs"]
        other = torch.float16 if case.dtype != torch.float16 else torch.float32
        yield "inputs 1-d", {"inputs": inputs.new_ones(len(inputs))}
        yield "inputs of more samples", {"inputs": inputs.new_ones(len(inputs) + 1, 2)}
        yield f"inputs {other}", {"inputs": inputs.to(other)}
        yield "inputs on meta", {"inputs": inputs.to("meta")}


class CountActive(Op):
    name = "count_active"

    def draw(self, d: Draw) -> Case:
        case, neurons = code(d, [*STYLES, *STRANGE], flat=False, distinct=1.0)
        case.counters(neurons, "counts", *d.some(["last_active"]))
        step = d.upto(0, 1000)
        case.arguments["step"] = step
        if d.chance(0.3):
            case.arguments["step"] = torch.tensor(step, dtype=d.pick([torch.int64, torch.int32]))
        case.truth = neurons
        return case

    def shapes(self, case: Case) -> Shapes:
        return {}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        last = case["last_active"]
        counts = case["counts"].clone()
        last = None if last is None else last.clone()
        values = case["values"].double()
        reference.count_active(values, case["indices"], counts, last, case["step"])
        yield from same("counts", after["counts"], counts)
        if last is not None:
            yield from same("last_active", after["last_active"], last)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from codes(case, case.truth)
        yield from counting(case, case.truth)
        yield from counting(case, case.truth, "last_active")
        yield "counts 0-d", {"counts": torch.zeros((), dtype=torch.int64)}


class CodeGram(Op):
    name = "code_gram"

    def draw(self, d: Draw) -> Case:
        case, neurons = code(d, [*STYLES, *STRANGE], flat=True, distinct=1.0)
        case.dtype = d.pick([torch.float32, torch.float64])
        names = ["gram"]
        shapes = [(neurons, neurons)]
        if d.chance(0.7):
            outputs, batch = d.features(), len(case["values"])
            names.append("cross")
            shapes.append((neurons, outputs))
            if outputs and d.chance(0.5):
                labels = torch.from_numpy(d.rng.integers(0, outputs, batch))
                case.add("targets", labels)
                case.grains["targets"] = 1.0
            else:
                dtype = d.pick([case["values"].dtype, torch.float32, torch.float64])
                case.add("targets", d.numbers((batch, outputs), dtype))
        for name, shape in zip(names, shapes, strict=True):
            numbers = d.numbers(shape, case.dtype, 2)
            case.arguments[name] = numbers.tensor.contiguous()
            case.grains[name] = numbers.grain
        case.in_place = tuple(names)
        given = [case[name] for name in ("values", "targets") if case[name] is not None]
        case.open = not all(bool(t.to(case.dtype).isfinite().all()) for t in given)
        return case

    def shapes(self, case: Case) -> Shapes:
        return {}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        values, indices, targets = case["values"], case["indices"], case["targets"]
        expected, size = [], []
        for out, convert in ((expected, torch.Tensor.double), (size, finite)):
            out += [
                None if case[n] is None else convert(case[n]).clone() for n in ("gram", "cross")
            ]
            own = targets
            if own is not None and own.dim() == 2:
                own = convert(own)
            reference.code_gram(convert(values), indices, *out, own)
        grains = {"gram": ("values", "values"), "cross": ("values", "targets")}
        for number, name in enumerate(case.in_place):
            # Entries are converted to the dtype of the sums: a rounding each.
            error = rounding(size[number], len(values) + 3, case.dtype, case.grain(*grains[name]))
            yield from off(name, after[name], Bounds.around(expected[number], error))

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        gram, cross, targets = case["gram"], case["cross"], case["targets"]
        neurons = len(gram)
        yield from codes(case, neurons)
        yield "values int64", {"values": case["values"].isnan().long()}
        yield "gram float16", {"gram": gram.half()}
        yield "gram longer", {"gram": gram.new_zeros(neurons, neurons + 1)}
        yield "gram on meta", {"gram": gram.to("meta")}
        if neurons > 1:
            yield "gram strided", {"gram": gram.new_zeros(neurons, 2 * neurons)[:, ::2]}
        if cross is None:
            yield "targets alone", {"targets": gram.new_zeros(len(case["values"]), 2)}
            return
        yield "cross alone", {"targets": None}
        yield "cross of more neurons", {"cross": cross.new_zeros(neurons + 1, cross.shape[1])}
        yield "cross of another dtype", {"cross": cross.half()}
        yield (
            "targets longer",
            {"targets": torch.cat([targets, targets[:1]])}
            if len(targets)
            else {"targets": targets.new_zeros(3, *targets.shape[1:])},
        )
        if targets.dim() == 1:
            yield "labels int32", {"targets": targets.int()}
            yield from mislabelled(case, "targets", cross.shape[1])


def mislabelled(case: Case, name: str, classes: int) -> Iterator[tuple[str, Arguments]]:
    labels = case[name]
    if len(labels):
        for wrong in (-1, -100, classes):
            changed = labels.clone()
            changed[case.draw.upto(0, len(labels) - 1)] = wrong
            yield f"label {wrong}", {name: changed}


class RowUpdate(Op):
    name = "row_update"

    def draw(self, d: Draw) -> Case:
        usual = [style for style in STYLES if style not in ("wide", "mixed", "subnormal")]
        case, neurons = code(d, [*usual, *STRANGE], flat=True, distinct=0.5)
        del case.arguments["values"]
        indices = case["indices"]
        blocks = d.pick([n for n in (1, 1, 1, 2, 3) if neurons % n == 0])
        lists: dict[str, list[Tensor]] = {"weights": [], "coefficients": [], "inputs": []}
        momentum = d.pick([0.0, 0.5, 0.9])
        if momentum:
            lists["buffers"] = []
        count = d.upto(1, 3)
        for _ in range(count):
            features = d.features()
            shapes = {
                "weights": (neurons, features),
                "coefficients": tuple(indices.shape),
                "inputs": (len(indices), features),
                "buffers": (neurons, features),
            }
            for name, own in lists.items():
                numbers = d.numbers(shapes[name], case.dtype)
                if name == "coefficients" and d.chance(0.5):
                    numbers = Numbers(numbers.tensor.relu(), numbers.grain)
                expand = name in ("coefficients", "inputs")
                own.append(d.strided(numbers.tensor, expand))
                case.grains[name] = numbers.grain
        case.arguments |= lists
        case.in_place = ("weights", "buffers") if momentum else ("weights",)
        case.open = d.style in STRANGE
        case.arguments |= {
            "lr": self.setting(d, blocks, case.dtype, 0.01, 1.0),
            "max_norm": self.setting(d, blocks, case.dtype, 0.1, 10.0) if d.chance(0.6) else None,
            "nonnegative": d.chance(0.5),
            "normalize": [d.chance(0.5) for _ in range(count)] if d.chance(0.6) else None,
            "momentum": momentum,
            "blocks": blocks,
        }
        return case

    @staticmethod
    def setting(d: Draw, blocks: int, dtype: torch.dtype, low: float, high: float) -> Any:
        if blocks > 1 and d.chance(0.5):
            return torch.from_numpy(d.rng.uniform(low, high, blocks)).to(dtype)
        return round(float(d.rng.uniform(low, high)), 3)

    def shapes(self, case: Case) -> Shapes:
        blocks = case["blocks"]
        return {"out": ((blocks,) if blocks > 1 else (), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        indices, dtype, blocks = case["indices"], case.dtype, case["blocks"]
        neurons = len(case["weights"][0])
        unit = torch.finfo(dtype).eps + torch.finfo(torch.float64).eps
        tiny = torch.finfo(dtype).tiny
        touched = torch.zeros(neurons, dtype=torch.bool)
        gradients = []
        for coefficients, inputs in zip(case["coefficients"], case["inputs"], strict=True):
            touched[indices[coefficients != 0]] = True
            grain = case.grain("coefficients", "inputs")
            bounds = spread(coefficients, inputs, indices, neurons, dtype, grain)
            middle = (bounds.lower + bounds.upper) / 2
            gradients.append((middle, bounds.upper - middle))
        squares = sum(g.square().sum(1) for g, _ in gradients)
        doubts = sum(error.square().sum(1) for _, error in gradients)
        norm, doubt = (t.view(blocks, -1).sum(1).sqrt() for t in (squares, doubts))
        terms = sum(g.shape[1] for g, _ in gradients) + neurons + 8
        doubt = doubt + terms * unit * norm + tiny**0.5
        yield from off("norm", got["out"].reshape(blocks), Bounds.around(norm, doubt))
        scale, scale_doubt = torch.ones_like(norm), torch.zeros_like(norm)
        limit = case["max_norm"]
        if limit is not None:
            limit = torch.as_tensor(limit, dtype=torch.float64)
            least, most = (
                (limit / ((norm + sign * doubt).clamp(min=0) + 1e-6)).clamp(max=1)
                for sign in (1, -1)
            )
            scale, scale_doubt = (least + most) / 2, (most - least) / 2 + 8 * unit * most
        rate = torch.as_tensor(case["lr"], dtype=torch.float64).expand(blocks)
        block = torch.arange(neurons) // (neurons // blocks)
        scale, scale_doubt, rate = (t[block].unsqueeze(1) for t in (scale, scale_doubt, rate))
        for number, weight in enumerate(case["weights"]):
            gradient, error = gradients[number]
            own, old = after["weights"][number], weight.double()
            error = error * (scale + scale_doubt) + gradient.abs() * scale_doubt + tiny
            direction = gradient * scale
            size = direction.abs()
            if case["buffers"] is not None:
                buffer = case["buffers"][number].double()
                size = size + case["momentum"] * buffer.abs()
                direction = direction + case["momentum"] * buffer
                error = error + 4 * unit * size
                at = touched.unsqueeze(1)
                moved = Bounds.around(
                    torch.where(at, direction, buffer), torch.where(at, error, 0.0)
                )
                yield from off(f"buffers[{number}]", after["buffers"][number], moved)
            moved = old - rate * direction
            error = rate * error + 6 * unit * (old.abs() + rate * size) + tiny
            if case["nonnegative"]:
                moved = moved.clamp(min=0)
            if case["normalize"] is not None and case["normalize"][number]:
                moved, error = self.normalized(moved, error, unit)
            at = touched.unsqueeze(1)
            bounds = Bounds.around(torch.where(at, moved, old), torch.where(at, error, 0.0))
            yield from off(f"weights[{number}]", own, bounds)

    @staticmethod
    def normalized(rows: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        length = rows.norm(dim=1, keepdim=True)
        doubt = error.norm(dim=1, keepdim=True) + (rows.shape[1] + 8) * unit * length
        unsure = length <= 2 * doubt  # whether the row is zero, say
        safe = torch.where(length > 0, length, 1.0)
        out = rows / safe
        error = 2 * (error + out.abs() * doubt) / safe + 4 * unit * out.abs()
        return out, torch.where(unsure, torch.inf, error)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        weights, inputs = case["weights"], case["inputs"]
        coefficients, neurons = case["coefficients"], len(case["weights"][0])
        for label, changed in codes(case, neurons):
            yield label, changed
        other = torch.float16 if case.dtype != torch.float16 else torch.float32
        yield "no weights", {"weights": []}
        yield "one more inputs", {"inputs": [*inputs, inputs[0]]}
        yield "one more coefficients", {"coefficients": [*coefficients, coefficients[0]]}
        yield "weights longer", {"weights": [F.pad(weights[0], (0, 1)), *weights[1:]]}
        yield "weights 1-d", {"weights": [weights[0].new_ones(neurons), *weights[1:]]}
        yield "weights int64", {"weights": [weights[0].isnan().long(), *weights[1:]]}
        yield f"inputs {other}", {"inputs": [inputs[0].to(other), *inputs[1:]]}
        yield "inputs on meta", {"inputs": [inputs[0].to("meta"), *inputs[1:]]}
        yield "momentum without buffers", {"momentum": 0.5, "buffers": None}
        for wrong in (0, -1, neurons + 1):
            yield f"blocks={wrong}", {"blocks": wrong}
        yield "lr of more blocks", {"lr": torch.ones(case["blocks"] + 1, dtype=case.dtype)}
        if case["normalize"] is not None:
            yield "normalize longer", {"normalize": [*case["normalize"], True]}


class Distill(Op):
    name = "distill"

    def draw(self, d: Draw) -> Case:
        d.style = d.pick([*STYLES, "infinite"])
        case = Case(d, d.dtype())
        batch, classes = d.samples(), max(1, d.features())
        if d.chance(0.05):
            classes = d.upto(200, 300)
        case.give(logits=(batch, classes))
        case.add("labels", torch.from_numpy(d.rng.integers(0, classes, batch)))
        if d.chance(0.75):
            case.give(target_logits=(batch, classes))
            case.open = d.style == "infinite"
        if d.chance(0.5):
            units = d.features()
            case.give(hidden=(batch, units), target_hidden=(batch, units))
        for name, low, high in (("alpha", 0, 1), ("lam", 0, 1), ("temperature", 0.5, 4)):
            if d.chance(0.5):
                case.arguments[name] = round(float(d.rng.uniform(low, high)), 2)
            elif d.chance(0.5):
                each = torch.from_numpy(d.rng.uniform(low, high, batch)).to(case.dtype)
                case.add(name, each)
        case.arguments["kl"] = d.pick(["reverse", "forward"])
        if d.chance(0.4):
            columns = torch.from_numpy(d.rng.random((batch, classes)) < 0.5)
            columns[torch.arange(batch), torch.from_numpy(d.rng.integers(0, classes, batch))] = True
            case.add("columns", columns)
        return case

    def shapes(self, case: Case) -> Shapes:
        logits, hidden = case["logits"], case["hidden"]
        shapes: Shapes = {
            "loss": ((len(logits),), case.dtype),
            "grad_logits": (tuple(logits.shape), case.dtype),
        }
        if hidden is not None:
            shapes["grad_hidden"] = (tuple(hidden.shape), case.dtype)
        return shapes

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        logits, hidden, columns = case["logits"], case["hidden"], case["columns"]
        labels = case["labels"]
        unit = 2 * (torch.finfo(case.dtype).eps + torch.finfo(torch.float64).eps)
        alpha, lam, temperature = (
            torch.as_tensor(
                1.0 * (default if case[name] is None else case[name]), dtype=torch.float64
            )
            for name, default in (("alpha", 1.0), ("lam", 0.0), ("temperature", 1.0))
        )
        alpha, lam, temperature = (
            t.expand(len(logits)).unsqueeze(1) for t in (alpha, lam, temperature)
        )
        log_p, error = log_softmax(
            logits.double(), torch.ones_like(logits, dtype=torch.bool), unit, case.dtype
        )
        target = F.one_hot(labels, logits.shape[1]).double()
        loss = -log_p.gather(1, labels.unsqueeze(1)) + 0.0
        loss_error = error.gather(1, labels.unsqueeze(1))
        gradient = log_p.exp() - target
        gradient_error = log_p.exp() * miss(error) + unit * (log_p.exp() + target)
        hidden_gradient, hidden_error = (
            None if hidden is None else torch.zeros(hidden.shape, dtype=torch.float64)
            for _ in range(2)
        )
        if case["target_logits"] is not None:
            pairs = [(logits, case["target_logits"], columns, (1 - alpha) * (1 - lam))]
            if hidden is not None:
                pairs.append((hidden, case["target_hidden"], None, (1 - alpha) * lam))
            loss, loss_error = alpha * loss, alpha.abs() * loss_error + unit * (alpha * loss).abs()
            gradient, gradient_error = (
                alpha * gradient,
                alpha.abs() * gradient_error + unit * (alpha * gradient).abs(),
            )
            for number, (student, teacher, counts, share) in enumerate(pairs):
                # The share itself rounds, as 1 - alpha does.
                term, term_error, slope, slope_error = divergence(
                    student.double(),
                    teacher.double(),
                    counts,
                    temperature,
                    case["kl"],
                    unit,
                    case.dtype,
                )
                away = 4 * unit
                loss = loss + share * term
                loss_error = loss_error + share.abs() * term_error + away * term.abs()
                if number == 0:
                    gradient = gradient + share * slope
                    gradient_error = gradient_error + share.abs() * slope_error + away * slope.abs()
                else:
                    hidden_gradient = share * slope
                    hidden_error = share.abs() * slope_error + away * slope.abs()
        loss_error = loss_error + 2 * unit * loss.abs()
        yield from off("loss", got["loss"], Bounds.around(loss, loss_error).reshape(len(logits)))
        yield from off("grad_logits", got["grad_logits"], Bounds.around(gradient, gradient_error))
        if hidden is not None:
            bounds = Bounds.around(hidden_gradient, hidden_error)
            yield from off("grad_hidden", got["grad_hidden"], bounds)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        logits, classes = case["logits"], case["logits"].shape[1]
        yield "logits int64", {"logits": logits.isnan().long()}
        yield "logits 1-d", {"logits": logits.new_ones(len(logits))}
        yield "labels int32", {"labels": case["labels"].int()}
        yield "labels longer", {"labels": F.pad(case["labels"], (0, 1))}
        yield "labels on meta", {"labels": case["labels"].to("meta")}
        yield "kl", {"kl": "sideways"}
        yield from mislabelled(case, "labels", classes)
        yield "columns int64", {"columns": torch.ones(logits.shape, dtype=torch.int64)}
        yield "hidden alone", {"hidden": logits, "target_hidden": None}
        other = torch.float16 if case.dtype != torch.float16 else torch.float32
        if case["target_logits"] is not None:
            target = case["target_logits"]
            yield "target_logits longer", {"target_logits": F.pad(target, (0, 1))}
            yield f"target_logits {other}", {"target_logits": target.to(other)}
            yield "target_logits on meta", {"target_logits": target.to("meta")}
        if case["hidden"] is not None:
            hidden = case["hidden"]
            yield "hidden 1-d", {"hidden": hidden.new_ones(len(hidden))}
            yield "target_hidden longer", {"target_hidden": F.pad(hidden, (0, 1))}
            yield f"target_hidden {other}", {"target_hidden": hidden.to(other)}


def miss(error: Tensor) -> Tensor:
    """The relative error of exp where the exponent has this error."""
    return error.clamp(max=700).expm1()


def log_softmax(
    rows: Tensor, counts: Tensor, unit: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Over the columns that count, and its error bound; elsewhere 0."""
    log_p = F.log_softmax(rows.masked_fill(~counts, -torch.inf), dim=1).masked_fill(~counts, 0.0)
    size = torch.where(counts, finite(rows), 0.0)
    largest = size.amax(1, keepdim=True) if rows.shape[1] else size.sum(1, keepdim=True)
    error = unit * (rows.shape[1] + 4 + 2 * largest + finite(log_p)) + torch.finfo(dtype).tiny
    return log_p, torch.where(largest > torch.finfo(dtype).max / 4, torch.inf, error)


def divergence(
    student: Tensor,
    teacher: Tensor,
    columns: Tensor | None,
    temperature: Tensor,
    kl: str,
    unit: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T^2 KL [B, 1] and its error bound; its gradient [B, n] and that one's."""
    counts = torch.ones_like(student, dtype=torch.bool) if columns is None else columns
    p, p_error = log_softmax(student / temperature, counts, unit, dtype)
    q, q_error = log_softmax(teacher / temperature, counts, unit, dtype)
    ratio, ratio_error = p - q, p_error + q_error + unit * (p - q).abs()
    p_exp, q_exp = (torch.where(counts, t.exp(), 0.0) for t in (p, q))
    p_miss = p_exp * miss(p_error) + torch.finfo(dtype).tiny
    q_miss = q_exp * miss(q_error) + torch.finfo(dtype).tiny
    mean, mean_miss, sign = (q_exp, q_miss, -1) if kl == "forward" else (p_exp, p_miss, 1)
    size = (mean * ratio.abs()).sum(1, keepdim=True)
    loss = sign * (mean * ratio).sum(1, keepdim=True)
    loss_error = (mean_miss * (ratio.abs() + ratio_error) + mean * ratio_error).sum(1, keepdim=True)
    loss_error = loss_error + (student.shape[1] + 4) * unit * size
    if kl == "forward":
        slope, slope_error = p_exp - q_exp, p_miss + q_miss + unit * (p_exp + q_exp)
    else:
        slope = p_exp * (ratio - loss)
        reach = ratio.abs() + loss.abs()
        slope_error = p_miss * (reach + ratio_error + loss_error)
        slope_error = slope_error + p_exp * (ratio_error + loss_error + 4 * unit * reach)
    slope_error = torch.where(counts, slope_error, 0.0)
    # Products and squares of T round and, of large ratios, overflow.
    largest = temperature**2 * (ratio.abs().amax(1, keepdim=True) if student.shape[1] else size)
    over = largest > torch.finfo(dtype).max / 4
    square = temperature**2
    loss_error = square * (loss_error + 4 * unit * loss.abs())
    slope_error = temperature * (slope_error + 4 * unit * slope.abs())
    return (
        square * loss,
        torch.where(over, torch.inf, loss_error),
        temperature * slope,
        torch.where(over, torch.inf, slope_error),
    )


class Module(Op):
    """A module of ssd_kernels.nn; the environment chooses the implementation."""

    prefixes = ("topk", "linear_topk", "sparse_linear", "TopKLinear", "SparseLinear")

    def module(self, arguments: Arguments) -> torch.nn.Module:
        raise NotImplementedError

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        raise NotImplementedError

    def forward(self, arguments: Arguments, *inputs: str) -> Any:
        module = self.module(arguments)
        parameters = {n: t for n, t in self.parameters(arguments).items() if t is not None}
        given = tuple(arguments[name] for name in inputs)
        return torch.func.functional_call(module, parameters, given)

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        with mock.patch.dict(os.environ, {_dispatch.ENVIRONMENT: impl}):
            return self.outputs(arguments)

    def outputs(self, arguments: Arguments) -> Outputs:
        raise NotImplementedError


class TopKModule(Module, TopK):
    name = "TopK"

    def implementations(self) -> list[str]:
        return list(_module("topk").IMPLEMENTATIONS)

    def draw(self, d: Draw) -> Case:
        d.style = d.pick([*STYLES, *STRANGE * 2])
        case = Case(d, d.dtype())
        neurons = d.neurons()
        case.give(scores=(*d.batch(), neurons))
        case.arguments["k"] = d.k(neurons)
        case.ask("scores")
        case.answer(out=tuple(case["scores"].shape))
        case.truth = self.expected(case)
        return case

    def outputs(self, arguments: Arguments) -> Outputs:
        return {"out": sk.nn.TopK(arguments["k"])(arguments["scores"])}

    def shapes(self, case: Case) -> Shapes:
        return {"out": (tuple(case["scores"].shape), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        dense = torch.zeros_like(case["scores"])
        values = case.truth.values.relu().to(case.dtype)
        yield from same("out", got["out"], dense.scatter(-1, case.truth.indices, values))

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        passes = torch.zeros(case["scores"].shape, dtype=torch.bool)
        passes = passes.scatter(-1, case.truth.indices, case.truth.values > 0)
        gradient = torch.where(passes, case.upstream["out"].double(), 0.0)
        return {"scores": Bounds.of(gradient, gradient)}

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], case["scores"].shape[-1])
        yield "x int64", {"scores": case["scores"].isnan().long()}


class TopKLinear(Module, LinearTopK):
    name = "TopKLinear"

    def implementations(self) -> list[str]:
        return list(_module("linear_topk").IMPLEMENTATIONS)

    def draw(self, d: Draw) -> Case:
        case = layer(d, networks=False)
        case.arguments.pop("counts", None)
        case.arguments.pop("blocks")
        case.in_place = ()
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        return self.finish(case)

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight = arguments["weight"]
        return sk.nn.TopKLinear(
            *reversed(weight.shape), arguments["k"], arguments.get("bias") is not None,
            arguments["inhibition"], weight.device, weight.dtype,
        )  # fmt: skip

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {"weight": arguments["weight"], "bias": arguments.get("bias")}

    def outputs(self, arguments: Arguments) -> Outputs:
        return named(self.forward(arguments, "x"))

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], len(case["weight"]))
        for label, changed in floats(case, "x"):
            yield label, changed
        yield "x longer", {"x": F.pad(case["x"], (0, 1))}
        yield "inhibition", {"inhibition": "divide"}


class SparseLinearModule(Module, SparseLinear):
    name = "SparseLinear"

    def implementations(self) -> list[str]:
        return list(_module("sparse_linear").IMPLEMENTATIONS)

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight = arguments["weight"]
        return sk.nn.SparseLinear(
            *weight.shape, arguments.get("bias") is not None, weight.device, weight.dtype
        )

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {"weight": arguments["weight"], "bias": arguments.get("bias")}

    def outputs(self, arguments: Arguments) -> Outputs:
        return {"out": self.forward(arguments, "values", "indices")}

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from codes(case, len(case["weight"]))
        yield from floats(case, "values")


class KSparseMLP(Module, LinearTopK):
    name = "KSparseMLP"

    def implementations(self) -> list[str]:
        return list(_module("linear_topk").IMPLEMENTATIONS)

    def draw(self, d: Draw) -> Case:
        case = layer(d, networks=False)
        for name in ("counts", "blocks"):
            case.arguments.pop(name, None)
        case.in_place = ()
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        outputs = d.features()
        case.give(decoder=(len(case["weight"]), outputs))
        if case["bias"] is not None:
            case.give(decoder_bias=(outputs,))
        case.truth = Scores(case)
        case.ask("x", "weight", "bias", "decoder", "decoder_bias")
        case.answer(out=(*case["x"].shape[:-1], outputs))
        return case

    def module(self, arguments: Arguments) -> torch.nn.Module:
        weight, decoder = arguments["weight"], arguments["decoder"]
        return sk.nn.KSparseMLP(
            *reversed(weight.shape), decoder.shape[1], arguments["k"],
            arguments.get("bias") is not None, arguments["inhibition"], weight.device, weight.dtype,
        )  # fmt: skip

    def parameters(self, arguments: Arguments) -> dict[str, Tensor]:
        return {
            "encoder.weight": arguments["weight"],
            "encoder.bias": arguments.get("bias"),
            "decoder.weight": arguments["decoder"],
            "decoder.bias": arguments.get("decoder_bias"),
        }

    def outputs(self, arguments: Arguments) -> Outputs:
        """And the code, without gradient, which the truth of the output is taken from."""
        out = self.forward(arguments, "x")
        with torch.no_grad():
            encoder = TopKLinear()
            return {"out": out, **encoder.outputs(arguments)}

    def shapes(self, case: Case) -> Shapes:
        shape = (*case["x"].shape[:-1], case["decoder"].shape[1])
        return {"out": (shape, case.dtype), **super().shapes(case)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        yield from super().judge(case, got, after)
        bounds = decoded(case, got["values"], got["indices"], case["decoder"], case["decoder_bias"])
        yield from off("out", got["out"], bounds)

    def gradients(self, case: Case, got: Outputs) -> dict[str, Bounds]:
        rows, k = len(case.truth.first), case["k"]
        values, indices = (got[name].reshape(rows, k) for name in ("values", "indices"))
        gradient = case.upstream["out"].reshape(rows, case["decoder"].shape[1])
        own = slot_gradient(case, gradient, case["decoder"], indices)
        middle = (own.lower + own.upper) / 2
        # Each slot's gradient is rounded to the dtype.
        error = (own.upper - middle).abs() + 2 * torch.finfo(case.dtype).eps * middle.abs()
        error = torch.where(own.free, torch.inf, error + torch.finfo(case.dtype).tiny)
        active = values > 0
        zeros = torch.zeros(rows, case.truth.neurons, dtype=torch.float64)
        slope, doubt = (
            zeros.scatter(1, indices, torch.where(active, t, 0.0)) for t in (middle, error)
        )
        case.grains["x"], grain = 0.0, case.grains["x"]  # what is rounded has no grain
        bounds = layer_gradients(case, slope, finite(slope) + finite(doubt), doubt, k)
        case.grains["x"] = grain
        bounds["decoder"] = spread(values, gradient, indices, case.truth.neurons, case.dtype, 0.0)
        if case["decoder_bias"] is not None:
            error = rounding(finite(gradient).sum(0), rows, case.dtype, case.upstream_grain)
            bounds["decoder_bias"] = Bounds.around(gradient.double().sum(0), error)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ks(case["k"], len(case["weight"]))
        yield "x longer", {"x": F.pad(case["x"], (0, 1))}
        yield "x int64", {"x": case["x"].isnan().long()}
        yield "inhibition", {"inhibition": "divide"}


OPS: list[Op] = [
    TopK(),
    LinearTopK(),
    LinearInhibit(),
    LinearActive(),
    LinearCode(),
    SparseLinear(),
    RowGradient(),
    RowUpdate(),
    CountActive(),
    CodeGram(),
    Distill(),
    TopKModule(),
    TopKLinear(),
    SparseLinearModule(),
    KSparseMLP(),
]
