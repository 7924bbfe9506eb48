"""The slots of a sparse code by neuron, in a stable order: every backward and update walks them.

`segments` serves the torch path. The Triton path sorts the slots by neuron, and one program per
neuron walks its slots in order; where there are fewer slots than neurons, one program per slot, and
the first of a neuron works. Shapes depend on B K and R alone and nothing is read back, so a CUDA
graph can capture it. Sums have one fixed order, so results are the same from run to run.
"""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _dispatch, _op, _tuning
from ssd_kernels._triton import jit, tl

_tuning.TABLE["rank_slots"] = {"default": (({}, {"BLOCK": 16, "RIVALS": 256, "num_warps": 4}),)}
_tuning.TABLE["offsets"] = {"default": (({}, {"BLOCK": 128, "num_warps": 4}),)}
_tuning.TABLE["segments"] = {
    "default": (
        ({"width": 16}, {"SLOTS": 8, "BLOCK": 16, "num_warps": 1}),
        ({"width": 64}, {"SLOTS": 4, "BLOCK": 64, "num_warps": 1}),
        ({"width": 256}, {"SLOTS": 4, "BLOCK": 256, "num_warps": 2}),
        ({"width": 1024}, {"SLOTS": 2, "BLOCK": 1024, "num_warps": 2}),
        ({}, {"SLOTS": 2, "BLOCK": 2048, "num_warps": 4}),
    )
}

# Up to this many slots, to rank each against all takes one launch and less time than a sort. The
# same launch ranks the offsets as long as it makes at most the square of that many comparisons.
MAX_RANKED = 8192
KEYS = (torch.int16, torch.int32, torch.int64)  # a radix sort of fewer bits makes fewer passes


class Segments(NamedTuple):
    """Slots grouped by neuron: those of neurons[i] are slots[offsets[i] : offsets[i + 1]]."""

    neurons: Tensor  # [n] ascending, distinct
    offsets: Tensor  # [n], the first is 0
    slots: Tensor  # [m] positions in the flattened code, ascending within a neuron


class Order(NamedTuple):
    """The slots of a code [B, K] by neuron, then by slot."""

    neurons: Tensor  # [B K] ascending
    slots: Tensor  # [B K] positions in the flattened code
    offsets: Tensor | None  # [R + 1]: neuron j has slots[offsets[j] : offsets[j + 1]]

    @property
    def programs(self) -> int:
        """One per neuron if the offsets are known, else one per slot."""
        return len(self.slots) if self.offsets is None else len(self.offsets) - 1


def segments(indices: Tensor, kept: Tensor) -> Segments:
    """Groups by neuron those slots [B, K] of a code where `kept` is True."""
    positions = kept.flatten().nonzero().squeeze(1)
    ordered, order = indices.flatten()[positions].sort(stable=True)
    neurons, lengths = torch.unique_consecutive(ordered, return_counts=True)
    return Segments(neurons, lengths.cumsum(0) - lengths, positions[order])


def sorted_slots(indices: Tensor, neurons: int, by_neuron: bool = True, networks: int = 1) -> Order:
    """The slots of a code [B, K] in order, with the offsets of all R neurons if `by_neuron`.

    networks: networks whose samples and neurons follow one another; each is ranked by itself.
    """
    flat = indices.reshape(-1)
    count, heads = len(flat), neurons + 1 if by_neuron else 0
    own = max(1, count // networks)
    if own > MAX_RANKED or neurons > 2**31:
        narrowest = next(dtype for dtype in KEYS if neurons <= torch.iinfo(dtype).max + 1)
        ranked, slots = flat.to(narrowest).sort(stable=True)
        offsets = torch.empty(heads, dtype=torch.int64, device=flat.device)
        missing = heads
    else:
        sizes = [count, count, heads]
        room = torch.empty(sum(sizes), dtype=torch.int64, device=flat.device)
        ranked, slots, offsets = room.split(sizes)
        missing = heads if own * (count + heads) > MAX_RANKED**2 else 0
        chosen = _tuning.config("rank_slots", flat.device)
        programs = -(-(count + heads - missing) // chosen["BLOCK"])
        with torch.cuda.device_of(flat):
            _rank_kernel[(programs,)](
                flat.contiguous(),
                ranked,
                slots,
                offsets,
                count,
                heads - missing,
                own,
                neurons // networks,
                **chosen,
            )
    if missing:
        chosen = _tuning.config("offsets", flat.device)
        with torch.cuda.device_of(flat):
            _offsets_kernel[(-(-heads // chosen["BLOCK"]),)](
                ranked, offsets, count, heads, 1 << count.bit_length(), **chosen
            )
    return Order(ranked, slots, offsets if by_neuron else None)


class _Kept(NamedTuple):
    key: tuple[Any, ...]
    indices: Tensor  # held, so that nothing else gets its memory
    order: Sequence[Tensor]


_kept: _Kept | None = None  # of the backward that runs


def shared_order(indices: Tensor, neurons: int) -> Sequence[Tensor]:
    """sorted_slots with offsets, once for a decoder and its encoder in one eager backward.

    Empty while torch is tracing: an operator sorts for itself.

    Only the same backward reuses the order, on the same stream, for the same memory in the same
    version: both nodes saved these indices, and autograd forbids changes to saved tensors. The end
    of the backward drops it.
    """
    global _kept
    if _dispatch.tracing():
        return ()
    task = torch._C._current_graph_task_id()
    if task < 0:
        return with_offsets(sorted_slots(indices, neurons))
    stream = torch.cuda.current_stream(indices.device) if indices.is_cuda else None
    place = indices.data_ptr(), indices.shape, indices.stride(), indices._version
    key = (task, stream, indices.device, place, neurons)
    kept = _kept
    if kept is None or kept.key != key:
        torch.autograd.Variable._execution_engine.queue_callback(_forget)
        kept = _kept = _Kept(key, indices, with_offsets(sorted_slots(indices, neurons)))
    return kept.order


def with_offsets(order: Order) -> Sequence[Tensor]:
    assert order.offsets is not None
    return order.neurons, order.slots, order.offsets


def _forget() -> None:
    global _kept
    _kept = None


@jit(do_not_specialize=["count", "heads", "own", "block_rows"])
def _rank_kernel(
    indices,  # [count] int64
    neurons,  # [count]
    slots,  # [count]
    offsets,  # [heads]
    count,
    heads,
    own,  # slots of a network
    block_rows,  # its neurons
    BLOCK: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Counts what comes before each slot, and before the first slot that each neuron may have."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_slot = number < count
    neuron = tl.load(indices + number, mask=is_slot, other=0)
    neuron = tl.where(is_slot, neuron, number - count)
    key = (neuron << 32) | tl.where(is_slot, number, 0)
    # Slots of earlier networks come before, those of later ones do not: neither is compared.
    last = tl.maximum(count // own - 1, 0)
    network = tl.where(is_slot, number // own, tl.minimum((number - count) // block_rows, last))
    start = tl.min(network) * own
    stop = tl.minimum((tl.max(network) + 1) * own, count)
    rank = tl.zeros([BLOCK], tl.int32) + start
    while start < stop:
        other = start + tl.arange(0, RIVALS)
        rival = tl.load(indices + other, mask=other < stop, other=0x7FFFFFFF)
        before = ((rival << 32) | other)[None, :] < key[:, None]
        rank += tl.sum(before.to(tl.int32), axis=1)
        start += RIVALS
    tl.store(neurons + rank, neuron, mask=is_slot)
    tl.store(slots + rank, number.to(tl.int64), mask=is_slot)
    head = number - count
    tl.store(offsets + head, rank.to(tl.int64), mask=(head >= 0) & (head < heads))


@jit(do_not_specialize=["count", "heads", "step"])
def _offsets_kernel(
    neurons,  # [count], sorted
    offsets,  # [heads]
    count,
    heads,
    step,  # a power of two above count
    BLOCK: tl.constexpr,
):
    """Counts the slots of lower neurons by bisection."""
    head = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    below = tl.zeros([BLOCK], tl.int64)
    while step > 1:
        step = step // 2
        probe = below + step
        neuron = tl.load(neurons + probe - 1, mask=probe <= count, other=0)
        below = tl.where((probe <= count) & (neuron < head), probe, below)
    tl.store(offsets + head, below, mask=head < heads)


@jit(do_not_specialize=["count", "blocks", "block_rows"])
def segment_kernel(
    neurons,  # [count], sorted
    slots,  # [count]
    offsets,  # [R + 1] if OFFSETS
    coefficients,  # [count]
    gates,  # [count]: where one is <= 0, the coefficient counts as 0
    vectors,  # [B, D]
    weight,  # [R, D]
    gradient,  # [programs, D]
    bias_gradient,  # [R]
    products,  # [tiles, count]: <vectors[b], weight[neuron]> of each slot
    squares,  # [tiles, blocks, programs] fp64, in whose range squares of fp32 are: of gradient
    touched,  # [programs] uint8: whether a coefficient of the neuron is not zero
    count,
    width,
    blocks,
    block_rows,
    vectors_stride,
    weight_stride,
    gradient_stride,
    K: tl.constexpr,
    OFFSETS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    COMPACT: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums coefficient * vector over each neuron's slots, SLOTS at a time and in order."""
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if OFFSETS:
        neuron = head
        cursor = tl.load(offsets + head)
        stop = tl.load(offsets + head + 1)
    else:
        neuron = tl.load(neurons + head).to(tl.int64)
        previous = tl.load(neurons + head - 1, mask=head > 0, other=-1).to(tl.int64)
        cursor = head
        stop = tl.where(neuron != previous, count, head)
    occupied = cursor != stop
    column = tile * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if PRODUCTS:
        source = weight + neuron * weight_stride + column
        row = tl.load(source, mask=inside & occupied, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    total_coefficient = 0.0
    active = 0
    while cursor < stop:
        here = cursor + tl.arange(0, SLOTS)
        mine = here < stop
        if not OFFSETS:
            mine = mine & (tl.load(neurons + here, mask=mine, other=-1) == neuron)
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
            if GATED:
                gate = tl.load(gates + slot, mask=mine, other=0)
                coefficient = tl.where(gate <= 0, 0.0, coefficient)
            # A slot of coefficient 0 passes nothing of an infinite vector either.
            term = tl.where((coefficient != 0)[:, None], coefficient[:, None] * vector, 0.0)
            total += tl.sum(term, axis=0)
            total_coefficient += tl.sum(coefficient)
            active += tl.sum((coefficient != 0).to(tl.int32))
        cursor += SLOTS
        if not OFFSETS:
            stop = tl.where(tl.sum(mine.to(tl.int32)) == SLOTS, stop, cursor)
    if GRADIENT:
        target = gradient + head * gradient_stride + column
        if COMPACT:
            tl.store(target, total, mask=inside & occupied)
            wide = tl.where(inside, total, 0.0).to(tl.float64)
            block = tl.arange(0, BLOCKS)
            programs = tl.num_programs(0).to(tl.int64)
            at = squares + (tile * blocks + block) * programs + head
            own = tl.where(block == neuron // block_rows, tl.sum(wide * wide), 0.0)
            tl.store(at, own, mask=block < blocks)
            if tile == 0:
                tl.store(touched + head, tl.minimum(active, 1).to(tl.uint8))
        else:
            tl.store(target, total, mask=inside)
            if BIAS and tile == 0:
                tl.store(bias_gradient + neuron, total_coefficient)


def walk(
    order: Order,
    slots_per_sample: int,
    vectors: Tensor,
    *,
    coefficients: Tensor | None = None,
    gates: Tensor | None = None,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    bias_gradient: Tensor | None = None,
    products: Tensor | None = None,
    squares: Tensor | None = None,
    touched: Tensor | None = None,
    block_rows: int = 1,
) -> None:
    """Launches segment_kernel without the outputs that are None; vectors [B, D] of unit stride."""
    count, width = len(order.slots), vectors.shape[1]
    networks = 1 if squares is None else squares.shape[1]
    chosen = _tuning.config("segments", vectors.device, width=width)
    with torch.cuda.device_of(vectors):
        segment_kernel[(order.programs, tiles(width, vectors.device))](
            order.neurons,
            order.slots,
            order.slots if order.offsets is None else order.offsets,
            vectors if coefficients is None else coefficients,
            vectors if gates is None else gates,
            vectors,
            vectors if weight is None else weight,
            vectors if gradient is None else gradient,
            vectors if bias_gradient is None else bias_gradient,
            vectors if products is None else products,
            vectors if squares is None else squares,
            vectors if touched is None else touched,
            count,
            width,
            networks,
            block_rows,
            vectors.stride(0),
            0 if weight is None else weight.stride(0),
            0 if gradient is None else gradient.stride(0),
            K=max(1, slots_per_sample),
            OFFSETS=order.offsets is not None,
            PRODUCTS=products is not None,
            GRADIENT=gradient is not None,
            GATED=gates is not None,
            BIAS=bias_gradient is not None,
            COMPACT=squares is not None,
            BLOCKS=1 << (networks - 1).bit_length(),
            **chosen,
        )


def tiles(width: int, device: torch.device) -> int:
    """Programs per row of this width in `walk`; one for a row of no columns."""
    return max(1, -(-width // _tuning.config("segments", device, width=width)["BLOCK"]))


def _row_gradients_like(
    coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int, bias: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    sums = inputs.new_empty(neurons if bias else 0)
    return inputs.new_empty(neurons, inputs.shape[1]), sums


@_op.operator("ssd_kernels::row_gradients", _row_gradients_like)
def row_gradients(
    coefficients: Tensor,
    inputs: Tensor,
    indices: Tensor,
    neurons: int,
    bias: bool,
    gates: Tensor | None,
    order: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """reference.row_gradient [R, d] in Triton; with `bias` also the sums of coefficients [R].

    coefficients, indices [B, K]; inputs [B, d]; fp32 sums, results in the dtype of inputs.
    gates [B, K]: where one is <= 0, the coefficient counts as 0. order: of the indices, if known,
    else empty.
    """
    gradient, sums = _row_gradients_like(coefficients, inputs, indices, neurons, bias)
    walk(
        Order(*order) if order else sorted_slots(indices, neurons),
        indices.shape[-1],
        unit_stride(inputs),
        coefficients=coefficients.contiguous(),
        gates=gates,
        gradient=gradient,
        bias_gradient=sums if bias else None,
    )
    return gradient, sums


def unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()
