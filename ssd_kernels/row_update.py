"""Projected SGD on the rows that a sparse code touches, at a cost free of R."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels._segments import Segments, segments


def row_update(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    *,
    lr: float,
    max_norm: float | None = None,
    nonnegative: bool = False,
    normalize: Sequence[bool] | None = None,
    momentum: float = 0.0,
    buffers: Sequence[Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """One step of clipped, projected SGD on several matrices that share the neurons of one code.

    Row j of the gradient of weights[i] is the sum of coefficients[i][b, s] * inputs[i][b] over the
    slots (b, s) of neuron j. That is the whole gradient of a k-sparse layer: for an encoder the
    inputs are x and the coefficients the gradients of the values; for a decoder the inputs are the
    gradients of the output and the coefficients the values. A row is touched if one of its slots
    has a non-zero coefficient for any of the weights; every other row keeps its bits. For plain SGD
    that equals the dense step up to the rounding of renormalising rows that did not move.

    Args:
        weights: matrices [R, d_i], updated in place.
        coefficients: [B, K] each. inputs: [B, d_i] each. indices: [B, K] int64.
        lr: learning rate.
        max_norm: clips the global L2 norm of the gradients, as clip_grad_norm_; None: no clip.
        nonnegative: clamp touched rows at 0 after the step (SDMLP).
        normalize: for each matrix, whether touched rows are then scaled to unit L2 norm; an
            all-zero row stays zero.
        momentum, buffers: heavy-ball momentum with buffers shaped like weights, updated in place.
            Lazy: the buffer of an untouched row rests and does not move it.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        The global gradient norm before clipping, 0-d.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit, before any work.
    """
    _check(weights, coefficients, inputs, indices, normalize, momentum, buffers)
    serve = _dispatch.choose("row_update", IMPLEMENTATIONS, impl, weights[0])
    with torch.no_grad():
        return serve(
            weights,
            coefficients,
            inputs,
            indices,
            lr=lr,
            max_norm=max_norm,
            nonnegative=nonnegative,
            normalize=normalize,
            momentum=momentum,
            buffers=buffers,
        )


def row_gradient(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> Tensor:
    """reference.row_gradient at a cost of B K d plus one zeroed [R, d]."""
    gradient = inputs.new_zeros(neurons, inputs.shape[-1])
    group = segments(indices, coefficients != 0)
    gradient[group.neurons] = _segment_sum(coefficients, inputs, group)
    return gradient


def _torch(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    *,
    lr: float,
    max_norm: float | None,
    nonnegative: bool,
    normalize: Sequence[bool] | None,
    momentum: float,
    buffers: Sequence[Tensor] | None,
) -> Tensor:
    touched = torch.stack([c != 0 for c in coefficients]).any(0)
    group = segments(indices, touched)
    gradients = [_segment_sum(c, i, group) for c, i in zip(coefficients, inputs, strict=True)]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    scale = reference.clip_scale(norm, max_norm)
    for number, (weight, direction) in enumerate(zip(weights, gradients, strict=True)):
        direction *= scale
        if buffers is not None:
            direction += momentum * buffers[number][group.neurons]
            buffers[number][group.neurons] = direction
        row_norm = normalize is not None and normalize[number]
        rows = weight[group.neurons].sub_(direction, alpha=lr)
        weight[group.neurons] = reference.project(rows, nonnegative, row_norm)
    return norm


def _segment_sum(coefficients: Tensor, inputs: Tensor, group: Segments) -> Tensor:
    """[n, d]: for each neuron of the group, the sum of coefficient * input over its slots."""
    if not len(group.slots):
        return inputs.new_zeros(0, inputs.shape[-1])
    samples = group.slots // coefficients.shape[-1]
    return F.embedding_bag(
        samples,
        inputs,
        group.offsets,
        mode="sum",
        per_sample_weights=coefficients.flatten()[group.slots],
    )


def _check(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    normalize: Sequence[bool] | None,
    momentum: float,
    buffers: Sequence[Tensor] | None,
) -> None:
    op = "row_update"
    if not weights:
        raise ValueError(f"{op}: weights is empty; give at least one matrix [R, d]")
    for name, given in (
        ("coefficients", coefficients),
        ("inputs", inputs),
        ("normalize", normalize),
        ("buffers", buffers),
    ):
        if given is not None and len(given) != len(weights):
            raise ValueError(f"{op}: {len(given)} {name} for {len(weights)} weights")
    if (momentum != 0.0) != (buffers is not None):
        raise ValueError(f"{op}: momentum={momentum} and buffers must be given together")
    neurons = weights[0].shape[0]
    for number, weight in enumerate(weights):
        coefficient, vector = coefficients[number], inputs[number]
        _checks.floating(op, weight=weight, coefficients=coefficient, inputs=vector)
        _checks.code(op, coefficient, indices)
        if weight.dim() != 2 or weight.shape[0] != neurons:
            raise ValueError(
                f"{op}: weights[{number}] has shape {list(weight.shape)}, expected [{neurons}, d]"
            )
        _checks.shape(op, f"inputs[{number}]", vector, (len(indices), weight.shape[1]))
        if buffers is not None:
            _checks.shape(op, f"buffers[{number}]", buffers[number], tuple(weight.shape))


IMPLEMENTATIONS = {"reference": reference.row_update, "torch": _torch}
