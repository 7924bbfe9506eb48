"""The Triton ops as torch.library operators: how torch.compile sees them.

A compiled graph calls these, with fake implementations for shapes and with autograd; an eager call
goes to the launcher directly, because crossing this boundary costs more than a small kernel.
_dispatch.choose makes the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _dispatch, reference
from ssd_kernels.count_active import _triton as count_triton
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_update import _triton as update_triton
from ssd_kernels.sparse_linear import gather_triton, gradients_triton
from ssd_kernels.topk import MAX_K, select_triton


@torch.library.custom_op("ssd_kernels::topk", mutates_args=())
def topk_op(
    scores: Tensor, k: int, boost: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return select_triton(scores, k, boost, mask)


@topk_op.register_fake
def _(scores: Tensor, k: int, boost: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, _, mask = inputs
    ctx.save_for_backward(output[1], mask)
    ctx.shape = scores.shape
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx: Any, grad_values: Tensor, _: Any) -> tuple[Any, ...]:
    indices, mask = ctx.saved_tensors
    if mask is not None:
        grad_values = grad_values * mask[indices]
    return grad_values.new_zeros(ctx.shape).scatter(1, indices, grad_values), None, None, None


topk_op.register_autograd(_topk_backward, setup_context=_topk_context)


def topk(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    if k > MAX_K or scores.dtype not in _dispatch.TRITON_DTYPES:
        return reference.topk(scores, k, boost=boost, mask=mask)
    values, indices = topk_op(scores.reshape(-1, scores.shape[-1]), k, boost, mask)
    shape = (*scores.shape[:-1], k)
    return TopKOutput(values.view(shape), indices.view(shape))


@torch.library.custom_op("ssd_kernels::sparse_linear", mutates_args=())
def sparse_linear_op(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return gather_triton(values, indices, weight, bias)


@sparse_linear_op.register_fake
def _(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_empty(values.shape[0], weight.shape[1])


@torch.library.custom_op("ssd_kernels::sparse_linear_backward", mutates_args=())
def sparse_linear_backward_op(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    need_values: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of values and weight; an empty tensor for one that is not needed."""
    grad_values, grad_weight = gradients_triton(
        grad_out, values, indices, weight, need_values, need_weight
    )
    return (
        values.new_empty(0) if grad_values is None else grad_values,
        weight.new_empty(0) if grad_weight is None else grad_weight,
    )


@sparse_linear_backward_op.register_fake
def _(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    need_values: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        values.new_empty(values.shape if need_values else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _sparse_linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sparse_linear_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    need_values, _, need_weight, need_bias = ctx.needs_input_grad
    grad_values = grad_weight = None
    if need_values or need_weight:
        grad_values, grad_weight = sparse_linear_backward_op(
            grad_out, *ctx.saved_tensors, need_values, need_weight
        )
    return (
        grad_values if need_values else None,
        None,
        grad_weight if need_weight else None,
        grad_out.sum(0) if need_bias else None,
    )


sparse_linear_op.register_autograd(_sparse_linear_backward, setup_context=_sparse_linear_context)


def sparse_linear(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    if values.dtype not in _dispatch.TRITON_DTYPES:
        return reference.sparse_linear(values, indices, weight, bias)
    slots = values.shape[-1]
    rows = values.shape[:-1].numel()
    out = sparse_linear_op(values.reshape(rows, slots), indices.reshape(rows, slots), weight, bias)
    return out.view(*values.shape[:-1], weight.shape[1])


@torch.library.custom_op("ssd_kernels::count_active", mutates_args=("counts", "last_active"))
def count_active_op(
    values: Tensor, indices: Tensor, counts: Tensor, last_active: Tensor | None, step: Tensor
) -> None:
    count_triton(values, indices, counts, last_active, step)


@count_active_op.register_fake
def _(
    values: Tensor, indices: Tensor, counts: Tensor, last_active: Tensor | None, step: Tensor
) -> None:
    return None


def count_active(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    last_active: Tensor | None,
    step: int | Tensor,
) -> None:
    now = torch.as_tensor(step, dtype=torch.int64, device=values.device)
    count_active_op(values.detach(), indices, counts, last_active, now)


@torch.library.custom_op("ssd_kernels::row_update", mutates_args=("weights", "buffers"))
def row_update_op(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    lr: float,
    max_norm: float | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
) -> Tensor:
    return update_triton(
        weights,
        coefficients,
        inputs,
        indices,
        lr=lr,
        max_norm=max_norm,
        nonnegative=nonnegative,
        normalize=normalize,
        momentum=momentum,
        buffers=buffers or None,
    )


@row_update_op.register_fake
def _(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    lr: float,
    max_norm: float | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
) -> Tensor:
    dtype = weights[0].dtype
    for weight in weights[1:]:
        dtype = torch.promote_types(dtype, weight.dtype)
    return weights[0].new_empty((), dtype=dtype)


def row_update(
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
    return row_update_op(
        list(weights),
        [c.detach() for c in coefficients],
        [i.detach() for i in inputs],
        indices,
        lr,
        max_norm,
        nonnegative,
        [False] * len(weights) if normalize is None else list(normalize),
        momentum,
        [] if buffers is None else list(buffers),
    )


_dispatch.COMPILED.update(
    topk=topk, sparse_linear=sparse_linear, count_active=count_active, row_update=row_update
)
