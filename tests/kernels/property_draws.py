"""Random tensors of every kind that a caller may hand over, all from (seed, number)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ssd_kernels._cpu_groups import GROUP
from ssd_kernels.topk import MAX_K

T = TypeVar("T")
# What the entries are. "integers" and "scaled" (times powers of two) have exact sums and real ties,
# and so has "special", which strews infinities and NaN among integers, "infinite" without NaN.
STYLES = [
    *["normal"] * 4,
    *["integers"] * 4,
    *["scaled"] * 2,
    *["wide"] * 2,
    "mixed",
    "palette",
    "equal",
    "zeros",
    "subnormal",
]
EXACT = ("integers", "scaled", "zeros", "special", "infinite")
# The largest power of ten of a factor, and of two of an exact one, by dtype.
TENS = {torch.float16: 3, torch.bfloat16: 30, torch.float32: 30, torch.float64: 300}
TWOS = {torch.float16: 4, torch.bfloat16: 55, torch.float32: 55, torch.float64: 480}
EDGES = [GROUP, 16, 32, 64, 100, 128, MAX_K, 300, 512, 1000, 2048, 4096]
BATCHES = [(), (0,), (1,), (2,), (3,), (5,), (17,), (2, 3), (1, 1), (3, 0), (2, 1, 2), (33,)]


class Numbers(NamedTuple):
    tensor: Tensor
    grain: float  # every finite entry is a multiple of it; 0: of nothing known


class Draw:
    """The choices of one case.

    Args:
        seed, number: which case.
        small: shapes for Triton's interpreter, which has no bfloat16 either.
    """

    def __init__(self, seed: int, number: int, small: bool = False) -> None:
        self.rng = np.random.default_rng([seed, number])
        self.small = small
        self.style = "normal"
        self._twos: int | None = None

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def upto(self, low: int, high: int) -> int:
        """low..high, each as likely."""
        return int(self.rng.integers(low, high + 1))

    def some(self, names: Sequence[str], probability: float = 0.6) -> tuple[str, ...]:
        return tuple(name for name in names if self.chance(probability))

    def dtype(self) -> torch.dtype:
        single = [torch.float32] * 3 + [torch.float16, torch.float64]
        return self.pick(single if self.small else [*single, torch.float64, torch.bfloat16])

    def neurons(self) -> int:
        """R: small, or about a threshold of the code."""
        if self.chance(0.5):
            return self.upto(1, 12)
        edge = self.pick(EDGES[:3] if self.small and self.chance(0.8) else EDGES)
        return max(1, edge + self.upto(-1, 1)) if self.chance(0.7) else self.upto(1, edge)

    def k(self, neurons: int) -> int:
        likely = [1, 2, neurons, neurons - 1, neurons // 2, self.upto(1, neurons)]
        k = min(max(1, self.pick([*likely, MAX_K + self.upto(-2, 1), 5])), neurons)
        return min(k, 20) if self.small and self.chance(0.9) else k

    def features(self) -> int:
        """d or C."""
        if self.chance(0.1):
            return self.upto(0, 1)
        return self.upto(2, 9) if self.chance(0.6) else self.upto(10, 20 if self.small else 70)

    def batch(self, multiple: int = 1) -> tuple[int, ...]:
        """The leading dimensions of x; their product can be shared out among networks."""
        if multiple > 1:
            rows = self.upto(0, 4)
            return self.pick([(multiple * rows,), (multiple, rows), (rows, multiple)])
        shape = self.pick(BATCHES)
        return self.pick([(2,), (3,), (2, 2)]) if self.small and math.prod(shape) > 6 else shape

    def samples(self) -> int:
        """B."""
        return self.pick([0, 1, 2, 3, 5, 7] if self.small else [0, 1, 2, 3, 5, 7, 16, 33, 65])

    def numbers(
        self, shape: tuple[int, ...], dtype: torch.dtype, power: int = 1, style: str | None = None
    ) -> Numbers:
        """Entries of this case's style; `power` factors make up its scale, as 2 do for a bias."""
        style = style or self.style
        integers = self.rng.integers(-3, 4, shape).astype(np.float64)
        entries = self.rng.standard_normal(shape)
        grain = 1.0 if style in EXACT else 0.0
        if style in ("integers", "special", "infinite"):
            entries = integers
            if style != "integers":
                other = [np.inf, -np.inf, *([np.nan] if style == "special" else [])]
                hit = self.rng.random(shape) < self.pick([0.02, 0.2])
                entries = np.where(hit, self.rng.choice(other, shape), entries)
        elif style == "scaled":
            grain = 2.0 ** (power * self._exponent(dtype))
            entries = integers * grain
        elif style == "wide":
            entries *= 10.0 ** self.rng.uniform(-TENS[dtype], TENS[dtype])
        elif style == "mixed":
            entries *= 10.0 ** self.rng.uniform(-TENS[dtype] / 2, TENS[dtype] / 2, shape)
        elif style == "palette":
            entries = self.rng.choice(self.rng.standard_normal(3), shape)
        elif style == "equal":
            entries = np.full(shape, self.rng.standard_normal())
        elif style == "zeros":
            entries = np.where(self.rng.random(shape) < 0.5, 0.0, -0.0)
        elif style == "subnormal":
            entries *= torch.finfo(dtype).tiny / 8
        return Numbers(torch.from_numpy(np.asarray(entries)).to(dtype), grain)

    def _exponent(self, dtype: torch.dtype) -> int:
        """One for the whole case, so that what is added has one grain."""
        if self._twos is None:
            self._twos = self.upto(-TWOS[dtype], TWOS[dtype] - 1)
        return self._twos

    def positive(self, shape: tuple[int, ...], dtype: torch.dtype, low: float = 0.0) -> Tensor:
        """Multiples of 1/8 in [low, 1], 1 now and then everywhere."""
        steps = self.rng.integers(round(low * 8), 9, shape) / 8
        return torch.from_numpy(np.asarray(steps if self.chance(0.8) else np.ones(shape))).to(dtype)

    def indices(self, batch: tuple[int, ...], slots: int, neurons: int, distinct: bool) -> Tensor:
        rows = math.prod(batch)
        if distinct:
            ranked = self.rng.random((rows, neurons)).argsort(1)[:, :slots]
        else:
            ranked = self.rng.integers(0, neurons, (rows, slots))
        return torch.from_numpy(ranked.astype(np.int64)).reshape(*batch, slots)

    def strided(self, tensor: Tensor, expand: bool = True) -> Tensor:
        """The same entries with other strides, among memory that is not to be read or written.

        An expanded tensor repeats its first row.
        """
        ways = ["contiguous"] * 4 + ["offset", "step", "rows", "transposed"]
        if expand and tensor.dim() and tensor.shape[0] > 1 and self.style != "zeros":
            ways.append("expanded")
        way = self.pick(ways if tensor.dim() else ["contiguous", "offset"])
        sizes = list(tensor.shape)
        if way == "expanded":
            out = tensor[:1].clone().expand_as(tensor)
        elif way == "offset":
            out = _poison(tensor, (tensor.numel() + 5,))[3 : 3 + tensor.numel()].view(sizes)
        elif way == "step":
            sizes[-1] = 2 * sizes[-1] + 1
            out = _poison(tensor, tuple(sizes))[..., 1::2]
        elif way == "rows":
            sizes[0] = 2 * sizes[0] + 1
            out = _poison(tensor, tuple(sizes))[1::2]
        elif way == "transposed":
            out = _poison(tensor, tuple(reversed(sizes))).permute(*range(len(sizes))[::-1])
        else:
            out = tensor.clone()
        if way not in ("expanded", "contiguous"):
            out.copy_(tensor)
        return out


def _poison(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory whose entries would be seen in any result."""
    if tensor.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    full: Any = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2
    return torch.full(shape, full, dtype=tensor.dtype)


def twin(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides, offset and surrounding memory."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    copy = whole.detach().clone().to(device)
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def memory(tensor: Tensor) -> Tensor:
    """All bytes of the storage."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
