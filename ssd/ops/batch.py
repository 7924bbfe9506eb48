"""The two ends of a training step: draw the batch, and add up its losses and hits.

S learners with N stored samples each draw side by side, B samples each. The host reads nothing,
so a captured step moves from batch to batch by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd.ops import reference
from ssd_kernels import _dispatch, _op, _tuning
from ssd_kernels._triton import jit, tl
from ssd_kernels.reference import accumulation_dtype

_tuning.TABLE["draw_batch"] = {
    "default": (
        ({"width": 256}, {"BLOCK": 256, "num_warps": 2}),
        ({}, {"BLOCK": 1024, "num_warps": 4}),
    ),
}
_tuning.TABLE["tally"] = {
    "default": (
        ({"classes": 16}, {"SAMPLES": 128, "BLOCK": 16, "num_warps": 4}),
        ({}, {"SAMPLES": 16, "BLOCK": 128, "num_warps": 4}),
    ),
}


class Drawn(NamedTuple):
    """A batch of S learners; zeros where a learner has no more samples."""

    address: Tensor  # [S B, d]
    labels: Tensor  # [S B] int64
    weight: Tensor  # [S B] in the dtype of sums: 1 / (samples of the learner in the batch)
    target_logits: Tensor | None  # [S B, C]
    target_hidden: Tensor | None  # [S B, n]
    gaba: Tensor | None  # [S R]; 1 where a learner rests, so that none of its neurons is excited


def draw_batch(stored: reference.Stored, *, impl: str | None = None) -> Drawn:
    """Draw batch number `position` of every learner, and the response of its neurons to inhibition.

    Sample b of learner s is its stored sample order[s, position B + b]; there is none from
    samples[s] on.

    Args:
        stored: what is drawn from.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        New tensors; None for what is not stored.
    """
    served = _float32(stored.inputs, stored.target_logits, stored.target_hidden)
    serve = _dispatch.choose("draw_batch", impl, stored.inputs, served=served)
    with torch.no_grad():
        return Drawn(*serve(stored))


def tally(batch: reference.Tally, *, impl: str | None = None) -> None:
    """Add a batch to the sums of its learners and advance the position, all in place.

    Args:
        batch: losses and logits, and the sums.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.
    """
    served = _float32(batch.loss, batch.logits, batch.weight)
    serve = _dispatch.choose("tally", impl, batch.logits, served=served)
    with torch.no_grad():
        serve(batch)


def _float32(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == torch.float32 for t in tensors)


def _torch_draw(stored: reference.Stored) -> tuple[Tensor | None, ...]:
    """The specification, but without masks where a CPU draws whole batches."""
    inputs, order, size = stored.inputs, stored.order, stored.size
    first, learners = int(stored.position) * size if inputs.is_cpu else 0, len(order)
    if not inputs.is_cpu or first + size > int(stored.samples.min()):
        return reference.draw_batch(stored)
    row = order[:, first : first + size]
    if learners > 1:
        step = len(inputs) // learners
        row = row + torch.arange(0, len(inputs), step, device=row.device).unsqueeze(1)
    row = row.flatten()
    drawn = [
        None if t is None else t.index_select(0, row)
        for t in (inputs, stored.labels, stored.target_logits, stored.target_hidden)
    ]
    weight = inputs.new_full((len(row),), 1 / size, dtype=accumulation_dtype(inputs.dtype))
    gaba = reference.gaba(stored.counts, stored.anneal_samples, inputs.dtype)
    return *drawn[:2], weight, *drawn[2:], gaba


@jit
def _copy_row(source, target, row, program, real, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """target[program] = source[row], or zeros."""
    width = tl.where(real, WIDTH, 0)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(source + row * WIDTH + column, mask=column < width, other=0.0)
        tl.store(target + program * WIDTH + column, value, mask=column < WIDTH)


@jit(do_not_specialize=["learners", "size", "stored", "longest", "neurons"])
def _draw_kernel(
    inputs,  # [S N, D]
    labels,  # [S N]
    order,  # [S, M]
    samples,  # [S]
    position,  # 0-d
    target_logits,  # [S N, C]
    target_hidden,  # [S N, H]
    counts,  # [S R]
    anneal_samples,  # [S]
    address,  # [S B, D]
    drawn_labels,  # [S B]
    weight,  # [S B]
    drawn_logits,  # [S B, C]
    drawn_hidden,  # [S B, H]
    gaba,  # [S R]
    learners,  # S
    size,  # B
    stored,  # N
    longest,  # M
    neurons,  # R
    D: tl.constexpr,
    C: tl.constexpr,  # 0: there are none
    H: tl.constexpr,
    GABA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a sample, then programs for the gaba of BLOCK neurons each."""
    program = tl.program_id(0).to(tl.int64)
    drawn = learners.to(tl.int64) * size
    if program < drawn:
        learner = program // size
        first = tl.load(position) * size
        place = first + program % size
        available = tl.load(samples + learner)
        real = place < available
        row = learner * stored + tl.load(order + learner * longest + place, mask=real, other=0)
        taken = tl.minimum(available - first, size).to(tl.float32)
        tl.store(drawn_labels + program, tl.load(labels + row, mask=real, other=0))
        share = tl.div_rn(tl.full([], 1.0, tl.float32), tl.maximum(taken, 1.0))
        tl.store(weight + program, tl.where(real, share, 0.0))
        _copy_row(inputs, address, row, program, real, D, BLOCK)
        if C > 0:
            _copy_row(target_logits, drawn_logits, row, program, real, C, BLOCK)
        if H > 0:
            _copy_row(target_hidden, drawn_hidden, row, program, real, H, BLOCK)
    elif GABA:
        neuron = (program - drawn) * BLOCK + tl.arange(0, BLOCK)
        inside = neuron < learners.to(tl.int64) * neurons
        count = tl.load(counts + neuron, mask=inside, other=0).to(tl.float32)
        anneal = tl.load(anneal_samples + neuron // neurons, mask=inside, other=1)
        ratio = tl.div_rn(2.0 * count, anneal.to(tl.float32))
        response = tl.clamp(ratio - 1.0, -1.0, 1.0)
        resting = tl.load(samples + neuron // neurons, mask=inside, other=1) == 0
        tl.store(gaba + neuron, tl.where(resting, 1.0, response), mask=inside)


def _triton_draw(stored: reference.Stored) -> tuple[Tensor | None, ...]:
    drawn = _draw(*stored)
    optional = stored.target_logits, stored.target_hidden, stored.counts
    kept = [None if given is None else t for given, t in zip(optional, drawn[3:], strict=True)]
    return *drawn[:3], *kept


def _draw_like(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    stored = reference.Stored(*arguments)
    rows, new = len(stored.order) * stored.size, stored.inputs.new_empty
    targets = stored.target_logits, stored.target_hidden
    logits, hidden = (new(0 if t is None else (rows, t.shape[1])) for t in targets)
    gaba = new(0 if stored.counts is None else stored.counts.shape)
    address = new(rows, stored.inputs.shape[1])
    return address, stored.labels.new_empty(rows), new(rows), logits, hidden, gaba


@_op.operator("ssd::draw_batch", _draw_like)
def _draw(
    inputs: Tensor,
    labels: Tensor,
    order: Tensor,
    samples: Tensor,
    position: Tensor,
    size: int,
    target_logits: Tensor | None,
    target_hidden: Tensor | None,
    counts: Tensor | None,
    anneal_samples: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like draw_batch, with empty tensors in place of None."""
    optional = target_logits, target_hidden, counts, anneal_samples
    drawn = _draw_like(inputs, labels, order, samples, position, size, *optional)
    learners, longest = order.shape
    widths = [0 if t is None else t.shape[1] for t in (inputs, target_logits, target_hidden)]
    chosen = _tuning.config("draw_batch", inputs.device, width=max(widths))
    programs = learners * size - (-drawn[5].numel() // chosen["BLOCK"])
    with torch.cuda.device_of(inputs):
        _draw_kernel[(programs,)](
            inputs.contiguous(),
            labels.contiguous(),
            order.contiguous(),
            samples.contiguous(),
            position,
            *(inputs if t is None else t.contiguous() for t in optional),
            *drawn,
            learners,
            size,
            len(inputs) // learners,
            longest,
            drawn[5].numel() // learners,
            D=widths[0],
            C=widths[1],
            H=widths[2],
            GABA=counts is not None,
            **chosen,
        )
    return drawn


@jit(do_not_specialize=["size"])
def _tally_kernel(
    loss,  # [S B]
    logits,  # [S B, C]
    labels,  # [S B]
    weight,  # [S B]
    wider,  # [S B] uint8
    loss_sum,  # [S]
    correct,  # [S]
    seen,  # [S]
    overflow,  # [S] uint8
    position,  # 0-d
    size,  # B
    loss_stride,
    correct_stride,
    seen_stride,
    overflow_stride,
    C: tl.constexpr,
    WIDER: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a learner."""
    learner = tl.program_id(0).to(tl.int64)
    total = tl.zeros([SAMPLES], tl.float64)
    hits = tl.zeros([SAMPLES], tl.int64)
    count = tl.zeros([SAMPLES], tl.int64)
    crowded = tl.zeros([SAMPLES], tl.int32)
    start = 0
    while start < size:
        sample = start + tl.arange(0, SAMPLES)
        row = learner * size + sample
        real = tl.load(weight + row, mask=sample < size, other=0.0) > 0
        total += tl.load(loss + row, mask=real, other=0.0).to(tl.float64)
        label = tl.load(labels + row, mask=real, other=0)
        own = tl.load(logits + row * C + label, mask=real, other=0.0)[:, None]
        # How many classes torch.argmax takes before the label's: NaN is largest, then the first.
        better = tl.zeros([SAMPLES], tl.int32)
        for first in range(0, C, BLOCK):
            column = first + tl.arange(0, BLOCK)[None, :]
            inside = real[:, None] & (column < C)
            other = tl.load(logits + row[:, None] * C + column, mask=inside, other=0.0)
            above = (other > own) | ((other != other) & (own == own))
            tied = (other == own) | ((other != other) & (own != own))
            above = inside & (above | (tied & (column < label[:, None])))
            better += tl.sum(above.to(tl.int32), axis=1)
        hits += (real & (better == 0)).to(tl.int64)
        count += real.to(tl.int64)
        if WIDER:
            crowded |= tl.load(wider + row, mask=real, other=0).to(tl.int32)
        start += SAMPLES
    loss_sum += learner * loss_stride
    correct += learner * correct_stride
    seen += learner * seen_stride
    tl.store(loss_sum, tl.load(loss_sum) + tl.sum(total))
    tl.store(correct, tl.load(correct) + tl.sum(hits))
    tl.store(seen, tl.load(seen) + tl.sum(count))
    if WIDER:
        overflow += learner * overflow_stride
        before = tl.load(overflow).to(tl.int32)
        tl.store(overflow, ((before | tl.max(crowded)) != 0).to(tl.uint8))
    if learner == 0:
        tl.store(position, tl.load(position) + 1)


@_op.operator(
    "ssd::tally",
    lambda *_: None,
    mutates=("loss_sum", "correct", "seen", "position", "overflow"),
)
def _triton_tally(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    loss_sum: Tensor,
    correct: Tensor,
    seen: Tensor,
    position: Tensor,
    wider: Tensor | None,
    overflow: Tensor | None,
) -> None:
    learners, classes = len(loss_sum), logits.shape[1]
    chosen = _tuning.config("tally", logits.device, classes=classes)
    watched = wider is not None and overflow is not None
    with torch.cuda.device_of(logits):
        _tally_kernel[(learners,)](
            loss.contiguous(),
            logits.contiguous(),
            labels.contiguous(),
            weight.contiguous(),
            wider.contiguous().view(torch.uint8) if wider is not None else weight,
            loss_sum,
            correct,
            seen,
            overflow.view(torch.uint8) if overflow is not None else seen,
            position,
            len(loss) // learners,
            loss_sum.stride(0),
            correct.stride(0),
            seen.stride(0),
            overflow.stride(0) if overflow is not None else 1,
            C=classes,
            WIDER=watched,
            **chosen,
        )


_dispatch.register(
    "draw_batch", reference=reference.draw_batch, torch=_torch_draw, triton=_triton_draw
)
# Few operators, all of them fast, so the specification also serves as the torch path.
_dispatch.register(
    "tally",
    reference=reference.tally,
    torch=reference.tally,
    triton=lambda batch: _triton_tally(*batch),
)
