"""Launches of linear_topk, and of linear_code under graded inhibition.

They store no score. A product keeps the two largest keys of each group of neurons
(_keys_kernel); then a program for each row (_code_kernel) bisects the groups' largest keys for M, a
lower bound of the row's (k+1)-th score, and scores the neurons that may reach M: the largest of a
group, and all of a "crowded" group, whose second largest may reach M too.

16-bit inputs: the product's scores are final, M is the (k+1)-th largest key itself, and only the
crowded groups are scored again, since their other keys are not known.

fp32 inputs: the product is an estimate in fp16, and whatever may reach M is scored again in fp32.
That is exact. With e_j the estimate for neuron j and s_j its fp32 score, |e_j - s_j| <= E_j,

    E_j = c |x| |w_j| + d 2^-124 (|x| + |w_j| + 1) + 2^-21 |e_j|,  c = 2^-10 + 2^-20 + d 2^-21:

- A row is multiplied by a power of two that brings its largest entry to 2^14 .. 2^15, which is
  exact. Rounding to fp16 then changes an entry by at most 2^-11 of it, or by 2^-25 where it becomes
  subnormal: less than 2^-25 of |x|. Both factors rounded, a product changes by at most
  2^-10 + 2^-22 of it, and by Cauchy-Schwarz the products sum to at most |x| |w_j| in absolute
  value; subnormal entries add at most d 2^-24 of that.
- Sums of d products in fp32: at most d 2^-22 of |x| |w_j| in the product (4 ulp a term: tensor
  cores truncate) and d 2^-23 in the fp32 score.
- Products and entries below 2^-126 may be flushed to 0: d 2^-124 (|x| + |w_j| + 1).
- Scaling back and the bias round e_j and s_j once each: 2^-21 |e_j|, with room to spare.

k+1 groups hold a neuron with e_j - E_j >= M, so k+1 neurons have s_j >= M; a neuron with
e_j + E_j < M has s_j < M and is none of the k+1 largest. E_j grows with |w_j|, so a group takes the
largest norm of its rows: a neuron of huge weight widens the bound of its own group only. As
e + 2^-21 |e| grows with e, a group's second bounds all but its largest. A bound that is
infinite or NaN bounds nothing, and the whole group is scored. Norms are rounded up, and infinite
from 2^100 on: below, a product of x and a scaled row of weight does not overflow, being at most
sqrt(d) 2^115.

Graded inhibition, 0 < g_j <= 1: neuron j fires if a_j > g_j I, I the (k+1)-th activation. M bounds
I too, so j is looked at if (e_j + E_j) / g_j may exceed M, up to the rounding of the quotient. The
product keeps the keys of that bound, and of e_j - E_j each group's largest, for M.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _op, _tuning
from ssd_kernels._encoder_kernels import _code_kernel, _graded_kernel, _halve_kernel, _keys_kernel

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4, or none at all
    TensorDescriptor = None

PLAIN = {"DESCRIPTORS": 0, "PERSISTENT": 0, "TOGETHER": 64, "num_stages": 3}
SMALL = {**PLAIN, "BM": 64, "BN": 64, "BK": 64, "num_warps": 4}
DESCRIBED = {"DESCRIPTORS": 1, "PERSISTENT": 1, "TOGETHER": 8, "num_stages": 3}
# Tiles of the product that keeps group keys. Tensor descriptors make the large one (one H100:
# 3.4 ms in place of 4.3); PERSISTENT programs walk over tiles and overlap them.
_tuning.TABLE["linear_topk"] = {
    "default": (
        ({"batch": 128}, SMALL),
        ({"graded": 0}, {**PLAIN, "BM": 128, "BN": 128, "BK": 32, "num_warps": 8}),
        ({}, {**SMALL}),
    ),
    **{
        family: (
            ({"batch": 128}, SMALL),
            (
                {"graded": 0, "aligned": 0},
                {**PLAIN, "BM": 128, "BN": 128, "BK": 32, "num_warps": 8},
            ),
            ({"graded": 0}, {**DESCRIBED, "BM": 128, "BN": width, "BK": 64, "num_warps": 8}),
            ({}, {**SMALL}),
        )
        # 256 columns spill on sm100, and larger tiles wherever a product has three keys.
        for family, width in (("sm90", 256), ("sm100", 128))
    },
}

WORKSPACE = 2**26  # bytes of the keys of a block of rows, and of its buffer
MAX_GROUPS = 4096  # that a program selects from; of more neurons, larger groups up to a tile
ENTRIES = 4096  # of a tile of rows that a program of four warps holds


class Code(NamedTuple):
    """The selection of linear_topk, and what its backward needs."""

    values: Tensor  # [B, k]
    indices: Tensor  # [B, k] int64, through all networks
    cut: Tensor  # [B]: the (k+1)-th activation, 0 if k is R
    after: Tensor  # [B] int64: its index, any if k is R
    # Where a gradient passes; it passes NaN, so that NaN is seen.
    passes: Tensor  # [B, k] bool
    cut_passes: Tensor  # [B] bool


def unpacked(kept: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """after, passes and cut_passes of a Code, which `code` returns in one tensor."""
    after, passes, cut_passes = kept.split([8 * rows, rows * k, rows])
    return (
        after.view(torch.int64),
        passes.view(torch.bool).view(rows, k),
        cut_passes.view(torch.bool),
    )


def _code_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    indices = x.new_empty(rows, k, dtype=torch.int64)
    kept = x.new_empty(rows * (9 + k), dtype=torch.uint8)
    return x.new_empty(rows, k), indices, x.new_empty(rows), kept


@_op.operator("ssd_kernels::linear_topk", _code_like, mutates=("counts",))
def code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    inhibition: str,
    counts: Tensor | None,
    networks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices and cut of a Code, and its other fields in one tensor."""
    values, indices, cut, kept = code = _code_like(x, weight, bias, k)
    if len(x) == 0:
        return code
    after, passes, cut_passes = unpacked(kept, len(x), k)
    best = min(k + 1, len(weight) // networks)
    if best == k:
        after.zero_()
    bias = None if bias is None else bias.detach().contiguous()
    product = Product(x, weight, bias, None, best, best, networks)
    for start, size in product.blocks():
        with torch.cuda.device_of(x):
            _code_kernel[(networks * size,)](
                product.x,
                product.weight,
                x if bias is None else bias,
                product.norms,
                product.group_norms,
                product.group_keys,
                product.buffer,
                values,
                indices,
                after,
                cut,
                passes,
                cut_passes,
                indices if counts is None else counts,
                start,
                size,
                *product.sizes,
                k,
                best,
                *product.strides,
                1 if counts is None else counts.stride(0),
                *product.errors,
                BIAS=bias is not None,
                ESTIMATE=product.estimate,
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                **product.constants,
            )
    return code


def _graded_like(
    x: Tensor, weight: Tensor, k: int, width: int, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    indices = x.new_empty(rows, width, dtype=torch.int64)
    return x.new_empty(rows, width), indices, x.new_empty(rows, dtype=torch.bool)


@_op.operator("ssd_kernels::graded_code", _graded_like, mutates=("counts",))
def graded_code(
    x: Tensor,
    weight: Tensor,
    k: int,
    width: int,
    gaba: Tensor,
    inhibition: str,
    counts: Tensor | None,
    networks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices [B, width] of fp32 x; bool [B]: whether more fire. k < R, gaba in (0, 1]."""
    values, indices, overflow = code = _graded_like(x, weight, k, width)
    if len(x) == 0:
        return code
    gaba = gaba.detach().contiguous()
    product = Product(x, weight, None, gaba, k + 1, max(k + 1, width), networks)
    for start, size in product.blocks():
        with torch.cuda.device_of(x):
            _graded_kernel[(networks * size,)](
                product.x,
                product.weight,
                gaba,
                product.group_keys,
                product.buffer,
                values,
                indices,
                overflow,
                indices if counts is None else counts,
                start,
                size,
                *product.sizes,
                k,
                width,
                *product.strides,
                1 if counts is None else counts.stride(0),
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                **product.constants,
            )
    return code


class Product:
    """The product of a call, one block of rows after another, and the workspace of its kernels.

    Args:
        x: [S B, d]. weight: [S R, d]. bias: [S R] or None. gaba: [S R] or None, see GRADED.
        best: how many of the largest scores the groups tell apart.
        room: entries that a cut leaves in a row's buffer.
        networks: S.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gaba: Tensor | None,
        best: int,
        room: int,
        networks: int,
    ) -> None:
        self.x, self.weight = _rows_contiguous(x), _rows_contiguous(weight)
        self.bias, self.gaba = bias, gaba
        self.estimate = x.dtype == torch.float32
        batch, neurons, features = len(x) // networks, len(weight) // networks, x.shape[1]
        shape = {
            "batch": batch,
            "aligned": _aligned(self.x, self.weight),
            "graded": gaba is not None,
        }
        self.tile = dict(_tuning.config("linear_topk", x.device, **shape))
        group = group_size(neurons, best, self.estimate, self.tile["BN"])
        groups = _ceil_div(neurons, group)
        planes = 2 if gaba is None else 3
        block = min(256, max(16, _power(features)))
        # Loads of less than 16 bytes take more registers.
        scored = ENTRIES // block // (1 if features % 4 == 0 else 2)
        capacity = 2 * _power(max(room, scored))
        keys, buffer = 4 * planes * groups, 8 * capacity
        self.rows = min(batch, max(1, WORKSPACE // (max(keys, buffer) * networks)))
        self.sizes = batch, networks, neurons, features, groups
        self.strides = self.x.stride(0), self.weight.stride(0)
        self.errors = relative_error(features), features * 2.0**-124
        self.constants = {
            "GROUP": group,
            "GROUPS": _power(groups),
            "CAPACITY": capacity,
            "STEP": 8,
            "N": scored,
            "BK": block,
            "num_warps": min(16, max(4, _power(groups) // 1024)),
        }
        self._allocate(buffer, keys, networks * groups)
        self.factors = self.x, self.weight
        if self.estimate:
            self._halve()

    def _allocate(self, buffer: int, keys: int, groups: int) -> None:
        """One workspace. buffer, keys: bytes per row. Without estimates their parts are empty."""
        rows = self.rows * self.sizes[1]
        count = len(self.x) + len(self.weight) if self.estimate else 0
        width = _ceil_div(max(1, self.x.shape[1]), 16) * 16
        sizes = rows * buffer, rows * keys, 4 * count, 4 * count, 4 * groups, 2 * count * width
        ends = [_ceil_div(size, 16) * 16 for size in sizes]
        workspace = torch.empty(sum(ends), dtype=torch.uint8, device=self.x.device)
        parts = workspace.split(ends)
        self.buffer = parts[0].view(torch.int64)  # [S rows, CAPACITY]
        self.group_keys = parts[1].view(torch.int32)  # [2 or 3, S rows, groups]
        self.units, self.norms, self.group_norms = (p.view(torch.float32) for p in parts[2:5])
        self.halves = parts[5].view(torch.float16).view(count, width)

    def _halve(self) -> None:
        """Writes the factors in fp16, each row divided by a power of two, and the rows' norms."""
        width = self.halves.shape[1]
        block = min(1024, _power(width))
        height = ENTRIES // block
        programs = _ceil_div(len(self.x), height) + _ceil_div(len(self.weight), height)
        with torch.cuda.device_of(self.x):
            _halve_kernel[(programs,)](
                self.x,
                self.weight,
                self.halves,
                self.units,
                self.norms,
                len(self.x),
                len(self.weight),
                self.x.shape[1],
                *self.strides,
                WIDTH=width,
                ROWS=height,
                BLOCK=block,
                num_warps=4,
            )
        self.factors = self.halves[: len(self.x)], self.halves[len(self.x) :]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Writes the keys of a block of rows, then yields its first row and its length."""
        batch, networks, neurons, _, groups = self.sizes
        tile = dict(self.tile)
        described, persistent = bool(tile.pop("DESCRIPTORS")), bool(tile.pop("PERSISTENT"))
        factors: tuple[Any, ...] = self.factors
        if described:
            heights = tile["BM"], tile["BN"]
            factors = tuple(
                TensorDescriptor.from_tensor(factor, [height, tile["BK"]])
                for factor, height in zip(self.factors, heights, strict=True)
            )
        most = _tuning.multiprocessors(self.x.device) if persistent else 2**31
        for start in range(0, batch, self.rows):
            size = min(self.rows, batch - start)
            tiles = networks * _ceil_div(size, tile["BM"]) * _ceil_div(neurons, tile["BN"])
            with torch.cuda.device_of(self.x):
                _keys_kernel[(min(tiles, most),)](
                    *factors,
                    self.x if self.bias is None else self.bias,
                    self.units,
                    self.norms,
                    self.group_keys,
                    self.group_norms,
                    self.x if self.gaba is None else self.gaba,
                    tiles,
                    start,
                    size,
                    batch,
                    networks,
                    neurons,
                    self.factors[0].shape[1],
                    groups,
                    *(factor.stride(0) for factor in self.factors),
                    *self.errors,
                    BIAS=self.bias is not None,
                    ESTIMATE=self.estimate,
                    GRADED=self.gaba is not None,
                    DESCRIPTORS=described,
                    PERSISTENT=persistent,
                    GROUP=self.constants["GROUP"],
                    **tile,
                )
            yield start, size


def _aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the product can use tensor descriptors; fp32 factors are copied in any case."""
    if TensorDescriptor is None or x.dtype == torch.float32:
        return TensorDescriptor is not None
    return all(
        t.numel() and t.data_ptr() % 16 == t.stride(0) % 8 == 0 and t.stride(0) >= t.shape[1]
        for t in (x, weight)
    )


def group_size(neurons: int, best: int, estimate: bool, most: int) -> int:
    """Neurons per group, a power of two up to `most`, so that the groups tell the `best` apart.

    32 for estimates and 64 else are the fastest on an H100 (docs/performance.md).
    """
    group = 32 if estimate else 64
    while group > 8 and neurons < 4 * best * group:
        group //= 2
    while group < most and neurons > MAX_GROUPS * group:
        group *= 2
    return group


def relative_error(features: int) -> float:
    """The error of an estimated product, as a fraction of |x| |w|; see the proof above."""
    return 1.001 * (2.0**-10 + 2.0**-20 + features * 2.0**-21)


def _rows_contiguous(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
