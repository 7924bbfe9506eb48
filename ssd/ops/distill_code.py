"""Decode a sparse code, then the loss of `distill` and its gradients, in one launch on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.ops import reference
from ssd.ops.distill import (
    MAX_COLUMNS,
    Objective,
    distill,
    hidden_term,
    logits_loss,
    power,
    settings_of,
)
from ssd_kernels import _checks, _dispatch, _op, _tuning
from ssd_kernels._segments import unit_stride
from ssd_kernels._triton import jit, tl
from ssd_kernels.reference import accumulation_dtype

# TILE: slots times columns that a program holds at a time.
_tuning.TABLE["distill_code"] = {
    "default": (
        ({"columns": 256}, {"TILE": 2048, "num_warps": 4}),
        ({}, {"TILE": 4096, "num_warps": 8}),
    ),
}


class CodeLoss(NamedTuple):
    """What `distill_code` returns."""

    logits: Tensor  # [B, C]
    loss: Tensor  # [B]
    grad_logits: Tensor  # [B, C], of weight[b] loss[b]
    grad_values: Tensor  # [B, K], of weight[b] loss[b], through logits and hidden; 0 if inactive


def distill_code(
    values: Tensor,
    indices: Tensor,
    decoder: Tensor,
    labels: Tensor,
    target_logits: Tensor | None = None,
    target_hidden: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    impl: str | None = None,
    **options: Any,
) -> CodeLoss:
    """Decode a code into logits; `distill` them and the code's neurons in a subnetwork.

    Args:
        values: [B, K] floating.
        indices: [B, K] int64 in 0..R-1, distinct within a sample but for slots of value 0.
        decoder: [R, C].
        labels: [B] int64 in 0..C-1.
        target_logits: [B, C], the teacher's.
        target_hidden: [B, n], the teacher's; goes with positions.
        positions: [R] int64, where each neuron stands in the subnetwork: 0..n-1, or n for none.
        impl: "triton" or "numba" (float32 alone), "torch" or "reference"; by default the fastest.
        options: alpha, lam, temperature, kl, columns, weight, hidden_loss and hidden_weight, as in
            distill.

    Returns:
        Logits, loss and gradients, without autograd. A value that is not > 0 has gradient 0.

    Raises:
        TypeError, ValueError: with PyTorch, what distill raises; with numba, shapes, labels or
            indices that do not fit. Triton checks nothing.
    """
    objective = Objective(labels, target_logits, target_hidden, **options)
    units = 1 if target_hidden is None else target_hidden.shape[1]
    sizes = *values.shape, decoder.shape[1], units
    served = min(sizes) > 0 and max(sizes[2:]) <= MAX_COLUMNS and values.dtype == torch.float32
    looped = objective.looped(*sizes[2:], values, decoder)
    serve = _dispatch.choose("distill_code", impl, values, "torch", served, looped)
    with torch.no_grad():
        return serve(values, indices, decoder, positions, objective)


def _reference(
    values: Tensor, indices: Tensor, decoder: Tensor, positions: Tensor | None, objective: Objective
) -> CodeLoss:
    options = objective._asdict()
    weight = options.pop("weight")
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        logits, loss = reference.distill_code(
            leaf, indices, decoder, positions=positions, **options
        )
        total = loss.sum() if weight is None else loss @ weight.to(loss.dtype)
        slopes = torch.autograd.grad(total, [logits, leaf])
    return CodeLoss(logits.detach(), loss.detach(), slopes[0], slopes[1].where(values > 0, 0.0))


def _torch(
    values: Tensor, indices: Tensor, decoder: Tensor, positions: Tensor | None, objective: Objective
) -> CodeLoss:
    dtype, wide = values.dtype, accumulation_dtype(values.dtype)
    values, rows = values.to(wide), F.embedding(indices, decoder).to(wide)
    logits = (rows * values.unsqueeze(2)).sum(1)
    hidden, places = None, indices
    targets = objective.target_logits, objective.target_hidden
    target_logits, target_hidden = (None if t is None else t.to(wide) for t in targets)
    if target_hidden is not None and positions is not None:
        places = positions.take(indices)
        hidden = reference.at_places(values, places, target_hidden.shape[1])
    widened = objective._replace(target_logits=target_logits, target_hidden=target_hidden)
    output = distill(logits, hidden=hidden, **widened._asdict(), impl="torch")
    grad_values = (rows * output.grad_logits.unsqueeze(1)).sum(2)
    if output.grad_hidden is not None:
        grad_values += F.pad(output.grad_hidden, (0, 1)).gather(1, places)
    results = (logits, output.loss, output.grad_logits, grad_values.where(values > 0, 0.0))
    return CodeLoss(*(result.to(dtype) for result in results))


def _numba(
    values: Tensor, indices: Tensor, decoder: Tensor, positions: Tensor | None, objective: Objective
) -> CodeLoss:
    from ssd.ops import _loops

    rows, (neurons, classes), given = len(values), decoder.shape, objective
    units = 0 if given.target_hidden is None else given.target_hidden.shape[1]
    if given.target_hidden is not None and positions is None:
        raise ValueError("distill_code: target_hidden and positions must be given together")
    for name, tensor, shape in (
        ("indices", indices, tuple(values.shape)),
        ("labels", given.labels, (rows,)),
        ("target_logits", given.target_logits, (rows, classes)),
        ("columns", given.columns, (rows, classes)),
        ("positions", positions, (neurons,)),
        ("target_hidden", given.target_hidden, (rows, units)),
        ("weight", given.weight, (rows,)),
    ):
        _checks.shape("distill_code", name, tensor, shape)
    code = _loops.array(values, rows), _loops.array(indices, rows)
    places = _loops.array(given.labels if positions is None else positions, rows)
    logits, grad_logits = (values.new_empty(rows, classes) for _ in range(2))
    loss, grad_values = values.new_empty(rows), values.new_empty(values.shape)
    outputs = logits.numpy(), loss.numpy(), grad_logits.numpy(), grad_values.numpy()
    targets, settings = given.for_loops()
    matrix = _loops.array(decoder, rows)
    if not _loops.distill_code(code, matrix, places, targets, settings, outputs):
        _checks.in_range("distill_code", "labels", given.labels, classes)
        _checks.in_range("distill_code", "indices", indices, neurons)
    return CodeLoss(logits, loss, grad_logits, grad_values)


@jit
def _distill_code_kernel(
    values,  # [B, K]
    indices,  # [B, K] int64
    decoder,  # [R, C]
    labels,  # [B]
    target_logits,  # [B, C]
    target_hidden,  # [B, n]
    positions,  # [R] int64
    columns,  # [B, C] bool
    alpha,  # [B] if EACH, else a number; so are the next three
    lam,
    temperature,
    hidden_weight,
    weight,  # [B]
    logits,  # [B, C]
    loss,  # [B]
    grad_logits,  # [B, C]
    grad_values,  # [B, K]
    decoder_stride,
    K: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    EACH: tl.constexpr,
    WEIGHT: tl.constexpr,
    TEACHER: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    FORWARD: tl.constexpr,
    MSE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program a sample; `slots` are walked twice, forth and back."""
    row = tl.program_id(0).to(tl.int64)
    a, of_logits, of_hidden, t = settings_of(row, alpha, lam, temperature, hidden_weight, EACH)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    unit = tl.arange(0, BLOCK_N)
    student = tl.zeros([BLOCK_C], tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, K, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value = tl.load(values + row * K + slot, mask=slot < K, other=0.0)
        used = value != 0
        neuron = tl.load(indices + row * K + slot, mask=used, other=0)
        part = tl.load(
            decoder + neuron[:, None] * decoder_stride + column[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        student += tl.sum(value[:, None] * part, axis=0)
        if HIDDEN:
            place = tl.load(positions + neuron, mask=used, other=N)
            z += tl.sum(tl.where(place[:, None] == unit[None, :], value[:, None], 0.0), axis=0)
    at = row * C + column
    total, gradient = logits_loss(
        student,
        tl.load(labels + row),
        target_logits,
        columns,
        at,
        column,
        inside,
        a,
        of_logits,
        t,
        TEACHER,
        COLUMNS,
        FORWARD,
    )
    slope = tl.zeros([BLOCK_N], tl.float32)
    if HIDDEN:
        entry, real = row * N + unit, unit < N
        term, slope = hidden_term(z, target_hidden, entry, real, of_hidden, t, FORWARD, MSE)
        total += term
    if WEIGHT:
        scale = tl.load(weight + row)
        gradient *= scale
        slope *= scale
    tl.store(logits + at, student, mask=inside)
    tl.store(loss + row, total)
    tl.store(grad_logits + at, gradient, mask=inside)
    for start in range(0, K, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value = tl.load(values + row * K + slot, mask=slot < K, other=0.0)
        active = value > 0
        neuron = tl.load(indices + row * K + slot, mask=active, other=0)
        part = tl.load(
            decoder + neuron[:, None] * decoder_stride + column[None, :],
            mask=active[:, None] & inside[None, :],
            other=0.0,
        )
        back = tl.sum(part * gradient[None, :], axis=1)
        if HIDDEN:
            place = tl.load(positions + neuron, mask=active, other=N)
            here = (place[:, None] == unit[None, :]) & (unit < N)[None, :]
            back += tl.sum(tl.where(here, slope[None, :], 0.0), axis=1)
        tl.store(grad_values + row * K + slot, tl.where(active, back, 0.0), mask=slot < K)


def _triton(
    values: Tensor, indices: Tensor, decoder: Tensor, positions: Tensor | None, objective: Objective
) -> CodeLoss:
    arguments = objective.for_launch()
    return CodeLoss(*_launch(values.detach(), indices, decoder.detach(), positions, *arguments))


def _like(
    values: Tensor, indices: Tensor, decoder: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = len(values), decoder.shape[1]
    empty = values.new_empty
    return empty(shape), empty(len(values)), empty(shape), empty(values.shape)


@_op.operator("ssd::distill_code", _like)
def _launch(
    values: Tensor,
    indices: Tensor,
    decoder: Tensor,
    positions: Tensor | None,
    labels: Tensor,
    target_logits: Tensor | None,
    target_hidden: Tensor | None,
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    kl: str,
    hidden_loss: str,
    columns: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _like(values, indices, decoder)
    (batch, slots), classes = values.shape, decoder.shape[1]
    # Without target_logits a hidden term counts for nothing.
    hidden = target_logits is not None and target_hidden is not None and positions is not None
    units = target_hidden.shape[1] if hidden and target_hidden is not None else 1
    widest = max(power(classes), power(units))
    chosen = dict(_tuning.config("distill_code", values.device, columns=widest))
    decoder = unit_stride(decoder)
    optional = [
        values if t is None else t.contiguous() for t in (target_logits, target_hidden, positions)
    ]
    with torch.cuda.device_of(values):
        _distill_code_kernel[(batch,)](
            values.contiguous(),
            indices.contiguous(),
            decoder,
            labels.contiguous(),
            *optional,
            values if columns is None else columns.contiguous().view(torch.uint8),
            *(tensors or numbers),
            values if weight is None else weight.contiguous(),
            *results,
            decoder.stride(0),
            K=slots,
            C=classes,
            N=units,
            EACH=len(tensors) > 0,
            WEIGHT=weight is not None,
            TEACHER=target_logits is not None,
            HIDDEN=hidden,
            COLUMNS=columns is not None,
            FORWARD=kl == "forward",
            MSE=hidden_loss == "mse",
            SLOTS=max(1, min(power(slots), chosen.pop("TILE") // widest)),
            BLOCK_C=power(classes),
            BLOCK_N=power(units),
            **chosen,
        )
    return results


_dispatch.register("distill_code", reference=_reference, torch=_torch, numba=_numba, triton=_triton)
