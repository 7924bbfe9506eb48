"""What is drawn and what is right for topk and for the layers that select: linear_*."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssd_kernels import reference
from ssd_kernels._graded_code import Shadow
from tests.kernels.property_bounds import Bounds, Ranking, finite, rounding, scores
from tests.kernels.property_cases import (
    STRANGE,
    Arguments,
    Case,
    Drawn,
    Outputs,
    Shapes,
    counting,
    descending,
    floats,
    ks,
    named,
    off,
    same,
)
from tests.kernels.property_draws import STYLES, Draw, Numbers


def ranked(d: Draw) -> tuple[Case, int]:
    """A case with scores [.., R] and k; R."""
    d.style = d.pick([*STYLES, *STRANGE * 2])
    case = Case(d, d.dtype())
    neurons = d.neurons()
    case.give(scores=(*d.batch(), neurons))
    case.arguments["k"] = d.k(neurons)
    return case, neurons


class TopK(Drawn):
    def draw(self, d: Draw) -> Case:
        case, neurons = ranked(d)
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

    def expected(self, case: Case) -> reference.TopKOutput:
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
        self.networks = case["networks"] or 1
        self.grain = case.grain("x", "weight")
        if case["bias"] is not None:
            self.grain = min(self.grain, case.grain("bias"))
        self.bounds = scores(case["x"], case["weight"], case["bias"], self.networks, self.grain)
        self.ranking = Ranking(self.bounds)
        self.activation = self.bounds.map(torch.relu)
        rows, self.neurons = self.bounds.lower.shape
        self.first = self.neurons * (torch.arange(rows) // max(1, rows // self.networks)).unsqueeze(
            1
        )
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
        # Responses are multiples of 1/8. Overflow is rounding, which the bounds meet as well.
        error = rounding(finite(size) / 4, 1, self.accumulate, self.grain / 32) * 4
        free = activation.free | self.cut.free.unsqueeze(-1)
        return Bounds.of(activation.lower - above - error, activation.upper - below + error, free)


class LinearTopK(Drawn):
    def draw(self, d: Draw) -> Case:
        case = layer(d)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        case.arguments["threshold"] = d.chance(0.5)
        case.arguments["preactivations"] = d.chance(0.2)
        return self.finish(case)

    def finish(self, case: Case) -> Case:
        case.truth = truth = Scores(case)
        case.ask("x", "weight", "bias", doubt=truth.ranking.doubtful())
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
    """x, weight, k, and perhaps bias, counts and networks."""
    d.style = d.pick([*STYLES, *STRANGE])
    case = Case(d, d.dtype())
    networks = d.pick([1] * 5 + [2, 3]) if networks else 1
    batch = d.batch(networks)
    if flat:
        batch = (networks * d.pick([0, 1, 2, 3, 5]),) if networks > 1 else (d.samples(),)
    features, neurons = d.features(), d.neurons()
    case.give(x=(*batch, features), weight=(networks * neurons, features))
    if sign and d.chance(0.6):  # a shadow serves what is not negative
        case.add("x", Numbers(case["x"].abs(), case.grains["x"]))
        case.add("weight", Numbers(case["weight"].abs(), case.grains["weight"]))
    case.arguments["k"] = d.k(neurons)
    case.arguments["networks"] = networks
    if not flat:
        if d.chance(0.5):
            case.give(bias=(networks * neurons,))
        if d.chance(0.4):
            case.counters(networks * neurons, "counts")
    return case


def layer_faults(case: Case) -> Iterator[tuple[str, Arguments]]:
    x, weight, networks = case["x"], case["weight"], case["networks"] or 1
    rows = weight.shape[0]
    yield from ks(case["k"], rows // networks)
    yield from floats(case, "x", "weight", "bias")
    yield "x 0-d", {"x": torch.ones((), dtype=x.dtype)}
    yield "weight 1-d", {"weight": torch.ones(rows, dtype=x.dtype)}
    yield from counting(case, rows)
    if "inhibition" in case.arguments:
        yield "inhibition", {"inhibition": "divide"}
    if "networks" in case.arguments:
        for wrong in (0, -1, rows + 1):
            yield f"networks={wrong}", {"networks": wrong}
    if case["gaba"] is not None:
        yield "gaba longer", {"gaba": torch.ones(rows + 1, dtype=x.dtype)}
        yield "gaba on meta", {"gaba": torch.ones(rows, dtype=x.dtype, device="meta")}


def layer_gradients(
    case: Case, slope: Tensor, magnitude: Tensor, error: Tensor, terms: int
) -> dict[str, Bounds]:
    """Of x, weight and bias where scores [S B, R] have these gradients, known up to `error`."""
    networks = case["networks"] or 1
    slope, magnitude, error = (reference.by_network(t, networks) for t in (slope, magnitude, error))
    features = case["x"].shape[-1]
    rows = slope.shape[0] * slope.shape[1]
    x = reference.by_network(case["x"].reshape(rows, features), networks)
    weight = reference.by_network(case["weight"], networks)

    def product(left: list[Tensor], right: Tensor, terms: int, grain: float) -> Bounds:
        exact, size = left[0] @ right.double(), left[1] @ finite(right)
        bound = rounding(size, terms, case.dtype, grain) + left[2] @ finite(right)
        return Bounds.around(exact, bound)

    backward = [slope.mT, magnitude.mT, error.mT]
    ones = torch.ones(networks, slope.shape[1], 1)
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


class LinearInhibit(Drawn):
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
        case.ask("x", "weight", "bias", *learned, doubt=truth.ranking.doubtful())
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
            own = case["gaba"].double().view(truth.networks, truth.neurons)
            rows = len(truth.first) // truth.networks
            truth.response = own.repeat_interleave(rows, dim=0)
        truth.excess = excess = truth.surplus(truth.activation, truth.response)
        certain = ~excess.free & ~truth.bounds.free
        mask = case["inhibition"] == "mask"
        # What is not a number fires, so that it is seen; under "mask" that is a NaN activation.
        nan = excess.lower.isnan()
        seen = truth.activation.lower.isnan() if mask else nan
        truth.fires = certain & ((excess.lower > 0) | seen)
        truth.silent = certain & ((excess.upper <= 0) | (nan & ~seen))
        truth.least = truth.activation.lower if mask else excess.lower  # of what fires
        truth.sure = (truth.fires | truth.silent) & (
            (truth.bounds.lower > 0) | (truth.bounds.upper <= 0)
        )

    def shapes(self, case: Case) -> Shapes:
        return {"out": ((*case["x"].shape[:-1], case.truth.neurons), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth = case.truth
        hidden = got["out"].reshape(truth.bounds.lower.shape)
        yield from self.dense(case, hidden)
        if case["counts"] is not None:
            active = (reference.by_network(hidden, truth.networks) > 0).sum(1).flatten()
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
        # What rounds to 0 is inactive.
        active = got["out"].reshape(gradient.shape) > 0
        slope = torch.where(active & (truth.bounds.lower > 0), gradient, 0.0)
        bounds = layer_gradients(case, slope, finite(slope), torch.zeros_like(slope), truth.neurons)
        if "gaba" in case.wants:
            slope = torch.where(active, gradient, 0.0)
            cut = truth.cut.lower.unsqueeze(1)
            doubt = (truth.cut.upper.unsqueeze(1) - cut) * finite(slope)
            own = [
                reference.by_network(t, truth.networks).sum(1).flatten()
                for t in (-slope * cut, finite(slope) * cut.abs(), doubt)
            ]
            grain = case.upstream_grain * truth.grain
            terms = len(slope) // truth.networks
            error = rounding(own[1] + own[2], terms, truth.accumulate, grain) + own[2]
            bounds["gaba"] = Bounds.around(own[0], error)
        return bounds

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)


class LinearActive(Drawn):
    def draw(self, d: Draw) -> Case:
        case = layer(d, flat=True)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        case.arguments["every"] = d.chance(0.4)
        neurons = len(case["weight"])
        if d.chance(0.75):
            low = d.pick([-1.0, 0.0, 0.125, 0.125])
            case.add("gaba", d.positive((neurons,), case.dtype, low))
        if d.chance(0.4):
            case.counters(neurons, "counts")
        case.truth = Scores(case)
        LinearInhibit.decide(case)
        return case

    def shapes(self, case: Case) -> Shapes:
        return {}  # known to `judge`, as n is

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth, values, gate = case.truth, got["values"], got["gate"]
        neurons = got.get("neurons")
        if neurons is None:
            neurons = torch.arange(truth.neurons)
        elif case["every"] or case["networks"] > 1:
            yield "not every neuron"
        elif not (~(values <= 0)).any(0).all():
            yield "a neuron that does not fire"
        if neurons.dtype != torch.int64 or values.dtype != case.dtype:
            yield f"dtypes {values.dtype}, {neurons.dtype}"
        if neurons.dim() != 1 or not values.shape == gate.shape == (len(case["x"]), len(neurons)):
            yield f"values {list(values.shape)} for neurons {list(neurons.shape)}"
            return
        inside = (neurons >= 0) & (neurons < truth.neurons)
        if not inside.all() or not (neurons.diff() > 0).all():
            yield "neurons out of range or not ascending"
            return
        hidden = torch.zeros(truth.bounds.lower.shape, dtype=case.dtype)
        passes = torch.zeros(hidden.shape, dtype=torch.bool)
        hidden[:, neurons], passes[:, neurons] = values, gate > 0
        yield from LinearInhibit.dense(case, hidden)
        expected = (hidden > 0) & (truth.bounds.lower > 0)
        if ((passes != expected) & truth.sure & ~hidden.isnan()).any():
            yield "the gradient passes where it must not, or is stopped where it passes"
        if case["counts"] is not None:
            active = (reference.by_network(hidden, truth.networks) > 0).sum(1).flatten()
            yield from same("counts", after["counts"], case["counts"] + active)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from layer_faults(case)
        yield "x 3-d", {"x": case["x"].unsqueeze(0)}


class LinearCode(Drawn):
    def draw(self, d: Draw) -> Case:
        case = layer(d, flat=True, sign=True)
        case.arguments["inhibition"] = d.pick(["mask", "subtract"])
        neurons, k = len(case["weight"]) // case["networks"], case["k"]
        case.arguments["width"] = d.pick([k, min(neurons, 2 * k), d.upto(k, neurons), neurons])
        if d.chance(0.75):
            case.add("gaba", d.positive((len(case["weight"]),), case.dtype, 0.125))
        positive = all(bool((case[name] >= 0).all()) for name in ("x", "weight"))
        if positive and case["networks"] == 1 and case.dtype == torch.float32:
            case.arguments["shadow"] = d.pick([None, torch.float32, torch.bfloat16])
        case.truth = Scores(case)
        LinearInhibit.decide(case)
        return case

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        """With a shadow also the result without, which has the same bits but where numba serves."""
        arguments = dict(arguments)
        dtype = arguments.pop("shadow", None)
        shadow = None if dtype is None else Shadow(arguments["weight"], dtype)
        code, wider = self.function(**arguments, shadow=shadow, impl=impl)
        outputs = {**named(code), "wider": wider}
        if shadow is not None:
            plain = code
            if impl != "numba":
                plain, wider = self.function(**arguments, impl=impl)
            outputs |= {f"plain {name}": t for name, t in named(plain).items()}
            outputs["plain wider"] = wider
        return outputs

    def shapes(self, case: Case) -> Shapes:
        shape = len(case["x"]), case["width"]
        shapes: Shapes = {
            "values": (shape, case.dtype),
            "indices": (shape, torch.int64),
            "wider": (shape[:1], torch.bool),
        }
        if case["shadow"] is not None:
            shapes |= {f"plain {name}": of for name, of in shapes.items()}
        return shapes

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        truth, width, wider = case.truth, case["width"], got["wider"]
        values, indices = got["values"], got["indices"] - truth.first
        if not ((indices >= 0) & (indices < truth.neurons)).all():
            yield "indices out of range"
            return
        yield from descending(values)
        fires = ~(values <= 0)
        hidden = torch.zeros(truth.bounds.lower.shape, dtype=case.dtype)
        if (hidden.long().scatter_add(1, indices, fires.long()) > 1).any():
            yield "a neuron twice in a row"
        hidden.scatter_add_(1, indices, torch.where(fires, values, 0.0))
        # Of a row that is not finite the code promises no more than that either.
        strange = truth.fires & ~truth.least.to(case.dtype).isfinite()
        if (strange.any(1) & values.isfinite().all(1)).any():
            yield "the code is finite, the layer's output is not"
        finite_rows = ~(strange | truth.excess.free).any(1)
        surely = (truth.fires & (truth.least > torch.finfo(case.dtype).tiny)).sum(1) > width
        perhaps = (~truth.silent).sum(1) > width
        if (((surely & ~wider) | (wider & ~perhaps)) & finite_rows).any():
            yield f"wider is {wider.tolist()}, expected {surely.tolist()}"
        kept = ~wider & finite_rows
        yield from LinearInhibit.dense(case, hidden, kept)
        if case["shadow"] is not None:
            yield from same("values", values, got["plain values"])
            plain = got["plain indices"] - truth.first
            yield from same("indices", indices * fires, plain * fires)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        for label, changed in layer_faults(case):
            if "weight" not in changed or case["shadow"] is None:
                yield label, changed
        yield "x 3-d", {"x": case["x"].unsqueeze(0)}
        for width in (case["k"] - 1, len(case["weight"]) // case["networks"] + 1):
            yield f"width={width}", {"width": width}
