"""Clipped, projected SGD with dense gradients, on all rows of several networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd.ops import reference
from ssd_kernels import _dispatch, _op, _tuning
from ssd_kernels._row_step import clip_scale, step_row
from ssd_kernels._triton import jit, tl
from ssd_kernels.reference import by_network
from ssd_kernels.reference import clip_scale as torch_clip_scale
from ssd_kernels.row_update import global_norm, project_

# PARTS: programs that sum up a network's gradient of one matrix, at most.
_tuning.TABLE["squares"] = {"default": (({}, {"PARTS": 128, "BLOCK": 4096, "num_warps": 8}),)}


def dense_update(update: reference.Update, *, impl: str | None = None) -> None:
    """One step of clipped, projected SGD on several matrices of the same neurons, in place.

    Like row_update, but with given gradients and on every row: buffer = momentum * buffer +
    scale * gradient, weight -= lr * buffer, then the projection.

    Args:
        update: weights, gradients and settings.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.
    """
    weights = update.weights
    matrices = [*weights, *update.gradients, *(update.buffers or ())]
    served = all(m.dtype == torch.float32 and m.numel() and m.stride(1) == 1 for m in matrices)
    serve = _dispatch.choose("dense_update", impl, weights[0], served=served)
    with torch.no_grad():
        serve(update)


def _torch(update: reference.Update) -> None:
    """Network by network in place, on a CPU: there the host may read samples and norms."""
    weights, buffers, networks = update.weights, update.buffers, update.networks
    if not weights[0].is_cpu:
        reference.dense_update(update)
        return
    sorts = [weights, update.gradients] + ([] if buffers is None else [buffers])
    for network in range(networks):
        if update.samples is not None and update.samples[network] == 0:
            continue
        own = sorts
        if networks > 1:
            own = [[by_network(t, networks)[network] for t in matrices] for matrices in sorts]
        rate = update.lr[network] if isinstance(update.lr, Tensor) else update.lr
        bound = update.max_norm
        bound = bound[network] if isinstance(bound, Tensor) else bound
        scale = 1.0 if bound is None else torch_clip_scale(global_norm(own[1]), bound).item()
        step = -float(rate) * (scale if buffers is None else 1.0)
        for number, (weight, gradient) in enumerate(zip(*own[:2], strict=True)):
            direction = gradient
            if buffers is not None:
                direction = own[2][number].mul_(update.momentum).add_(gradient, alpha=scale)
            weight.add_(direction, alpha=step)
            normalize = update.normalize is not None and update.normalize[number]
            project_(weight, update.nonnegative, normalize)


@jit(do_not_specialize=["first", "stride", "parts", "size", "next_size"])
def _squares_kernel(
    gradient,  # [S R, D]
    next_gradient,  # [S R, D']
    squares,  # [S, stride] fp64
    first,  # the column of these matrices
    stride,
    parts,  # columns of the first one
    size,  # R D
    next_size,  # R D'
    BLOCK: tl.constexpr,
):
    """Blocks of a network's gradient are dealt out to the programs in turn."""
    part, network = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count, shared, start = size.to(tl.int64), parts.to(tl.int64), part * BLOCK
    if part >= parts:
        gradient = next_gradient
        count = next_size.to(tl.int64)
        shared = tl.num_programs(0).to(tl.int64) - parts
        start = (part - parts) * BLOCK
    gradient += network * count
    total = tl.zeros([BLOCK], tl.float64)
    while start < count:
        at = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < count, other=0.0).to(tl.float64)
        total += value * value
        start += shared * BLOCK
    tl.store(squares + network * stride + first + part, tl.sum(total))


@jit(do_not_specialize=["block_rows", "samples_stride"])
def _dense_apply_kernel(
    gradient,  # [S R, WIDTH]
    weight,  # [S R, WIDTH]
    buffer,  # [S R, WIDTH]
    samples,  # [S]
    squares,  # [S, PARTS] fp64
    lr,  # a number, or [S] if RATES
    max_norm,  # a number, or [S] if BOUNDS
    momentum,
    block_rows,
    samples_stride,
    weight_stride,
    buffer_stride,
    SAMPLES: tl.constexpr,
    RATES: tl.constexpr,
    BOUNDS: tl.constexpr,
    PARTS: tl.constexpr,
    POWER: tl.constexpr,  # the power of two from PARTS on
    WIDTH: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    network = row // block_rows
    moves = tl.load(samples + network * samples_stride) > 0 if SAMPLES else True
    if moves:
        rate = tl.load(lr + network).to(tl.float32) if RATES else lr
        scale = 1.0
        if CLIP:
            bound = tl.load(max_norm + network).to(tl.float32) if BOUNDS else max_norm
            part = tl.arange(0, POWER)
            own = tl.load(squares + network * PARTS + part, mask=part < PARTS, other=0.0)
            scale = clip_scale(tl.sum(own), bound)
        weight += row * weight_stride
        step_row(
            weight,
            buffer + row * buffer_stride,
            gradient + row * WIDTH,
            weight,
            scale,
            rate,
            momentum,
            WIDTH,
            CLAMP,
            NORMALIZE,
            MOMENTUM,
            BLOCK,
        )


def _triton(update: reference.Update) -> None:
    lr, max_norm, weights = update.lr, update.max_norm, list(update.weights)
    _launch(
        weights,
        list(update.gradients),
        lr if isinstance(lr, Tensor) else None,
        0.0 if isinstance(lr, Tensor) else float(lr),
        max_norm if isinstance(max_norm, Tensor) else None,
        None if isinstance(max_norm, Tensor) else max_norm,
        update.nonnegative,
        [False] * len(weights) if update.normalize is None else list(update.normalize),
        update.momentum,
        list(update.buffers or ()),
        update.samples,
        update.networks,
    )


@_op.operator("ssd::dense_update", lambda *_: None, mutates=("weights", "buffers"))
def _launch(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rates: Tensor | None,
    rate: float,
    bounds: Tensor | None,
    bound: float | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
    samples: Tensor | None,
    networks: int,
) -> None:
    """rates, bounds: [S], or None where one number serves; no bound: no clip."""
    device, rows = weights[0].device, weights[0].shape[0]
    gradients = [gradient.contiguous() for gradient in gradients]
    clip = bounds is not None or bound is not None
    chosen = dict(_tuning.config("squares", device))
    most = chosen.pop("PARTS")
    sizes = [gradient.numel() // networks for gradient in gradients]
    parts = [min(most, -(-size // chosen["BLOCK"])) for size in sizes]
    squares = torch.empty(networks, sum(parts), dtype=torch.float64, device=device)
    with torch.cuda.device_of(weights[0]):
        for first in range(0, len(gradients) if clip else 0, 2):
            last = min(first + 1, len(gradients) - 1)
            _squares_kernel[(sum(parts[first : first + 2]), networks)](
                gradients[first],
                gradients[last],
                squares,
                sum(parts[:first]),
                sum(parts),
                parts[first],
                sizes[first],
                sizes[last],
                **chosen,
            )
        for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            width = weight.shape[1]
            buffer = buffers[number] if buffers else weight
            _dense_apply_kernel[(rows,)](
                gradient,
                weight,
                buffer,
                squares if samples is None else samples,
                squares,
                rate if rates is None else rates.contiguous(),
                (bound or 0.0) if bounds is None else bounds.contiguous(),
                float(momentum),
                rows // networks,
                0 if samples is None else samples.stride(0),
                weight.stride(0),
                buffer.stride(0),
                SAMPLES=samples is not None,
                RATES=rates is not None,
                BOUNDS=bounds is not None,
                PARTS=sum(parts),
                POWER=1 << (sum(parts) - 1).bit_length(),
                WIDTH=width,
                CLIP=clip,
                CLAMP=nonnegative,
                NORMALIZE=bool(normalize[number]),
                MOMENTUM=bool(buffers),
                **_tuning.config("row_update", device, width=width),
            )


_dispatch.register("dense_update", reference=reference.dense_update, torch=_torch, triton=_triton)
