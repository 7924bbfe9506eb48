"""The exact sparse code of a layer under graded inhibition, without its dense form.

While some neurons answer inhibition with g < 1, a few more than k fire. linear_inhibit computes
all R activations; this op finds the firing ones among a few candidates.

Why the candidates suffice. Scores are ranked by an estimate of s_j / g_j, the score that inhibition
I would have to beat; its error is at most e. Let t be the largest estimate that is no candidate's,
and I' the (k+1)-th largest activation among the candidates. If t + e < I', any other neuron has
s_j / g_j < I' <= I: it does not fire, and since g_j <= 1 it has s_j < I', so I' = I. A row where
that fails takes its candidates from all float32 scores. Estimates come from a bfloat16 product
(Shadow) where the CPU is fast at it, else from the float32 product; the candidates' scores are
computed anew in one fixed order, so both give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels.linear_inhibit import linear_inhibit
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.topk import select

# Neurons per group whose maximum is looked at first.
GROUP = 32
# Groups kept beyond the k + 1 that must hold the k + 1 best.
SPARE_GROUPS = 16


class Shadow:
    """A bfloat16 copy of weight / gaba that estimates scores, and what it is a copy of.

    Args:
        weight: [R, d] float32, rows of norm at most 1.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        self._version = -1

    def update(self, weight: Tensor, gaba: Tensor | None, neurons: Tensor | None = None) -> None:
        """Copies all rows, or those of `neurons` [n] if no others changed since the last time."""
        if neurons is None:
            self.rows.copy_(weight if gaba is None else weight / gaba[:, None])
        else:
            changed = weight[neurons]
            scaled = changed if gaba is None else changed / gaba[neurons][:, None]
            self.rows[neurons] = scaled.bfloat16()
        self._version = weight._version

    def stale(self, weight: Tensor) -> bool:
        """Whether weight was written to since the last update."""
        return self._version != weight._version


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def linear_code(
    x: Tensor,
    weight: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    shadow: Shadow | None = None,
    impl: str | None = None,
) -> tuple[TopKOutput, Tensor]:
    """The neurons that fire in linear_inhibit(x, weight, k, gaba), as a sparse code.

    Args:
        x: [B, d] floating, rows of norm at most 1 if a shadow is used; weight: [R, d].
        k: neurons that full inhibition leaves active, 1..R.
        width: slots of the code, k..R.
        gaba: [R] in (0, 1], each neuron's response to inhibition; None means 1.
        inhibition: "subtract" or "mask", see linear_inhibit.
        shadow: an up-to-date Shadow of weight and gaba; the result is the same without it.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        The code, values [B, width] >= 0 descending and indices [B, width] int64, without gradient;
        slots of value 0 are padding. And a 0-d bool: whether some sample has more than `width`
        active neurons, in which case the code is not the layer's.

    Raises:
        TypeError, ValueError: a dtype, shape, device, k or width that does not fit.
    """
    _checks.linear("linear_code", x, weight, None, k)
    _checks.shape("linear_code", "gaba", gaba, (weight.shape[0],))
    _checks.inhibition("linear_code", inhibition)
    if not k <= width <= weight.shape[0]:
        raise ValueError(f"linear_code: width={width} must lie in {k}..{weight.shape[0]}")
    serve = _dispatch.choose("linear_code", IMPLEMENTATIONS, impl, x)
    with torch.no_grad():
        return serve(x, weight, k, width, gaba, inhibition=inhibition, shadow=shadow)


def _reference(
    x: Tensor,
    weight: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None,
    *,
    inhibition: str,
    shadow: Shadow | None,
) -> tuple[TopKOutput, Tensor]:
    hidden = reference.linear_inhibit(x, weight, k, gaba, inhibition=inhibition)
    return _compress(hidden, width)


def _torch(
    x: Tensor,
    weight: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None,
    *,
    inhibition: str,
    shadow: Shadow | None,
) -> tuple[TopKOutput, Tensor]:
    neurons = weight.shape[0]
    groups, kept = neurons // GROUP, k + 1 + SPARE_GROUPS
    if gaba is None and shadow is None and width == k:
        code = linear_topk(x, weight, k, inhibition=inhibition)
        return code, torch.zeros((), dtype=torch.bool, device=x.device)
    usable = x.dtype == torch.float32 and x.device.type == "cpu" and len(x) > 0
    if not usable or groups <= kept or width * GROUP > neurons:
        hidden = linear_inhibit(x, weight, k, gaba, inhibition=inhibition)
        return _compress(hidden, width)
    least = 1.0 if gaba is None else float(gaba.min())
    if shadow is None:
        estimates = _boosted(x @ weight.T, gaba)
        error = _error_bound(x.shape[1], torch.float32) / least
    else:
        estimates = x.bfloat16() @ shadow.rows.T
        error = _error_bound(x.shape[1], torch.bfloat16) / least
    candidates, beaten = _candidates(estimates, kept, width + k)
    code, cut, fires = _decide(x, weight, candidates, k, width, gaba, inhibition)
    doubtful = ~(beaten + error < cut)
    if doubtful.any():
        some = x[doubtful]
        ranked = select(_boosted(some @ weight.T, gaba), width + k).sort(dim=1).values
        again, _, fires[doubtful] = _decide(some, weight, ranked, k, width, gaba, inhibition)
        code.values[doubtful], code.indices[doubtful] = again.values, again.indices
    return code, (fires > width).any()


def _boosted(scores: Tensor, gaba: Tensor | None) -> Tensor:
    return scores if gaba is None else scores / gaba


def _decide(
    x: Tensor,
    weight: Tensor,
    candidates: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None,
    inhibition: str,
) -> tuple[TopKOutput, Tensor, Tensor]:
    """The code of the candidates [B, m], the inhibition I [B], and how many fire [B]."""
    # One product and sum a neuron, in one order whatever the candidates are.
    a = (weight[candidates] * x.unsqueeze(1)).sum(-1).relu()
    cut = a.topk(k + 1).values[:, k:]
    surplus = a - (cut if gaba is None else gaba[candidates] * cut)
    fired = torch.where(surplus > 0, a, 0.0) if inhibition == "mask" else surplus.relu()
    order = select(fired, width)
    code = TopKOutput(fired.gather(1, order), candidates.gather(1, order))
    return code, cut.squeeze(1), (fired > 0).sum(1)


def _error_bound(features: int, dtype: torch.dtype) -> float:
    """Largest |estimate - score| for rows of norm at most 1.

    Rounding to `dtype` with unit roundoff u: (1 + u)^2 - 1 from the two factors and u from the
    result, by Cauchy-Schwarz on |x| |w|; and features * 2^-23 covers both sums in float32.
    """
    unit = torch.finfo(dtype).eps / 2
    return (1 + unit) ** 3 - 1 + 2 * features * 2.0**-24


def _candidates(estimates: Tensor, groups_kept: int, count: int) -> tuple[Tensor, Tensor]:
    """Ascending indices [B, count] of large estimates, and the largest [B] of the others."""
    batch, neurons = estimates.shape
    groups = neurons // GROUP
    body = estimates[:, : groups * GROUP].view(batch, groups, GROUP)
    best = torch.topk(body.amax(-1).float(), groups_kept + 1)
    chosen = best.indices[:, :groups_kept, None]
    members = (chosen * GROUP + torch.arange(GROUP)).flatten(1)
    rest = torch.arange(groups * GROUP, neurons).expand(batch, -1)
    members = torch.cat([members, rest], dim=1)
    top = torch.topk(estimates.gather(1, members).float(), count + 1)
    beaten = torch.maximum(best.values[:, groups_kept], top.values[:, count])
    return members.gather(1, top.indices[:, :count]).sort(dim=1).values, beaten


def _compress(hidden: Tensor, width: int) -> tuple[TopKOutput, Tensor]:
    indices = select(hidden, width)
    overflow = ((hidden > 0).sum(-1) > width).any()
    return TopKOutput(hidden.gather(-1, indices), indices), overflow


IMPLEMENTATIONS = {"reference": _reference, "torch": _torch}
