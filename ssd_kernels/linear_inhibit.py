"""relu(x W^T + b) under graded inhibition, dense: the warm-up of a k-sparse layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _encoder, reference
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
    blocks: int = 1,
    impl: str | None = None,
) -> Tensor:
    """h = relu(a - gaba * I) with a = relu(x weight^T + bias), I its (k+1)-th largest entry a row.

    While some gaba < 1 more than k neurons may be active, so the result is dense; with gaba = 1
    everywhere it equals linear_topk scattered into [.., R], but that "mask" drops all that tie with
    I. (SDMLP, Bricken et al. 2023: the GABA switch goes from -1, excitation, to 1, inhibition.)

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; weight: [R, d]; bias: [R] or None.
        k: neurons that full inhibition leaves active, 1..R.
        gaba: [R], each neuron's response to I, at most 1; None means 1.
        inhibition: "subtract" as above; "mask" passes a on where a > gaba * I.
        counts: [R] int64 or int32, updated in place: += samples in which h > 0; twice as many
            under activation checkpointing, which runs the forward twice.
        blocks: number S of networks whose rows follow one another, see linear_topk: weight is
            [S R, d], gaba, bias and counts are [S R].
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        h [.., R] in the dtype of x, of a sample's own network; I carries no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device, k or blocks that does not fit, before any
            work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_inhibit", x, weight, bias, k, blocks)
    _checks.response("linear_inhibit", gaba, x, weight.shape[0])
    _checks.inhibition("linear_inhibit", inhibition)
    _checks.counter("linear_inhibit", "counts", counts, x, weight.shape[0])
    # The annealing starts with k = R: nothing to select that a sort would not do better.
    learned = gaba is not None and gaba.requires_grad and torch.is_grad_enabled()
    served = k < MAX_K and not learned
    serve = _dispatch.choose("linear_inhibit", impl, x, served=served)
    with _dispatch.as_given(x):
        return serve(x, weight, k, gaba, bias, inhibition=inhibition, counts=counts, blocks=blocks)


def _torch(
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
    a = reference.by_network(reference.scores_of(x, weight, bias, blocks), blocks).relu()
    if k == a.shape[-1]:
        cut = a.new_zeros(*a.shape[:-1], 1)
    else:
        cut = torch.topk(a.detach(), k + 1).values[..., k:]
    if gaba is None:
        surplus = a - cut
    else:
        surplus = torch.addcmul(a, gaba.to(a.dtype).reshape(blocks, 1, -1), cut, value=-1)
    mask = inhibition == "mask"
    hidden = torch.where((surplus > 0) | a.isnan(), a, 0.0) if mask else surplus
    if not mask or hidden.dtype != x.dtype:
        hidden = reference.positive_part(hidden.to(x.dtype))
    if counts is not None:
        counts += (hidden > 0).sum(1).flatten()
    return _dispatch.unflattened(hidden, (*x.shape[:-1], a.shape[-1]))


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
        blocks: int,
    ) -> Tensor:
        hidden, passes = _encoder.inhibit(
            x, weight, bias, k, gaba, inhibition, counts, True, blocks
        )
        ctx.save_for_backward(x, weight, passes)
        ctx.blocks = blocks
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, passes = ctx.saved_tensors
        slopes, inputs, neurons = (
            reference.by_network(t, ctx.blocks) for t in (torch.where(passes, grad, 0.0), x, weight)
        )
        needs = ctx.needs_input_grad
        return (
            torch.bmm(slopes, neurons).view(x.shape) if needs[0] else None,
            torch.bmm(slopes.mT, inputs).view(weight.shape) if needs[1] else None,
            slopes.sum(1).flatten() if needs[2] else None,
            *[None] * 5,
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
    blocks: int,
) -> Tensor:
    flat = _dispatch.flattened(x)
    given = flat, weight, bias, k, gaba, inhibition, counts
    leaves = (t for t in given[:3] if t is not None)
    hidden: Tensor
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        hidden = _LinearInhibit.apply(*given, blocks)
    else:
        hidden, _ = _encoder.inhibit(*given, False, blocks)
    return _dispatch.unflattened(hidden, (*x.shape[:-1], hidden.shape[1]))


_dispatch.register(
    "linear_inhibit", reference=reference.linear_inhibit, torch=_torch, triton=_triton
)
