"""What the tests that all ops share need to know of an op: a file an op, which defines OP.

A file's name is the op's. tests/kernels/test_ops.py says which cases an op must have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _tuning
from tests.kernels.property_cases import Drawn

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Results = tuple[Tensor | None, ...]
Run = Callable[[str | None], Results]  # of an implementation
Arguments = dict[str, Any]
Bad = tuple[Arguments, type[Exception], str]  # what is wrong, and the error that it raises


class Draw:
    """Draws the inputs of a call in one dtype on one device, the same after the same seed.

    Args:
        wide: the inputs are rounded to dtype but given in float64, for the reference.
        sizes: in place of B, D, R, K, C. These are odd: no row is a whole number of tiles.
    """

    S = 2  # networks
    MANY, UNALIGNED = 130, 23  # a batch that takes large tiles; rows of no whole 16 bytes

    def __init__(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = FP32,
        wide: bool = False,
        **sizes: int,
    ) -> None:
        self.device, self.dtype, self.wide = torch.device(device), dtype, wide
        known = {"B": 5, "D": 24, "R": 517, "K": 7, "C": 13} | sizes
        self.B, self.D, self.R, self.K, self.C = (known[name] for name in "BDRKC")
        self.leaves: list[Tensor] = []

    def __call__(self, *sizes: int) -> Tensor:
        """Normal numbers."""
        drawn = torch.randn(*sizes, device="cpu").to(self.dtype)
        return (drawn.double() if self.wide else drawn).to(self.device)

    def leaf(self, *sizes: int) -> Tensor:
        """The same, to be differentiated."""
        self.leaves.append(self(*sizes).requires_grad_())
        return self.leaves[-1]

    def layer(self, networks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """x [S B, D], weight [S R, D] and bias [S R], to be differentiated."""
        rows, neurons = networks * self.B, networks * self.R
        return self.leaf(rows, self.D), self.leaf(neurons, self.D), self.leaf(neurons)

    def code(self, networks: int = 1) -> tuple[Tensor, Tensor]:
        """values [S B, K] and indices; the first two samples have the same neurons."""
        values, indices = self(networks * self.B, self.K), []
        generator = torch.Generator(device="cpu").manual_seed(2)
        for network in range(networks):
            orders = [
                torch.randperm(self.R, generator=generator, device="cpu") for _ in range(self.B)
            ]
            own = torch.stack(orders)[:, : self.K]
            own[1] = own[0]
            indices.append(own + network * self.R)
        return values, torch.cat(indices).to(self.device)

    def ramp(self, low: float, networks: int = 1) -> Tensor:
        """[S R]: from low to 1 over each network, exact in every dtype."""
        steps = torch.linspace(low, 1, self.R, device="cpu").bfloat16().repeat(networks)
        return steps.to(self.device, FP64 if self.wide else self.dtype)

    def labels(self, rows: int | None = None) -> Tensor:
        return self.range(self.B if rows is None else rows) % self.C

    def range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)

    def counts(self, neurons: int | None = None) -> Tensor:
        size = self.R if neurons is None else neurons
        return torch.zeros(size, dtype=torch.int64, device=self.device)


class Call(NamedTuple):
    """A call with every implementation.

    prepare: draws the inputs; the run that it returns leaves them as they are.
    half: whether 16-bit inputs are tried. traced: whether torch.compile is.
    """

    prepare: Callable[[Draw], Run]
    half: bool = True
    traced: bool = True


class Pin(NamedTuple):
    """How many launches and allocations a run takes on sm_90; see test_launches.py."""

    prepare: Callable[[], Callable[[], Any]]  # what it does itself is not counted
    launches: str  # in order
    allocations: int


@dataclass(frozen=True)
class Op:
    """An op's cases, by what is particular about each.

    Args:
        function: the op.
        calls: run by every implementation, and compiled (test_library.py, test_citizens.py,
            scripts/smoke.py).
        good, bad: arguments, and what to replace in them for an error (test_checks.py).
        drawn: random calls (properties.py).
        launch: the op on meta tensors of a dtype and sizes; compiled: its arguments, whose
            launches are compiled ahead of time (launches.py).
        checked: compares the kernels with the reference under the race checker, whose tiles are
            those of _tuning but short (test_checker.py).
        pins: see test_launches.py.
    """

    function: Callable[..., Any]
    calls: dict[str, Call]
    good: Callable[[], Arguments] | None = None
    bad: Sequence[Bad] = ()
    drawn: Drawn | None = None
    launch: Callable[..., None] | None = None
    compiled: Sequence[tuple[torch.dtype, dict[str, Any]]] = ()
    checked: dict[str, Callable[[], None]] = field(default_factory=dict)
    tiles: dict[str, _tuning.Rows] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)


def grid(*dtypes: torch.dtype, **given: Any) -> list[tuple[torch.dtype, dict[str, Any]]]:
    """A line of Op.compiled for each dtype."""
    return [(dtype, given) for dtype in dtypes]


def tile(**chosen: int) -> _tuning.Rows:
    """One row for all shapes."""
    return (({}, chosen),)
