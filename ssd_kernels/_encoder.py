"""Launches of linear_topk and linear_inhibit.

linear_topk stores no score. A product keeps the two largest keys of each group of neurons
(_keys_kernel); then a program for each row (_code_kernel) bisects the groups' largest keys for M, a
lower bound of the row's (k+1)-th score, and looks at what may reach M: the largest of a group, and
all of a group whose second may reach M too, a "crowded" one.

16-bit inputs: the product's score counts, M is the (k+1)-th largest key itself, and only crowded
groups are scored again, because their other keys are not known.

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
e + 2^-21 |e| grows with e, a group's second bounds all but its largest. A bound that is infinite
or no number bounds nothing, and all of the group is scored. Norms are rounded up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _tuning
from ssd_kernels._encoder_kernels import _code_kernel, _halve_kernel, _inhibit_kernel, _keys_kernel
from ssd_kernels.topk import select_triton

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4, or none at all
    TensorDescriptor = None

# Bytes of keys that a block of rows may take.
WORKSPACE = 2**26
# Group keys that a program selects from: neurons a group are doubled beyond, up to a tile's.
MAX_GROUPS = 8192
# Entries of a tile of rows that a program of four warps holds.
ENTRIES = 4096
MIXED_MM = "dtype" in torch.ops.aten.mm.overloads()  # 16-bit inputs, fp32 result


def code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    inhibition: str,
    counts: Tensor | None,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices [B, k], the (k+1)-th activation [B] and its index [B] (k = R: 0 and any)."""
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    bias = None if bias is None else bias.detach().contiguous()
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    after, cut = indices.new_empty(len(x)), x.new_empty(len(x))
    if len(x) == 0:
        return values, indices, cut, after
    aligned = _aligned(x, weight)
    batch, neurons, features = len(x) // blocks, len(weight) // blocks, x.shape[1]
    tile = dict(_tuning.config("linear_topk", x.device, batch=batch, aligned=aligned))
    described, persistent = bool(tile.pop("DESCRIPTORS")), bool(tile.pop("PERSISTENT"))
    best, estimate = min(k + 1, neurons), x.dtype == torch.float32
    if best == k:
        after.zero_()
    group = group_size(neurons, best, estimate, tile["BN"])
    groups = _ceil_div(neurons, group)
    rows = min(batch, max(1, WORKSPACE // (8 * groups * blocks)))
    block = min(256, max(16, _power(features)))
    scored = ENTRIES // block
    capacity = 2 * _power(max(best, scored))
    space = _workspace(x, weight, rows * blocks, groups, capacity, blocks if estimate else 0)
    factors = x, weight
    if estimate:
        factors = space.halves[: len(x)], space.halves[len(x) :]
        _halve(x, weight, space)
    sources = _descriptors(factors, tile) if described else factors
    programs = _tuning.multiprocessors(x.device) if persistent else 2**31
    for start in range(0, batch, rows):
        size = min(rows, batch - start)
        tiles = blocks * _ceil_div(size, tile["BM"]) * _ceil_div(neurons, tile["BN"])
        with torch.cuda.device_of(x):
            _keys_kernel[(min(tiles, programs),)](
                *sources,
                x if bias is None else bias,
                space.units,
                space.norms,
                space.keys,
                space.group_norms,
                tiles,
                start,
                size,
                batch,
                blocks,
                neurons,
                factors[0].shape[1],
                groups,
                factors[0].stride(0),
                factors[1].stride(0),
                BIAS=bias is not None,
                ESTIMATE=estimate,
                DESCRIPTORS=described,
                PERSISTENT=persistent,
                GROUP=group,
                **tile,
            )
            _code_kernel[(blocks * size,)](
                x,
                weight,
                x if bias is None else bias,
                space.norms,
                space.group_norms,
                space.keys,
                space.buffer,
                values,
                indices,
                after,
                cut,
                indices if counts is None else counts,
                start,
                size,
                batch,
                blocks,
                neurons,
                features,
                groups,
                k,
                best,
                x.stride(0),
                weight.stride(0),
                1 if counts is None else counts.stride(0),
                relative_error(features),
                features * 2.0**-124,
                BIAS=bias is not None,
                ESTIMATE=estimate,
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                GROUP=group,
                GROUPS=_power(groups),
                CAPACITY=capacity,
                STEP=8,
                N=scored,
                BK=block,
                num_warps=min(16, max(4, _power(groups) // 1024)),
            )
    return values, indices, cut, after


class Workspace(NamedTuple):
    """Parts of one allocation; the last four are empty where nothing is estimated."""

    buffer: Tensor  # [rows, capacity] int64
    keys: Tensor  # [2, rows, groups] int32
    units: Tensor  # [S B + S R] fp32
    norms: Tensor  # [S B + S R] fp32
    group_norms: Tensor  # [S, groups] fp32
    halves: Tensor  # [S B + S R, d] fp16, d rounded up


def _workspace(
    x: Tensor, weight: Tensor, rows: int, groups: int, capacity: int, estimated: int
) -> Workspace:
    """`estimated`: how many networks are."""
    count = len(x) + len(weight) if estimated else 0
    width = _ceil_div(max(1, x.shape[1]), 16) * 16
    sizes = 8 * rows * capacity, 8 * rows * groups, 4 * count, 4 * count, 4 * estimated * groups
    ends = [_ceil_div(size, 16) * 16 for size in (*sizes, 2 * count * width)]
    memory = torch.empty(sum(ends), dtype=torch.uint8, device=x.device)
    buffer, keys, units, norms, group_norms, halves = memory.split(ends)
    return Workspace(
        buffer.view(torch.int64),
        keys.view(torch.int32),
        units.view(torch.float32),
        norms.view(torch.float32),
        group_norms.view(torch.float32),
        halves.view(torch.float16).view(count, width),
    )


def _halve(x: Tensor, weight: Tensor, space: Workspace) -> None:
    width = space.halves.shape[1]
    block = min(1024, _power(width))
    height = ENTRIES // block
    with torch.cuda.device_of(x):
        _halve_kernel[(_ceil_div(len(x), height) + _ceil_div(len(weight), height),)](
            x,
            weight,
            space.halves,
            space.units,
            space.norms,
            len(x),
            len(weight),
            x.shape[1],
            x.stride(0),
            weight.stride(0),
            WIDTH=width,
            ROWS=height,
            BLOCK=block,
            num_warps=4,
        )


def _aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether the product's factors may have tensor descriptors; fp32 ones are copied anyway."""
    if TensorDescriptor is None or x.dtype == torch.float32:
        return TensorDescriptor is not None
    return all(t.numel() and t.data_ptr() % 16 == t.stride(0) % 8 == 0 for t in (x, weight))


def _descriptors(factors: tuple[Tensor, Tensor], tile: _tuning.Config) -> tuple[Any, ...]:
    heights = tile["BM"], tile["BN"]
    return tuple(
        TensorDescriptor.from_tensor(factor, [height, tile["BK"]])
        for factor, height in zip(factors, heights, strict=True)
    )


def group_size(neurons: int, best: int, estimate: bool, most: int) -> int:
    """Neurons to a group, a power of two up to `most`: the groups shall tell the `best` apart.

    32 for estimates and 64 else are the fastest on an H100 (benchmarks/trials).
    """
    group = 32 if estimate else 64
    while group > 8 and neurons < 4 * best * group:
        group //= 2
    while group < most and neurons > MAX_GROUPS * group:
        group *= 2
    return group


def relative_error(features: int) -> float:
    """Of |x| |w|: what an estimate of their product may be off; see the proof above."""
    return 1.001 * (2.0**-10 + 2.0**-20 + features * 2.0**-21)


def inhibit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    counts: Tensor | None,
    need_passes: bool,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """The dense activations [B, R] and, if needed, bool [B, R]: where the gradient passes."""
    x, weight = x.detach(), weight.detach()
    neurons = len(weight) // blocks
    hidden = x.new_empty(len(x), neurons)
    passes = torch.empty(hidden.shape if need_passes else 0, dtype=torch.bool, device=x.device)
    gaba = None if gaba is None else gaba.detach().contiguous()
    chosen = _tuning.config("linear_inhibit", x.device)
    for rows, first, networks, scores in _slabs(x, weight, bias, hidden, blocks):
        size = len(scores) // networks
        best = scores if k == neurons else select_triton(scores, k + 1)[0]
        own = slice(first * neurons, (first + networks) * neurons)
        tiles = _ceil_div(neurons, chosen["BN"]) * _ceil_div(size, chosen["BM"])
        with torch.cuda.device_of(x):
            _inhibit_kernel[(tiles * networks,)](
                scores,
                best,
                x if gaba is None else gaba[own],
                hidden[rows],
                passes[rows] if need_passes else passes,
                passes if counts is None else counts[own],
                size,
                neurons,
                k,
                1 if counts is None else counts.stride(0),
                CUT=k < neurons,
                GABA=gaba is not None,
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                PASSES=need_passes,
                **chosen,
            )
    return hidden, passes


def _slabs(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, blocks: int
) -> Iterator[tuple[slice, int, int, Tensor]]:
    """fp32 scores of rows of the batch: the rows, their first network, how many, and the scores.

    fp32 inputs: all rows, where the result will be. Else a few rows of a network, in memory that is
    used again.
    """
    batch, neurons = len(x) // blocks, len(weight) // blocks
    if batch == 0:
        return
    direct = hidden.dtype == torch.float32
    height = batch if direct else min(batch, slab_rows(neurons))
    slab = hidden if direct else hidden.new_empty(height, neurons, dtype=torch.float32)
    # A product for each network, the one that it would have alone.
    for network in range(blocks):
        own = slice(network * neurons, (network + 1) * neurons)
        for start in range(network * batch, (network + 1) * batch, height):
            rows = slice(start, min(start + height, (network + 1) * batch))
            scores = slab[rows] if direct else slab[: rows.stop - rows.start]
            _product(x[rows], weight[own].T, scores)
            if bias is not None:
                scores += bias.detach()[own]
            if not direct:
                yield rows, network, 1, scores
    if direct:
        yield slice(0, len(x)), 0, blocks, slab


def _product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.dtype == torch.float32:
        torch.mm(x, weight, out=out)
    elif x.is_cuda and MIXED_MM:
        torch.mm(x, weight, out_dtype=torch.float32, out=out)
    else:  # Triton's interpreter, and torch before 2.8
        torch.mm(x.float(), weight.float(), out=out)


def slab_rows(neurons: int) -> int:
    """Rows of 16-bit inputs whose scores are held at a time: what a cache of 32 MiB holds."""
    return max(128, 2**23 // neurons // 64 * 64)


def _rows_contiguous(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
