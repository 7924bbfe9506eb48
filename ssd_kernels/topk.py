"""Exact row-wise top-k with stable ties."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, reference
from ssd_kernels.reference import TopKOutput

# Neurons per group of the group-maxima filter; rows shorter than MIN_GROUPED are ranked directly.
GROUP = 64
MIN_GROUPED = 2048


def topk(
    scores: Tensor,
    k: int,
    *,
    boost: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> TopKOutput:
    """The k largest entries of each row: exact, descending, ties to the lower index.

    Args:
        scores: [.., R], floating. NaN counts as largest, -0.0 equals 0.0.
        k: entries to keep, 1..R.
        boost: [R], same dtype as scores. Selects on `scores * boost`, passes on `scores`.
        mask: [R] bool. Neurons that are False are not selected; where fewer than k are allowed, the
            slots left over have value 0 and the lowest disallowed indices.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        TopKOutput with values [.., k] (dtype of scores, differentiable) and indices [.., k] int64,
        ordered by the selection key.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    _checks.floating("topk", scores=scores, boost=boost)
    if scores.dim() < 1:
        raise ValueError("topk: scores must have at least one dimension [.., R]")
    neurons = scores.shape[-1]
    _checks.active_range("topk", k, neurons)
    _checks.shape("topk", "boost", boost, (neurons,))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"topk: mask has dtype {mask.dtype}; use torch.bool")
        _checks.shape("topk", "mask", mask, (neurons,))
        _checks.same_device("topk", "scores", scores, "mask", mask)
    serve = _dispatch.choose("topk", IMPLEMENTATIONS, impl, scores)
    return serve(scores, k, boost=boost, mask=mask)


def _torch(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    if mask is not None or scores.shape[-1] == k or torch.compiler.is_compiling():
        return reference.topk(scores, k, boost=boost, mask=mask)
    keys = scores.detach().to(reference.accumulation_dtype(scores.dtype))
    if boost is not None:
        keys = keys * boost.to(keys.dtype)
    indices = select(keys, k)
    return TopKOutput(scores.gather(-1, indices), indices)


def select(keys: Tensor, k: int) -> Tensor:
    """reference.select by torch.topk over group maxima; keys [.., R] -> [.., k] int64."""
    if torch.compiler.is_compiling() or keys.shape[-1] == k:
        return reference.select(keys, k)
    flat = keys.detach().reshape(-1, keys.shape[-1]) + 0.0
    values, indices = _candidates(flat, k + 1)
    # torch.topk breaks ties anyhow. A tie inside the k is put right by sorting; a row whose k-th
    # and (k+1)-th keys tie, or that holds NaN, is ranked again by the specification.
    ambiguous = ~(values[:, k - 1] > values[:, k]) | values[:, 0].isnan()
    by_index = indices[:, :k].sort(dim=-1).values
    order = flat.gather(-1, by_index).sort(dim=-1, descending=True, stable=True).indices
    chosen = by_index.gather(-1, order)
    if ambiguous.any():
        chosen[ambiguous] = reference.select(flat[ambiguous], k)
    return chosen.view(*keys.shape[:-1], k)


def _candidates(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of keys [B, R]; the k largest lie in the k groups with the largest maxima."""
    batch, neurons = keys.shape
    groups = neurons // GROUP
    if neurons < MIN_GROUPED or 4 * k * GROUP > neurons:
        return torch.topk(keys, k)
    body = keys[:, : groups * GROUP].view(batch, groups, GROUP)
    chosen = torch.topk(body.amax(-1), k).indices
    members = (chosen.unsqueeze(-1) * GROUP + torch.arange(GROUP, device=keys.device)).flatten(1)
    rest = torch.arange(groups * GROUP, neurons, device=keys.device).expand(batch, -1)
    members = torch.cat([members, rest], dim=1)
    values, slots = torch.topk(keys.gather(1, members), k)
    return values, members.gather(1, slots)


IMPLEMENTATIONS = {"reference": reference.topk, "torch": _torch}
