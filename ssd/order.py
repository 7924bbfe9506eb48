"""The order of the training samples: a counter-based generator, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

# splitmix64 (Steele et al. 2014): increment and multipliers.
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def shuffled(count: int, *key: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0..count-1 that depends on the key alone, [count] int64.

    Sample i gets the 64-bit number that splitmix64 gives counter i of the stream `key`; the order
    sorts them. There is no state, so any epoch's order can be drawn at any time.
    """
    stream = 0
    for part in key:
        stream = _mix(stream + INCREMENT + part)
    counters = torch.arange(count, device=device)
    keys = _mix_tensor(counters * _signed(INCREMENT) + _signed(stream))
    return keys.sort(stable=True).indices


def _mix(z: int) -> int:
    z %= 2**64
    z = (z ^ z >> 30) * FIRST % 2**64
    z = (z ^ z >> 27) * SECOND % 2**64
    return z ^ z >> 31


def _mix_tensor(z: Tensor) -> Tensor:
    # int64 wraps around; its right shift keeps the sign, which the masks cut off.
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(FIRST)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(SECOND)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
