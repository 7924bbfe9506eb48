"""The k largest keys of a row on a CPU, found by the maxima of groups."""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on one thread, R = 1,000 to 100,000 and k = 10 and 64: groups of 4, 16 and 32 take up to
# 1.1, 1.5 and 2 times as long. Fewer keys than LEAST_KEYS in all, and rows of up to LEAST_GROUPS
# groups for each of the k, gain nothing.
GROUP = 8
LEAST_GROUPS = 8
LEAST_KEYS = 2**16


def largest(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of keys [B, R], in which -0.0 equals 0.0: values and indices [B, k].

    The k largest lie in the k groups with the largest maxima. The memory of the keys may
    be in the order of rows, or of neurons: the transpose of [R, B].
    """
    batch, neurons = keys.shape
    if not keys.is_cpu:
        return torch.topk(keys + 0.0, k)  # a GPU ranks bits
    if keys.numel() < LEAST_KEYS or neurons <= LEAST_GROUPS * k * GROUP:
        return torch.topk(keys.contiguous(), k)
    groups = neurons // GROUP  # group i is i, i + groups, i + 2 groups, ..
    if keys.is_contiguous():
        maxima = keys[:, : groups * GROUP].view(batch, GROUP, groups).amax(1)
    else:
        maxima = keys.T[: groups * GROUP].reshape(GROUP, groups, batch).amax(0).T
    first = torch.arange(0, groups * GROUP, groups, device=keys.device).unsqueeze(1)
    members = (largest(maxima, k)[1].unsqueeze(1) + first).flatten(1)
    if groups * GROUP < neurons:
        rest = torch.arange(groups * GROUP, neurons, device=keys.device)
        members = torch.cat([members, rest.expand(batch, -1)], dim=1)
    values, order = torch.topk(keys.gather(1, members), k)
    return values, members.gather(1, order)
