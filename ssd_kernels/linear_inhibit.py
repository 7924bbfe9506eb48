"""relu(x W^T + b) under graded inhibition, dense: the warm-up of a k-sparse layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels.topk import select


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
        impl: "torch" or "reference"; by default the fastest for the device.

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
        cut = a.detach().gather(-1, select(a, k + 1)[..., k:])
    surplus = a - (cut if gaba is None else gaba.to(a.dtype) * cut)
    hidden = a * (surplus > 0) if inhibition == "mask" else surplus.relu()
    if counts is not None:
        counts += (hidden > 0).flatten(0, -2).sum(0)
    return hidden.to(x.dtype)


IMPLEMENTATIONS = {"reference": reference.linear_inhibit, "torch": _torch}
