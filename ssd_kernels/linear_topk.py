"""relu(x W^T + b) and its exact top-k in one op, with gradients rebuilt from the k-sparse code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels.count_active import count_active
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_update import row_gradient
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import select


def linear_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    inhibition: str = "mask",
    threshold: bool = False,
    preactivations: bool = False,
    counts: Tensor | None = None,
    impl: str | None = None,
) -> TopKOutput:
    """The k largest entries of relu(x weight^T + bias), chosen exactly; ties to the lower index.

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; scores accumulate in at least fp32.
        weight: [R, d]; bias: [R] or None; the dtype of x.
        k: neurons that stay active, 1..R.
        inhibition: "mask" keeps a on the top-k; "subtract" gives relu(a - I) there, with I the
            (k+1)-th largest activation, which carries no gradient (SDMLP, Bricken et al. 2023).
        threshold: also return I as a differentiable output.
        preactivations: also return x weight^T + bias [.., R], differentiable. Allocates it.
        counts: [R] int64 or int32, updated in place: += samples in which the neuron is active.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        TopKOutput: values [.., k] >= 0 in the dtype of x, descending; indices [.., k] int64 of the
        k largest pre-activations (an entry <= 0 is inactive: value 0, no gradient, not counted);
        threshold [..] and preactivations [.., R] where asked for, else None.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_topk", x, weight, bias, k)
    _checks.inhibition("linear_topk", inhibition)
    _checks.counter("linear_topk", "counts", counts, x, weight.shape[0])
    serve = _dispatch.choose("linear_topk", IMPLEMENTATIONS, impl, x)
    with torch.autocast(x.device.type, enabled=False):
        return serve(
            x,
            weight,
            k,
            bias,
            inhibition=inhibition,
            threshold=threshold,
            preactivations=preactivations,
            counts=counts,
        )


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, inhibition: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores = reference.scores_of(x, weight, bias)
        ranked = select(scores, min(k + 1, weight.shape[0]))
        tops = scores.gather(1, ranked).relu()
        values = tops[:, :k]
        # With k = R there is no (k+1)-th neuron and nothing is inhibited.
        cut = tops[:, k] if ranked.shape[1] > k else tops.new_zeros(len(x))
        if inhibition == "subtract":
            values = (values - cut[:, None]).relu()
        values, cut, indices = values.to(x.dtype), cut.to(x.dtype), ranked[:, :k].contiguous()
        ctx.save_for_backward(x, weight, bias, ranked, values > 0, cut > 0)
        ctx.mark_non_differentiable(indices)
        return values, indices, cut

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: None, grad_cut: Tensor) -> tuple[Any, ...]:
        x, weight, bias, ranked, active, cut_active = ctx.saved_tensors
        slots = [grad_values * active]
        if ranked.shape[1] > active.shape[1]:
            slots.append((grad_cut * cut_active)[:, None])
        coefficients = torch.cat(slots, dim=1)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = sparse_linear(coefficients, ranked, weight) if need_x else None
        grad_weight = row_gradient(coefficients, x, ranked, len(weight)) if need_weight else None
        grad_bias = None
        if need_bias:
            grad_bias = torch.zeros_like(bias).index_add_(
                0, ranked.flatten(), coefficients.flatten()
            )
        return grad_x, grad_weight, grad_bias, None, None


def _torch(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    threshold: bool,
    preactivations: bool,
    counts: Tensor | None,
) -> TopKOutput:
    if preactivations or torch.compiler.is_compiling():
        return reference.linear_topk(
            x,
            weight,
            k,
            bias,
            inhibition=inhibition,
            threshold=threshold,
            preactivations=preactivations,
            counts=counts,
        )
    batch = x.shape[:-1]
    values, indices, cut = _LinearTopK.apply(
        x.reshape(-1, x.shape[-1]), weight, bias, k, inhibition
    )
    if counts is not None:
        count_active(values, indices, counts)
    return TopKOutput(
        values.view(*batch, k), indices.view(*batch, k), cut.view(batch) if threshold else None
    )


IMPLEMENTATIONS = {"reference": reference.linear_topk, "torch": _torch}
