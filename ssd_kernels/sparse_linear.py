"""A k-sparse code times a matrix: the decoder of a k-sparse layer."""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _checks, _dispatch, _op, _segments, _tuning, reference
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels._triton import jit, tl

_tuning.TABLE["sparse_linear"] = {
    "default": (
        ({"outputs": 16}, {"SLOTS": 16, "BLOCK": 16, "num_warps": 1}),
        ({"outputs": 64}, {"SLOTS": 16, "BLOCK": 64, "num_warps": 2}),
        # A slice of weight 256 columns wide stays in L2 while every sample reads it. One warp
        # holds whole rows of the slice, so slots are summed without a barrier.
        ({}, {"SLOTS": 16, "BLOCK": 256, "num_warps": 1}),
    ),
    # 16 slots spill here.
    "sm100": (
        ({"outputs": 16}, {"SLOTS": 16, "BLOCK": 16, "num_warps": 1}),
        ({"outputs": 64}, {"SLOTS": 16, "BLOCK": 64, "num_warps": 2}),
        ({}, {"SLOTS": 8, "BLOCK": 256, "num_warps": 1}),
    ),
}

# Up to so many elements, to gather the rows of a code is faster than F.embedding_bag.
GATHERED = 2**17


def sparse_linear(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """out[b] = sum over slots s of values[b, s] * weight[indices[b, s]], plus bias.

    Args:
        values: [.., K] floating; indices: [.., K] int64 in 0..R-1.
        weight: [R, C], as in torch.nn.EmbeddingBag: row j is what neuron j writes.
        bias: [C] or None.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        [.., C] in the dtype of weight, differentiable in values, weight and bias.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    values, weight, bias = _dispatch.autocast(values, weight, bias)
    _checks.floating("sparse_linear", values=values, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"sparse_linear: weight has shape {list(weight.shape)}, expected [R, C]")
    _checks.code("sparse_linear", values, indices, len(weight))
    _checks.shape("sparse_linear", "bias", bias, (weight.shape[1],))
    served = values.numel() > 0
    serve = _dispatch.choose("sparse_linear", impl, values, served=served)
    with _dispatch.as_given(values):
        return serve(values, indices, weight, bias)


def _torch(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    small = values.numel() * weight.shape[1] <= GATHERED and not weight.requires_grad
    # On CUDA embedding_bag has no gradient of bfloat16 values; the specification needs [B, K, C].
    trained = values.requires_grad and torch.is_grad_enabled()
    lacking = trained and values.is_cuda and values.dtype == torch.bfloat16
    if small or lacking or values.numel() == 0 or weight.shape[1] == 0:
        return reference.sparse_linear(values, indices, weight, bias)
    out = _EmbeddingBag.apply(_dispatch.flattened(values), _dispatch.flattened(indices), weight)
    out = _dispatch.unflattened(out, (*values.shape[:-1], weight.shape[1]))
    return out if bias is None else out + bias


class _EmbeddingBag(torch.autograd.Function):
    """F.embedding_bag of a code, with the second derivatives that it lacks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        need_values, _, need_weight = ctx.needs_input_grad
        with torch.enable_grad():
            ctx.leaves = (
                values.detach().requires_grad_(need_values),
                weight.detach().requires_grad_(need_weight),
            )
            ctx.out = F.embedding_bag(
                indices,
                _segments.unit_stride(ctx.leaves[1]),  # a strided one is read far slower
                mode="sum",
                per_sample_weights=ctx.leaves[0],
            )
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            values, indices, weight = ctx.saved_tensors
            need_values, _, need_weight = ctx.needs_input_grad
            grad_values, grad_weight = _differentiable_gradients(
                grad_out, values, indices, weight, need_values, need_weight
            )
            return grad_values, None, grad_weight
        needed = [leaf for leaf in ctx.leaves if leaf.requires_grad]
        once = iter(torch.autograd.grad(ctx.out, needed, grad_out, retain_graph=True))
        grads = [next(once) if leaf.requires_grad else None for leaf in ctx.leaves]
        return grads[0], None, grads[1]


def _differentiable_gradients(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    need_values: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of values [B, K] and weight [R, C]; slower, but differentiable in turn."""
    return (
        (grad_out.unsqueeze(1) * weight[indices]).sum(-1) if need_values else None,
        row_gradient(values, grad_out, indices, len(weight)) if need_weight else None,
    )


@jit
def _gather_kernel(
    values,  # [B, K]
    gates,  # [B, K]
    indices,  # [B, K]
    weight,  # [R, C]
    bias,  # [C]
    out,  # [B, C]
    outputs,
    weight_stride,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Samples come first, columns last: one slice of weight serves every sample from L2.
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < outputs
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        value = tl.load(values + sample * K + slot, mask=slot < K, other=0.0).to(tl.float32)
        neuron = tl.load(indices + sample * K + slot, mask=slot < K, other=0)
        reads = slot < K
        if GATED:
            gate = tl.load(gates + sample * K + slot, mask=slot < K, other=0)
            value = tl.where(gate <= 0, 0.0, value)
            reads = value != 0
        row = tl.load(
            weight + neuron[:, None] * weight_stride + column[None, :],
            mask=reads[:, None] & inside[None, :],
            other=0.0,
        )
        total += tl.sum(value[:, None] * row.to(tl.float32), axis=0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + sample * outputs + column, total, mask=inside)


@_op.operator(
    "ssd_kernels::sparse_linear",
    lambda values, indices, weight, *_: weight.new_empty(values.shape[0], weight.shape[1]),
)
def gather_triton(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """sparse_linear of a code [B, K], without autograd; every slot counts, those of value 0 too.

    With gates [B, K], a slot whose value is 0 or gate <= 0 adds nothing, not even an infinite row.
    """
    batch, outputs = values.shape[0], weight.shape[1]
    out = torch.empty(batch, outputs, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    weight = _segments.unit_stride(weight.detach())
    chosen = _tuning.config("sparse_linear", weight.device, outputs=outputs)
    with torch.cuda.device_of(weight):
        _gather_kernel[(batch, -(-outputs // chosen["BLOCK"]))](
            values.detach().contiguous(),
            weight if gates is None else gates,
            indices.contiguous(),
            weight,
            weight if bias is None else bias.detach().contiguous(),
            out,
            outputs,
            weight.stride(0),
            K=values.shape[1],
            GATED=gates is not None,
            BIAS=bias is not None,
            **chosen,
        )
    return out


def _gradients_like(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    need_values: bool,
    need_weight: bool,
    order: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    return (
        values.new_empty(values.shape if need_values else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


@_op.operator("ssd_kernels::sparse_linear_backward", _gradients_like)
def gradients_triton(
    grad_out: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    need_values: bool,
    need_weight: bool,
    order: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of values [B, K] and weight [R, C] in one walk over the slots by neuron.

    One that is not needed is an empty tensor.

    A neuron's program holds its row of weight and reads each of its samples' grad_out once for
    both, so the scattered reads fall on [B, C], which L2 holds more of than of [R, C].
    """
    neurons, outputs = weight.shape
    by_neuron = need_weight or neurons <= indices.numel()
    tiles = _segments.tiles(outputs, weight.device)
    grad_weight = weight.new_empty((neurons, outputs) if need_weight else 0)
    products = None
    if need_values:
        products = values.new_empty(values.shape)
        if tiles > 1:
            products = torch.empty(
                (tiles, *values.shape), dtype=torch.float32, device=values.device
            )
    _segments.walk(
        _segments.Order(*order) if order else _segments.sorted_slots(indices, neurons, by_neuron),
        indices.shape[1],
        _segments.unit_stride(grad_out),
        coefficients=values.contiguous(),
        weight=_segments.unit_stride(weight),
        gradient=grad_weight if need_weight else None,
        products=products,
    )
    if products is not None and tiles > 1:
        products = products.sum(0).to(values.dtype)
    return values.new_empty(0) if products is None else products, grad_weight


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        return gather_triton(values, indices, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        values, indices, weight = ctx.saved_tensors
        need_values, _, need_weight, need_bias = ctx.needs_input_grad
        grad_values = grad_weight = None
        traced = _dispatch.tracing()
        if _dispatch.differentiable() or (_dispatch.symbolic(grad_out) and not traced):
            grad_values, grad_weight = _differentiable_gradients(
                grad_out, values, indices, weight, need_values, need_weight
            )
        elif need_values or need_weight:
            order = _segments.shared_order(indices, len(weight)) if need_weight else ()
            grad_values, grad_weight = gradients_triton(
                grad_out, values, indices, weight, need_values, need_weight, order
            )
        return (
            grad_values if need_values else None,
            None,
            grad_weight if need_weight else None,
            grad_out.sum(0) if need_bias else None,
        )


def _triton(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    serve = gather_triton
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (values, weight, bias)
    ):
        serve = _SparseLinear.apply
    out = serve(_dispatch.flattened(values), _dispatch.flattened(indices), weight, bias)
    return _dispatch.unflattened(out, (*values.shape[:-1], weight.shape[1]))


_dispatch.register("sparse_linear", reference=reference.sparse_linear, torch=_torch, triton=_triton)
