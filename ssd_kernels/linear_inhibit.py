"""relu(x W^T + b) under graded inhibition, dense: the warm-up of a k-sparse layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_kernels import _checks, _dispatch, _linear_slabs, reference
from ssd_kernels._triton import AotCase
from ssd_kernels.topk import MAX_K


def linear_inhibit(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    counts: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """h = relu(a - gaba * I) with a = relu(x weight^T + bias), I its (k+1)-th largest entry a row.

    While some gaba < 1 more than k neurons may be active, so the result is dense; with gaba = 1
    everywhere it equals linear_topk scattered into [.., R]. (SDMLP, Bricken et al. 2023: the GABA
    switch goes from -1, excitation, to 1, inhibition.)

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; weight: [R, d]; bias: [R] or None.
        k: neurons that full inhibition leaves active, 1..R.
        gaba: [R], each neuron's response to I, at most 1; None means 1.
        inhibition: "subtract" as above; "mask" passes a on where a > gaba * I.
        counts: [R] int64 or int32, updated in place: += samples in which h > 0.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        h [.., R] in the dtype of x; I carries no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_inhibit", x, weight, bias, k)
    _checks.shape("linear_inhibit", "gaba", gaba, (weight.shape[0],))
    _checks.inhibition("linear_inhibit", inhibition)
    _checks.counter("linear_inhibit", "counts", counts, x, weight.shape[0])
    serve = _dispatch.choose("linear_inhibit", IMPLEMENTATIONS, impl, x)
    with torch.autocast(x.device.type, enabled=False):
        return serve(x, weight, k, gaba, bias, inhibition=inhibition, counts=counts)


def _torch(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    counts: Tensor | None,
) -> Tensor:
    a = reference.scores_of(x, weight, bias).relu()
    if k == weight.shape[0]:
        cut = a.new_zeros(*a.shape[:-1], 1)
    else:
        cut = torch.topk(a.detach(), k + 1).values[..., k:]
    surplus = a - cut if gaba is None else torch.addcmul(a, gaba.to(a.dtype), cut, value=-1)
    hidden = a * (surplus > 0) if inhibition == "mask" else surplus.relu()
    if counts is not None:
        counts += (hidden > 0).reshape(-1, hidden.shape[-1]).sum(0)
    return hidden.to(x.dtype)


class _LinearInhibit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        gaba: Tensor | None,
        inhibition: str,
        counts: Tensor | None,
    ) -> Tensor:
        needed = any(ctx.needs_input_grad)
        hidden, passes = _linear_slabs.inhibit(x, weight, bias, k, gaba, inhibition, counts, needed)
        ctx.save_for_backward(x, weight, passes)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, passes = ctx.saved_tensors
        grad = grad * passes.to(grad.dtype)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        return (
            grad @ weight if need_x else None,
            grad.T @ x if need_weight else None,
            grad.sum(0) if need_bias else None,
            *[None] * 4,
        )


def _triton(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    counts: Tensor | None,
) -> Tensor:
    # The annealing starts with k = R: nothing to select that a sort would not do better.
    served = k < MAX_K and x.dtype in _dispatch.TRITON_DTYPES
    learned = gaba is not None and gaba.requires_grad and torch.is_grad_enabled()
    if not served or learned or torch.compiler.is_compiling():
        return _torch(x, weight, k, gaba, bias, inhibition=inhibition, counts=counts)
    flat = x.reshape(-1, x.shape[-1])
    hidden: Tensor = _LinearInhibit.apply(flat, weight, bias, k, gaba, inhibition, counts)
    return hidden.view(*x.shape[:-1], len(weight))


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.linear_inhibit,
    "torch": _torch,
}
if _dispatch.TRITON:
    IMPLEMENTATIONS["triton"] = _triton


def aot_cases(family: str) -> list[AotCase]:
    return _linear_slabs.inhibit_aot_cases(family)
