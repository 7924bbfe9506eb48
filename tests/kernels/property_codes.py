"""What is drawn and what is right for the ops that take a sparse code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.ops.reference import code_gram
from ssd_kernels import reference
from tests.kernels.property_bounds import Bounds, finite, rounding
from tests.kernels.property_cases import (
    STRANGE,
    Arguments,
    Case,
    Drawn,
    Outputs,
    Shapes,
    codes,
    counting,
    floats,
    mislabelled,
    off,
    other,
    same,
)
from tests.kernels.property_draws import STYLES, Draw, Numbers


def code(
    d: Draw, style: list[str], flat: bool, distinct: float, most: int = 2**20
) -> tuple[Case, int]:
    """values and indices of a code, and the number of its neurons."""
    d.style = d.pick(style)
    case = Case(d, d.dtype())
    batch = (d.samples(),) if flat else d.batch()
    neurons = min(d.neurons(), most)
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
    """row_gradient within its rounding."""
    exact = reference.row_gradient(coefficients.double(), inputs.double(), indices, neurons)
    size = reference.row_gradient(finite(coefficients), finite(inputs), indices, neurons)
    terms = torch.bincount(indices.flatten(), minlength=neurons).unsqueeze(1)
    bounds = Bounds.around(exact, rounding(size, terms, dtype, grain))
    # A coefficient of 0 may or may not multiply an infinite input.
    zero, infinite = (coefficients == 0).double(), (~inputs.isfinite()).double()
    unclear = reference.row_gradient(zero, infinite, indices, neurons) > 0
    return bounds._replace(free=bounds.free | unclear)


class SparseLinear(Drawn):
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


class RowGradient(Drawn):
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
            case["coefficients"],
            case["inputs"],
            case["indices"],
            case["neurons"],
            case.dtype,
            grain,
        )
        yield from off("out", got["out"], bounds)

    def faults(self, case: Case) -> Iterator[tuple[str, Arguments]]:
        yield from ()  # it is private, and its callers have checked


class CountActive(Drawn):
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


class CodeGram(Drawn):
    def draw(self, d: Draw) -> Case:
        case, neurons = code(d, [*STYLES, *STRANGE], flat=True, distinct=1.0, most=600)
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
            code_gram(convert(values), indices, *out, own)
        grains = {"gram": ("values", "values"), "cross": ("values", "targets")}
        for number, name in enumerate(case.in_place):
            # Entries are converted to the dtype of the sums: a rounding each.
            grain = min(case.grain(*grains[name]), case.grain(name))
            error = rounding(size[number], len(values) + 3, case.dtype, grain)
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


class RowUpdate(Drawn):
    def draw(self, d: Draw) -> Case:
        usual = [style for style in STYLES if style not in ("wide", "mixed", "subnormal")]
        case, neurons = code(d, [*usual, *STRANGE], flat=True, distinct=0.5)
        del case.arguments["values"]
        indices = case["indices"]
        shared = [n for n in (1, 1, 1, 2, 3) if neurons % n == 0 == len(indices) % n]
        networks = d.pick(shared)
        if networks > 1 and len(indices):  # samples follow one another as their networks do
            network = torch.arange(len(indices)).unsqueeze(1) // (len(indices) // networks)
            own = neurons // networks
            indices = case.arguments["indices"] = indices % own + own * network
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
            "lr": self.setting(d, networks, case.dtype, 0.01, 1.0),
            "max_norm": self.setting(d, networks, case.dtype, 0.1, 10.0) if d.chance(0.6) else None,
            "nonnegative": d.chance(0.5),
            "normalize": [d.chance(0.5) for _ in range(count)] if d.chance(0.6) else None,
            "momentum": momentum,
            "networks": networks,
        }
        return case

    @staticmethod
    def setting(d: Draw, networks: int, dtype: torch.dtype, low: float, high: float) -> Any:
        if networks > 1 and d.chance(0.5):
            return torch.from_numpy(d.rng.uniform(low, high, networks)).to(dtype)
        return round(float(d.rng.uniform(low, high)), 3)

    def shapes(self, case: Case) -> Shapes:
        networks = case["networks"]
        return {"out": ((networks,) if networks > 1 else (), case.dtype)}

    def judge(self, case: Case, got: Outputs, after: Arguments) -> Iterator[str]:
        indices, dtype, networks = case["indices"], case.dtype, case["networks"]
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
        norm, doubt = (t.view(networks, -1).sum(1).sqrt() for t in (squares, doubts))
        terms = sum(g.shape[1] for g, _ in gradients) + neurons + 8
        doubt = doubt + terms * unit * norm + tiny**0.5
        yield from off("norm", got["out"].reshape(networks), Bounds.around(norm, doubt))
        scale, scale_doubt = torch.ones_like(norm), torch.zeros_like(norm)
        limit = case["max_norm"]
        if limit is not None:
            least, most = (
                reference.clip_scale((norm + sign * doubt).clamp(min=0), limit) for sign in (1, -1)
            )
            scale, scale_doubt = (least + most) / 2, (most - least) / 2 + 8 * unit * most
        rate = torch.as_tensor(case["lr"], dtype=torch.float64).expand(networks)
        block = torch.arange(neurons) // (neurons // networks)
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
        yield from codes(case, neurons)
        yield "no weights", {"weights": []}
        yield "one more inputs", {"inputs": [*inputs, inputs[0]]}
        yield "one more coefficients", {"coefficients": [*coefficients, coefficients[0]]}
        yield "weights longer", {"weights": [F.pad(weights[0], (0, 1)), *weights[1:]]}
        yield "weights 1-d", {"weights": [weights[0].new_ones(neurons), *weights[1:]]}
        yield "weights int64", {"weights": [weights[0].isnan().long(), *weights[1:]]}
        yield "inputs of another dtype", {"inputs": [inputs[0].to(other(case.dtype)), *inputs[1:]]}
        yield "inputs on meta", {"inputs": [inputs[0].to("meta"), *inputs[1:]]}
        yield "momentum without buffers", {"momentum": 0.5, "buffers": None}
        for wrong in (0, -1, neurons + 1):
            yield f"networks={wrong}", {"networks": wrong}
        yield "lr of more networks", {"lr": torch.ones(case["networks"] + 1, dtype=case.dtype)}
        if case["normalize"] is not None:
            yield "normalize longer", {"normalize": [*case["normalize"], True]}
