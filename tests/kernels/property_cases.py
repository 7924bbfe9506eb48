"""A case of the property tests: one call, what is known of it, and what an op has to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _dispatch
from tests.kernels.property_bounds import Bounds
from tests.kernels.property_draws import Draw, Numbers

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
    open: bool = False  # the contract leaves the numbers open
    fault: str | None = None  # why the call must be refused
    truth: Any = None  # of the op's own

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

    def ask(self, *names: str, doubt: bool = False) -> None:
        """Gradients of some of these; of none where the contract leaves them open."""
        self.grad = self.draw.chance(0.85)
        present = [name for name in names if self[name] is not None]
        wants = self.draw.some(present)
        if not doubt and all(bool(self[name].isfinite().all()) for name in present):
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


class Drawn:
    """Random calls of an op: what to draw, how to call it, what is right."""

    table = ""  # the op whose implementations serve it, if not itself
    prefixes: tuple[str, ...] = ()  # of its errors, beside its name

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__

    def draw(self, d: Draw) -> Case:
        raise NotImplementedError

    def implementations(self) -> list[str]:
        return list(_dispatch.TABLES[self.table or self.name])

    def call(self, arguments: Arguments, impl: str) -> Outputs:
        out = self.function(**arguments, impl=impl)
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
            yield f"{name} of another dtype", {name: tensor.to(other(tensor.dtype))}
            yield f"{name} on meta", {name: tensor.to("meta")}
            yield (
                f"{name} longer",
                {name: torch.ones(*tensor.shape[:-1], tensor.shape[-1] + 1).to(tensor)},
            )


def other(dtype: torch.dtype) -> torch.dtype:
    return torch.float16 if dtype != torch.float16 else torch.float32


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


def mislabelled(case: Case, name: str, classes: int) -> Iterator[tuple[str, Arguments]]:
    labels = case[name]
    if len(labels):
        for wrong in (-1, -100, classes):
            changed = labels.clone()
            changed[case.draw.upto(0, len(labels) - 1)] = wrong
            yield f"label {wrong}", {name: changed}
