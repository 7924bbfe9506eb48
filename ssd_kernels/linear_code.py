"""The exact sparse code of a layer under graded inhibition, without its dense form.

While some neurons answer inhibition with g < 1, a few more than k fire. linear_inhibit computes
all R activations; with a Shadow, a bfloat16 copy of weight / gaba, this op does not.

Why that is exact. The bfloat16 product estimates b_j = s_j / g_j, the score that inhibition I would
have to beat. Nothing is negative, so the rounding errors add up to at most a share c of b_j. The
neurons with the largest estimates are candidates, and their scores are computed in float32. Let t
be the largest estimate that is no candidate's and I' the (k+1)-th largest activation among the
candidates. If t (1 + c) < I', every other neuron has b_j < I' <= I: it does not fire, and since
g_j <= 1 it has s_j < I', so I' = I. A row where that fails takes its candidates from all float32
scores. Either way the candidates' scores are summed in one fixed order, so that both give the same
bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels.linear_inhibit import linear_inhibit
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.topk import GROUP, select, topk

# Candidates are at least so many for each of the k: enough to settle almost every row.
CANDIDATES = 3
TINY = 1e-30
# More candidates than one in so many neurons cost more than all scores.
DENSE_SHARE = 32


class Shadow:
    """A bfloat16 copy of weight / gaba that estimates scores, and what it is a copy of.

    Args:
        weight: [R, d] float32, not negative.
    """

    def __init__(self, weight: Tensor) -> None:
        self.rows = torch.empty_like(weight, dtype=torch.bfloat16, requires_grad=False)
        self._version = -1
        # Kept from call to call: the operating system zeroes each page of fresh memory.
        self._buffers: dict[torch.dtype, Tensor] = {}

    def buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised memory of this shape; valid until the next call with this dtype."""
        size = math.prod(shape)
        if dtype not in self._buffers or self._buffers[dtype].numel() < size:
            self._buffers[dtype] = torch.empty(size, dtype=dtype)
        return self._buffers[dtype][:size].view(shape)

    def update(self, weight: Tensor, gaba: Tensor | None, neurons: Tensor | None = None) -> None:
        """Copies all rows, or those of `neurons` [n], distinct, if no others changed.

        Raises:
            ValueError: a negative weight, for which the error bound would not hold.
        """
        changed = weight if neurons is None else F.embedding(neurons, weight)
        if changed.numel() > 0 and not changed.min() >= 0:
            raise ValueError(f"Shadow: weight must not be negative, not {changed.min():g}")
        if gaba is not None:
            changed = changed / (gaba if neurons is None else gaba[neurons]).unsqueeze(1)
        if neurons is None:
            self.rows.copy_(changed)
        else:
            self.rows.index_copy_(0, neurons, changed.bfloat16())
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
        x: [B, d] floating, float32 and not negative if there is a shadow; weight: [R, d].
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
    if shadow is not None and x.numel() > 0 and not x.min() >= 0:
        raise ValueError(f"linear_code: with a shadow x must not be negative, not {x.min():g}")
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
    if gaba is None and shadow is None and width == k:
        code = linear_topk(x, weight, k, inhibition=inhibition)
        return code, torch.zeros((), dtype=torch.bool, device=x.device)
    count = max(width, CANDIDATES * k) + k
    if not x.is_cpu or len(x) == 0 or count * DENSE_SHARE > weight.shape[0]:
        return _compress(linear_inhibit(x, weight, k, gaba, inhibition=inhibition), width)

    def decide(x: Tensor, candidates: Tensor) -> tuple[TopKOutput, Tensor, Tensor]:
        return _decide(x, weight, candidates, k, width, gaba, inhibition, shadow)

    def rank(x: Tensor) -> Tensor:
        scores = x @ weight.T
        return select(scores if gaba is None else scores / gaba, count).sort(dim=1).values

    if shadow is None:
        code, _, fires = decide(x, rank(x))
    else:
        # Neurons first: the faster order of the product, and of the maxima over groups.
        estimates = shadow.buffer(torch.bfloat16, len(weight), len(x))
        torch.mm(shadow.rows, x.bfloat16().T, out=estimates)
        candidates, beaten = _candidates(estimates, count)
        code, cut, fires = decide(x, candidates)
        # TINY covers products that underflow to 0.
        doubtful = ~(beaten * (1 + _relative_error(x.shape[1])) + TINY < cut)
        if doubtful.any():
            again, _, fires[doubtful] = decide(x[doubtful], rank(x[doubtful]))
            code.values[doubtful], code.indices[doubtful] = again.values, again.indices
    return code, (fires > width).any()


def _decide(
    x: Tensor,
    weight: Tensor,
    candidates: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None,
    inhibition: str,
    shadow: Shadow | None,
) -> tuple[TopKOutput, Tensor, Tensor]:
    """The code of the candidates [B, m], the inhibition I [B], and how many fire [B]."""
    shape = (*candidates.shape, x.shape[1])
    if shadow is None:
        rows = F.embedding(candidates, weight)
    else:
        rows = shadow.buffer(weight.dtype, *shape)
        torch.index_select(weight, 0, candidates.view(-1), out=rows.view(-1, shape[2]))
    # One product and sum a neuron, in one order whatever the candidates are.
    a = rows.mul_(x.unsqueeze(1)).sum(-1).relu()
    cut = a.topk(k + 1).values[:, k:]
    surplus = a - (cut if gaba is None else gaba[candidates] * cut)
    fired = torch.where(surplus > 0, a, 0.0) if inhibition == "mask" else surplus.relu()
    # Candidates ascend, so that a stable sort gives ties to the lower index.
    values, order = fired.sort(dim=1, descending=True, stable=True)
    code = TopKOutput(values[:, :width], candidates.gather(1, order[:, :width]))
    return code, cut.squeeze(1), (fired > 0).sum(1)


def _relative_error(features: int) -> float:
    """Bound on |estimate - b| / estimate: the two factors, the result, and both float32 sums."""
    unit = torch.finfo(torch.bfloat16).eps / 2
    rounding = (1 + unit) ** 3 * (1 + 2 * features * 2.0**-24) - 1
    return rounding / (1 - rounding)


def _candidates(estimates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ascending indices [B, count] of large estimates [R, B], and a bound [B] on all the others."""
    neurons, batch = estimates.shape
    groups = neurons // GROUP
    body = estimates[: groups * GROUP].view(GROUP, groups, batch)
    best = torch.topk(body.amax(0).float().T.contiguous(), count + 1)
    members = (best.indices[:, None, :count] + groups * torch.arange(GROUP).unsqueeze(1)).flatten(1)
    rest = torch.arange(groups * GROUP, neurons)
    if len(rest):
        members = torch.cat([members, rest.expand(batch, -1)], dim=1)
    top = torch.topk(estimates.T.gather(1, members).float(), count + 1)
    beaten = torch.maximum(best.values[:, count], top.values[:, count])
    return members.gather(1, top.indices[:, :count]).sort(dim=1).values, beaten


def _compress(hidden: Tensor, width: int) -> tuple[TopKOutput, Tensor]:
    return topk(hidden, width), ((hidden > 0).sum(-1) > width).any()


IMPLEMENTATIONS = {"reference": _reference, "torch": _torch}
