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
Prepare = Callable[[], Callable[[], Any]]
Arguments = dict[str, Any]
Bad = tuple[Arguments, type[Exception], str]  # what is wrong, and the error that it raises

# Batch, inputs, neurons, slots, outputs, units of a hidden target, networks. These are odd: no row
# is a whole number of tiles.
SIZES = {"B": 5, "D": 24, "R": 517, "K": 7, "C": 13, "N": 7, "S": 1}
TINY = {"B": 6, "D": 8, "R": 17, "K": 3, "C": 5, "N": 3}
MANY, UNALIGNED = 130, 23  # a batch that takes large tiles; rows of no whole 16 bytes
TAIL = 3  # columns of a wider matrix that an op is not handed


class Draw:
    """Draws the inputs of a call in one dtype on one device, the same after the same seed.

    Args:
        wide: the inputs are rounded to dtype but given in float64, for the reference.
        whole: integers, so that sums are exact and ties many; parts of wider tensors.
        sizes: in place of SIZES.
    """

    B: int
    D: int
    R: int
    K: int
    C: int
    N: int
    S: int

    def __init__(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = FP32,
        *,
        wide: bool = False,
        whole: bool = False,
        **sizes: int,
    ) -> None:
        self.device, self.dtype, self.wide, self.whole = torch.device(device), dtype, wide, whole
        vars(self).update(SIZES | sizes)
        self.learned: Sequence[str] | None = None  # names of leaves; None: all
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int) -> Tensor:
        """Normal numbers; where `whole`, -2..2."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        if not self.whole:
            return self.put(torch.randn(shape, device="cpu"))
        wider = torch.randint(-2, 3, (*shape[:-1], shape[-1] + TAIL), device="cpu")
        return self.put(wider)[..., : shape[-1]]

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor in the dtype and on the device of the draw."""
        rounded = tensor.to(self.dtype)
        return (rounded.double() if self.wide else rounded).to(self.device)

    def leaf(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, to be differentiated if it is learned."""
        if self.learned is None or name in self.learned:
            self.leaves.append(tensor.requires_grad_())
        return tensor

    def layer(self, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """x [S B, D], weight [S R, D] and bias [S R]."""
        rows, neurons = self.S * self.B, self.S * self.R
        shift = self.leaf("bias", self(neurons)) if bias else None
        x, weight = self(rows, self.D), self(neurons, self.D)
        return self.leaf("x", x), self.leaf("weight", weight), shift

    def code(self) -> tuple[Tensor, Tensor]:
        """values [S B, K] and indices; the first two samples of a network have the same neurons.

        Where `whole`, values are 0..2, and a first slot of value 0 has the neuron of the last.
        """
        rows = self.S * self.B
        if self.device.type == "meta":
            return self(rows, self.K), self.range(rows * self.K).view(rows, self.K)
        orders = [torch.randperm(self.R, device="cpu")[: self.K] for _ in range(rows)]
        indices = torch.stack(orders)
        if self.whole:
            values = self.put(torch.randint(3, (rows, self.K), device="cpu"))
            idle = values[:, 0] == 0
            indices[idle, 0] = indices[idle, -1]
        else:
            values = self(rows, self.K)
            indices[1 :: self.B] = indices[:: self.B]
        first = torch.arange(rows, device="cpu") // self.B * self.R
        return values, (indices + first.unsqueeze(1)).to(self.device)

    def response(self, low: float) -> Tensor:
        """[S R]: from low to 1 over each network; where `whole`, quarters. Exact in every dtype."""
        if self.whole:
            return self.put(torch.randint(1, 5, (self.S * self.R,), device="cpu") / 4)
        return self.put(torch.linspace(low, 1, self.R, device="cpu").bfloat16().repeat(self.S))

    def settings(self, each: bool) -> Arguments:
        """Of distill; each: one value, and one weight, per sample."""
        if not each:
            return {"alpha": 0.5, "lam": 0.5, "temperature": 2.0, "hidden_weight": 1.5}
        alpha, lam, weight = (self(self.B).abs() for _ in range(3))
        settings = {"alpha": alpha, "lam": lam, "temperature": lam + 1, "weight": weight}
        return settings | {"hidden_weight": lam + 0.5}

    def per_network(self, value: float | None) -> Any:
        """The value; where there are several networks, another one for each."""
        if self.S == 1 or value is None:
            return value
        values = torch.linspace(value, 2 * value, self.S, device="cpu")
        return values.to(self.device, FP64 if self.wide else FP32)

    def labels(self, rows: int | None = None) -> Tensor:
        return self.range(self.B if rows is None else rows) % self.C

    def range(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device)

    def counts(self, size: int) -> Tensor:
        """Ones; where `whole`, every second entry of a longer tensor."""
        step = 2 if self.whole else 1
        return torch.ones(step * size, dtype=torch.int64, device=self.device)[::step]

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the same strides to write into; without data the tensor itself."""
        if tensor.is_meta:
            return tensor
        strides = tensor.stride()
        return torch.empty_strided(
            tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)


class Check(NamedTuple):
    """A call under the race checker, compared with the reference.

    tolerance: relative, to the reference in fp64; 0: equal bits, of whole numbers.
    """

    given: Arguments
    dtype: torch.dtype
    tolerance: float
    impl: str


class Pin(NamedTuple):
    """How many launches and allocations a call takes on sm_90; see test_launches.py."""

    launches: str  # in order
    allocations: int
    given: Arguments | Prepare  # Prepare: what it does itself is not counted
    dtype: torch.dtype
    backward: Sequence[int]  # the outputs whose backward is counted
    forward: bool  # whether the forward is, too


@dataclass(frozen=True)
class Op:
    """An op's cases, by what is particular about each.

    Args:
        function: the op.
        call: draws the inputs of a call; the run that it returns leaves them as they are.
        calls: sizes and options of `call`; run by every implementation, and compiled
            (test_library.py, test_citizens.py, scripts/smoke.py).
        half: whether 16-bit inputs are tried. untraced: calls that torch.compile is not tried on.
        good, bad: arguments, and what to replace in them for an error (test_checks.py).
        drawn: random calls (properties.py).
        implied: sizes that compiled and pins leave out, if not 0.
        compiled: calls on tensors without data, whose launches are compiled ahead of time
            (launches.py).
        checked: calls under the race checker, whose tiles are those of _tuning but short
            (test_checker.py).
        pins: see test_launches.py.
    """

    function: Callable[..., Any]
    call: Callable[..., Run]
    calls: dict[str, Arguments]
    half: bool = False
    untraced: Sequence[str] = ()
    good: Callable[[], Arguments] | None = None
    bad: Sequence[Bad] = ()
    drawn: Drawn | None = None
    implied: dict[str, int] = field(default_factory=dict)
    compiled: Sequence[tuple[torch.dtype, Arguments]] = ()
    checked: dict[str, Check | Callable[[], None]] = field(default_factory=dict)
    tiles: dict[str, _tuning.Rows] = field(default_factory=dict)
    pins: dict[str, Pin] = field(default_factory=dict)

    def prepare(self, draw: Draw, given: Arguments) -> Run:
        """A call of these sizes and options. learned: names of leaves; not grad: none."""
        options = {name: value for name, value in given.items() if name.upper() not in SIZES}
        vars(draw).update({n.upper(): size for n, size in given.items() if n.upper() in SIZES})
        draw.learned = options.pop("learned", None) if options.pop("grad", True) else ()
        return self.call(draw, **options)

    def without_data(self, dtype: torch.dtype, given: Arguments) -> tuple[Draw, Run]:
        """A call whose launches are recorded or counted."""
        sizes = dict.fromkeys("CNR", 0) | self.implied
        draw = Draw("meta", dtype, **sizes)
        return draw, self.prepare(draw, given)


def gradients(outputs: Results, leaves: Sequence[Tensor]) -> Results:
    """Of the leaves; slopes are -2..2, so that sums of whole numbers stay exact."""
    reached = [out for out in outputs if out is not None and out.requires_grad]
    slopes = [(torch.arange(o.numel(), device=o.device) % 5 - 2).view_as(o).to(o) for o in reached]
    return torch.autograd.grad(reached, leaves, slopes) if reached else ()


def check(
    dtype: torch.dtype = FP32, tolerance: float = 0.0, impl: str = "triton", **given: Any
) -> Check:
    return Check(given, dtype, tolerance, impl)


def pin(
    launches: str,
    allocations: int,
    prepare: Prepare | None = None,
    dtype: torch.dtype = FP32,
    backward: Sequence[int] = (),
    forward: bool = True,
    **given: Any,
) -> Pin:
    return Pin(launches, allocations, prepare or given, dtype, backward, forward)


# Sizes and launches of pins; LARGE has too many slots to rank.
SMALL = {"B": 128, "D": 256, "R": 10_000, "K": 10}
LARGE = {"B": 8192, "D": 256, "R": 65_536, "K": 64}
RANKED, SORTED = "_rank_kernel", "_to_copy sort _offsets_kernel"  # _to_copy: to keys of fewer bits


def grid(*dtypes: torch.dtype, **given: Any) -> list[tuple[torch.dtype, Arguments]]:
    """A line of Op.compiled for each dtype."""
    return [(dtype, given) for dtype in dtypes]


def tile(**chosen: int) -> _tuning.Rows:
    """One row for all shapes."""
    return (({}, chosen),)
