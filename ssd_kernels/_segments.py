"""Neuron -> slots of a sparse code, in a stable order: what every backward and update walks.

`segments` serves the torch path. The Triton path sorts the slots by neuron and starts one program
at each of the B K sorted positions; only the first of a neuron works, and walks the neuron's slots
in order. Shapes depend on B K alone and nothing is read back, so it may be captured in a CUDA
graph; sums are taken in one fixed order, so results are the same from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _op, _tuning
from ssd_kernels._triton import jit, tl

# Up to this many slots, ranking each against all takes one launch and less time than a sort.
MAX_RANKED = 4096


class Segments(NamedTuple):
    """Slots grouped by neuron: those of neurons[i] are slots[offsets[i] : offsets[i + 1]]."""

    neurons: Tensor  # [n] ascending, distinct
    offsets: Tensor  # [n], the first is 0
    slots: Tensor  # [m] positions in the flattened code, ascending within a neuron


def segments(indices: Tensor, kept: Tensor) -> Segments:
    """Groups the slots [B, K] of a code where `kept` is True by their neuron."""
    positions = kept.flatten().nonzero().squeeze(1)
    ordered, order = indices.flatten()[positions].sort(stable=True)
    neurons, lengths = torch.unique_consecutive(ordered, return_counts=True)
    return Segments(neurons, lengths.cumsum(0) - lengths, positions[order])


def sorted_slots(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of a code [B, K] by neuron, then by slot: neurons [B K], slots [B K]."""
    flat = indices.reshape(-1)
    if len(flat) > MAX_RANKED:
        return flat.sort(stable=True)
    flat = flat.contiguous()
    neurons, slots = torch.empty_like(flat), torch.empty_like(flat)
    chosen = _tuning.config("rank_slots", flat.device)
    with torch.cuda.device_of(flat):
        _rank_kernel[(-(-len(flat) // chosen["BLOCK"]),)](flat, neurons, slots, len(flat), **chosen)
    return neurons, slots


@jit(do_not_specialize=["count"])
def _rank_kernel(
    indices,  # [count] int64
    neurons,  # [count]
    slots,  # [count]
    count,
    BLOCK: tl.constexpr,
    RIVALS: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    neuron = tl.load(indices + slot, mask=slot < count, other=0)
    key = (neuron << 32) | slot
    rank = tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < count:
        other = start + tl.arange(0, RIVALS)
        rival = tl.load(indices + other, mask=other < count, other=0x7FFFFFFF)
        before = ((rival << 32) | other)[None, :] < key[:, None]
        rank += tl.sum(before.to(tl.int32), axis=1)
        start += RIVALS
    tl.store(neurons + rank, neuron, mask=slot < count)
    tl.store(slots + rank, slot.to(tl.int64), mask=slot < count)


@jit(do_not_specialize=["count"])
def segment_kernel(
    neurons,  # [count], sorted
    slots,  # [count]
    coefficients,  # [count]
    vectors,  # [B, D]
    weight,  # [R, D]
    gradient,  # [R, D], or [count, D] if COMPACT
    bias_gradient,  # [R]
    products,  # [tiles, count] fp32: <vectors[b], weight[neuron]> of each slot
    squares,  # [tiles, count] fp64, in whose range squares of fp32 are: of the gradient's row
    touched,  # [count] uint8: whether a coefficient of the neuron is not zero
    count,
    width,
    vectors_stride,
    weight_stride,
    gradient_stride,
    K: tl.constexpr,
    PRODUCTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COMPACT: tl.constexpr,
    BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums coefficient * vector over each neuron's slots, SLOTS at a time and in order."""
    position = tl.program_id(0)
    tile = tl.program_id(1)
    neuron = tl.load(neurons + position)
    previous = tl.load(neurons + position - 1, mask=position > 0, other=-1)
    if neuron != previous:
        column = tile * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        if PRODUCTS:
            row = tl.load(weight + neuron * weight_stride + column, mask=inside, other=0.0)
            row = row.to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        total_coefficient = 0.0
        active = 0
        cursor = position.to(tl.int64)
        walking = True
        while walking:
            here = cursor + tl.arange(0, SLOTS)
            mine = tl.load(neurons + here, mask=here < count, other=-1) == neuron
            slot = tl.load(slots + here, mask=mine, other=0)
            vector = tl.load(
                vectors + (slot // K)[:, None] * vectors_stride + column[None, :],
                mask=mine[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            if PRODUCTS:
                product = tl.sum(vector * row[None, :], axis=1)
                tl.store(products + tile.to(tl.int64) * count + slot, product, mask=mine)
            if GRADIENT:
                coefficient = tl.load(coefficients + slot, mask=mine, other=0.0).to(tl.float32)
                # A slot of coefficient 0 passes nothing of an infinite vector either.
                term = tl.where((coefficient != 0)[:, None], coefficient[:, None] * vector, 0.0)
                total += tl.sum(term, axis=0)
                total_coefficient += tl.sum(coefficient)
                active += tl.sum((coefficient != 0).to(tl.int32))
            walking = tl.sum(mine.to(tl.int32)) == SLOTS
            cursor += SLOTS
        if GRADIENT:
            if COMPACT:
                target = position.to(tl.int64)
                wide = tl.where(inside, total, 0.0).to(tl.float64)
                at = squares + tile.to(tl.int64) * count + position
                tl.store(at, tl.sum(wide * wide))
                if tile == 0:
                    tl.store(touched + position, tl.minimum(active, 1).to(tl.uint8))
            else:
                target = neuron
            tl.store(gradient + target * gradient_stride + column, total, mask=inside)
            if BIAS and tile == 0:
                tl.store(bias_gradient + neuron, total_coefficient)
    elif COMPACT:
        tl.store(squares + tile.to(tl.int64) * count + position, 0.0)


def walk(
    order: tuple[Tensor, Tensor],
    slots_per_sample: int,
    vectors: Tensor,
    *,
    coefficients: Tensor | None = None,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    products: Tensor | None = None,
    squares: Tensor | None = None,
    touched: Tensor | None = None,
) -> None:
    """Launches segment_kernel; what is None is not computed. vectors [B, D] has unit stride."""
    neurons, slots = order
    count, width = len(neurons), vectors.shape[1]
    chosen = _tuning.config("segments", vectors.device, width=width)
    with torch.cuda.device_of(vectors):
        segment_kernel[(count, tiles(width, vectors.device))](
            neurons,
            slots,
            vectors if coefficients is None else coefficients,
            vectors,
            vectors if weight is None else weight,
            vectors if gradient is None else gradient,
            vectors if bias_gradient is None else bias_gradient,
            vectors if products is None else products,
            vectors if squares is None else squares,
            neurons if touched is None else touched,
            count,
            width,
            vectors.stride(0),
            0 if weight is None else weight.stride(0),
            0 if gradient is None else gradient.stride(0),
            K=slots_per_sample,
            PRODUCTS=products is not None,
            GRADIENT=gradient is not None,
            COMPACT=squares is not None,
            BIAS=bias_gradient is not None,
            **chosen,
        )


def tiles(width: int, device: torch.device) -> int:
    """Programs that share a row of this width in `walk`."""
    return -(-width // _tuning.config("segments", device, width=width)["BLOCK"])


def _row_gradients_like(
    coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int, bias: bool = False
) -> tuple[Tensor, Tensor]:
    sums = inputs.new_empty(neurons if bias else 0)
    return inputs.new_empty(neurons, inputs.shape[1]), sums


@_op.operator("ssd_kernels::row_gradients", _row_gradients_like)
def row_gradients(
    coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int, bias: bool = False
) -> tuple[Tensor, Tensor]:
    """reference.row_gradient [R, d] in Triton; with `bias` also the sums of coefficients [R].

    coefficients, indices [B, K]; inputs [B, d]; fp32 sums, results in the dtype of inputs.
    """
    gradient = inputs.new_zeros(neurons, inputs.shape[1])
    sums = inputs.new_zeros(neurons if bias else 0)
    if indices.numel():
        walk(
            sorted_slots(indices),
            indices.shape[-1],
            unit_stride(inputs),
            coefficients=coefficients.contiguous(),
            gradient=gradient,
            bias_gradient=sums if bias else None,
        )
    return gradient, sums


def unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
