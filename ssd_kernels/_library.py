"""The Triton ops as torch.library operators: how torch.compile sees them.

A compiled graph calls these, with fake implementations for shapes and with autograd; an eager call
goes to the launcher directly, because crossing this boundary costs more than a small kernel.
_dispatch.choose makes the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _dispatch, _linear_slabs, reference
from ssd_kernels._segments import row_gradients
from ssd_kernels.code_gram import _triton as gram_triton
from ssd_kernels.count_active import _triton as count_triton
from ssd_kernels.distill import DistillOutput
from ssd_kernels.distill import _triton as distill_triton
from ssd_kernels.linear_inhibit import gradients as inhibit_gradients
from ssd_kernels.linear_topk import heuristic, ranked_triton
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_update import _triton as update_triton
from ssd_kernels.row_update import per_block
from ssd_kernels.sparse_linear import gather_triton, gradients_triton
from ssd_kernels.topk import MAX_K, select_triton
from ssd_kernels.topk import gradient as topk_gradient


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
    return topk_gradient(grad_values, indices, mask, ctx.shape), None, None, None


topk_op.register_autograd(_topk_backward, setup_context=_topk_context)


def topk(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    if k > MAX_K or scores.dtype not in _dispatch.TRITON_DTYPES:
        return reference.topk(scores, k, boost=boost, mask=mask)
    values, indices = topk_op(_dispatch.flattened(scores), k, boost, mask)
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
    code = _dispatch.flattened(values), _dispatch.flattened(indices)
    out = sparse_linear_op(*code, weight, bias)
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
    lr: Tensor,
    max_norm: Tensor | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
    blocks: int,
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
        blocks=blocks,
    )


@row_update_op.register_fake
def _(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    lr: Tensor,
    max_norm: Tensor | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
    blocks: int,
) -> Tensor:
    dtype = weights[0].dtype
    for weight in weights[1:]:
        dtype = torch.promote_types(dtype, weight.dtype)
    return weights[0].new_empty((blocks,) if blocks > 1 else (), dtype=dtype)


def row_update(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    *,
    lr: float | Tensor,
    max_norm: float | Tensor | None,
    nonnegative: bool,
    normalize: Sequence[bool] | None,
    momentum: float,
    buffers: Sequence[Tensor] | None,
    blocks: int,
) -> Tensor:
    device = indices.device
    return row_update_op(
        list(weights),
        [c.detach() for c in coefficients],
        [i.detach() for i in inputs],
        indices,
        per_block(lr, blocks, device),
        None if max_norm is None else per_block(max_norm, blocks, device),
        nonnegative,
        [False] * len(weights) if normalize is None else list(normalize),
        momentum,
        [] if buffers is None else list(buffers),
        blocks,
    )


@torch.library.custom_op("ssd_kernels::row_gradients", mutates_args=())
def row_gradients_op(
    coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int
) -> tuple[Tensor, Tensor]:
    """The row gradients [R, d], and the sums of coefficients [R]."""
    gradient, sums = row_gradients(coefficients, inputs, indices, neurons, bias=True)
    assert sums is not None
    return gradient, sums


@row_gradients_op.register_fake
def _(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> tuple[Tensor, Tensor]:
    return inputs.new_empty(neurons, inputs.shape[1]), inputs.new_empty(neurons)


@torch.library.custom_op("ssd_kernels::code_gram", mutates_args=("gram", "cross"))
def code_gram_op(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    gram_triton(values, indices, gram, cross, targets)


@code_gram_op.register_fake
def _(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    return None


def code_gram(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    if targets is not None:
        targets = targets.detach()
    code_gram_op(values.detach(), indices, gram, cross, targets)


@torch.library.custom_op("ssd_kernels::linear_topk", mutates_args=())
def linear_topk_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, inhibition: str, path: str, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices [B, k], the (k+1)-th activation [B] and its index [B]."""
    return _linear_slabs.code(x, weight, bias, k, inhibition, None, path, blocks)


@linear_topk_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, inhibition: str, path: str, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    indices = x.new_empty(batch, k, dtype=torch.int64)
    return x.new_empty(batch, k), indices, x.new_empty(batch), indices.new_empty(batch)


def _linear_topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, indices, cut, after = output
    ctx.save_for_backward(*inputs[:2], values, indices, cut, after)
    ctx.has_cut = inputs[3] < inputs[1].shape[0] // inputs[-1]
    ctx.mark_non_differentiable(indices, after)
    ctx.set_materialize_grads(False)


def _linear_topk_backward(
    ctx: Any, grad_values: Tensor | None, _: Any, grad_cut: Tensor | None, __: Any
) -> tuple[Any, ...]:
    x, weight, values, indices, cut, after = ctx.saved_tensors
    slots, neurons = [], []
    if grad_values is not None:
        slots.append(torch.where(values <= 0, 0.0, grad_values))
        neurons.append(indices)
    if grad_cut is not None and ctx.has_cut:
        slots.append(torch.where(cut <= 0, 0.0, grad_cut)[:, None])
        neurons.append(after[:, None])
    grads: list[Any] = [None] * 7
    if not slots:
        return tuple(grads)
    coefficients, ranked = torch.cat(slots, dim=1), torch.cat(neurons, dim=1)
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    if need_x:
        grads[0] = sparse_linear_op(coefficients, ranked, weight, None)
    if need_weight:
        grads[1], sums = row_gradients_op(coefficients, x, ranked, weight.shape[0])
        grads[2] = sums if need_bias else None
    elif need_bias:
        ones = coefficients.new_ones(coefficients.shape[0], 1)
        grads[2] = row_gradients_op(coefficients, ones, ranked, weight.shape[0])[1]
    return tuple(grads)


linear_topk_op.register_autograd(_linear_topk_backward, setup_context=_linear_topk_context)


def linear_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    forced: str | None = None,
    inhibition: str,
    threshold: bool,
    preactivations: bool,
    counts: Tensor | None,
    blocks: int,
) -> TopKOutput:
    neurons = weight.shape[0] // blocks
    path = heuristic(x, k)
    if forced is not None and _linear_slabs.possible(forced, x, neurons, k):
        path = forced
    if preactivations or path == "torch":
        return reference.linear_topk(
            x,
            weight,
            k,
            bias,
            inhibition=inhibition,
            threshold=threshold,
            preactivations=preactivations,
            counts=counts,
            blocks=blocks,
            ranking=reference.select if path == "torch" else ranked_triton,
        )
    batch = x.shape[:-1]
    flat = _dispatch.flattened(x)
    values, indices, cut, _ = linear_topk_op(flat, weight, bias, k, inhibition, path, blocks)
    if counts is not None:
        count_active(values, indices, counts, None, 0)
    return TopKOutput(
        values.view(*batch, k), indices.view(*batch, k), cut.view(batch) if threshold else None
    )


@torch.library.custom_op("ssd_kernels::linear_inhibit", mutates_args=())
def linear_inhibit_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """The activations [B, R], and int8 [B, R]: where the gradient passes."""
    return _linear_slabs.inhibit(x, weight, bias, k, gaba, inhibition, None, True, blocks)


@linear_inhibit_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0] // blocks)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int8)


def _linear_inhibit_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.blocks = inputs[-1]
    ctx.mark_non_differentiable(output[1])


def _linear_inhibit_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, passes = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    return *inhibit_gradients(grad, x, weight, passes, ctx.blocks, needs), *[None] * 4


linear_inhibit_op.register_autograd(_linear_inhibit_backward, setup_context=_linear_inhibit_context)


def linear_inhibit(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    counts: Tensor | None,
    blocks: int,
) -> Tensor:
    served = k < MAX_K and x.dtype in _dispatch.TRITON_DTYPES
    learned = gaba is not None and gaba.requires_grad and torch.is_grad_enabled()
    if not served or learned:
        return reference.linear_inhibit(
            x, weight, k, gaba, bias, inhibition=inhibition, counts=counts, blocks=blocks
        )
    flat = _dispatch.flattened(x)
    hidden, _ = linear_inhibit_op(flat, weight, bias, k, gaba, inhibition, blocks)
    if counts is not None:
        counts += reference.by_network(hidden > 0, blocks).sum(1).flatten()
    return hidden.view(*x.shape[:-1], hidden.shape[1])


def row_gradient(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> Tensor:
    gradient: Tensor = row_gradients_op(coefficients, inputs, indices, neurons)[0]
    return gradient


@torch.library.custom_op("ssd_kernels::distill", mutates_args=())
def distill_op(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    alpha: Tensor,
    lam: Tensor,
    temperature: Tensor,
    kl: str,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    output = distill_triton(
        logits,
        labels,
        target_logits,
        hidden,
        target_hidden,
        alpha=alpha,
        lam=lam,
        temperature=temperature,
        kl=kl,
        columns=columns,
    )
    slopes = output.grad_hidden
    return output.loss, output.grad_logits, logits.new_empty(0) if slopes is None else slopes


@distill_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    alpha: Tensor,
    lam: Tensor,
    temperature: Tensor,
    kl: str,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    slopes = logits.new_empty(0) if hidden is None else hidden.new_empty(hidden.shape)
    return logits.new_empty(len(logits)), logits.new_empty(logits.shape), slopes


def distill(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None,
    hidden: Tensor | None,
    target_hidden: Tensor | None,
    *,
    alpha: float | Tensor,
    lam: float | Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None,
) -> DistillOutput:
    settings = [
        value.to(torch.float32)
        if isinstance(value, Tensor)
        else torch.full((len(logits),), float(value), device=logits.device)
        for value in (alpha, lam, temperature)
    ]
    loss, grad_logits, grad_hidden = distill_op(
        logits, labels, target_logits, hidden, target_hidden, *settings, kl, columns
    )
    return DistillOutput(loss, grad_logits, None if hidden is None else grad_hidden)


_OPERATORS: tuple[Callable[..., Any], ...] = (
    topk,
    linear_topk,
    linear_inhibit,
    sparse_linear,
    row_gradient,
    code_gram,
    count_active,
    distill,
    row_update,
)
_dispatch.COMPILED.update({(op.__name__, "triton"): op for op in _OPERATORS})
_dispatch.COMPILED.update(
    {("linear_topk", path): partial(linear_topk, forced=path) for path in _linear_slabs.PATHS}
)
