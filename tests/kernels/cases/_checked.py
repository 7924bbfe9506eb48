"""Small inputs for the race checker: integers mostly, so that sums are exact and ties many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TAIL = 3  # columns of a wider matrix that an op is not handed


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In -2..2, a part of a wider matrix."""
    wide = torch.randint(-2, 3, (*shape[:-1], shape[-1] + TAIL)).to(dtype)
    return wide[..., : shape[-1]]


def counter(neurons: int) -> Tensor:
    """Every second entry of a longer one."""
    return torch.ones(2 * neurons, dtype=torch.int64)[::2]


def equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def ramp(like: Tensor) -> Tensor:
    return (torch.arange(like.numel()) % 5 - 2.0).view_as(like).to(like.dtype)


def layer(
    batch: int, neurons: int, features: int, bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = integers(batch, features, dtype=dtype), integers(neurons, features, dtype=dtype)
    return x, weight, integers(neurons, dtype=dtype) if bias else None


def code(
    batch: int, slots: int, neurons: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Values in 0..2; the neurons of a sample are distinct but for idle slots."""
    indices = torch.stack([torch.randperm(neurons)[:slots] for _ in range(batch)])
    values = torch.randint(3, (batch, slots)).to(dtype)
    idle = values[:, 0] == 0
    indices[idle, 0] = indices[idle, -1]
    return values, indices
