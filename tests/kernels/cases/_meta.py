"""Tensors without data, for calls of any shape whose launches are recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels.cases import FP32

SMALL = {"B": 128, "R": 10_000, "k": 10}
LARGE = {"B": 8192, "R": 65_536, "k": 64}  # too many slots to rank
RANKED = "_rank_kernel"
SORTED = "_to_copy sort _offsets_kernel"  # _to_copy: to keys of fewer bits
Run = Callable[[], Any]  # returns what it hands out
Prepare = Callable[[], Run]


def new(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def longs(*shape: int) -> Tensor:
    return new(*shape, dtype=torch.int64)


def code(
    B: int, R: int, k: int, dtype: torch.dtype = FP32, grad: bool = False
) -> tuple[Tensor, Tensor]:
    return new(B, k, dtype=dtype, grad=grad), longs(B, k)


def settings(B: int, each: bool) -> dict[str, Any]:
    """Of distill; each: a value, and a weight, of each sample."""
    if not each:
        return {"alpha": 0.5, "lam": 0.5, "temperature": 2.0}
    return {name: new(B) for name in ("alpha", "lam", "temperature", "weight")}


def of(op: Callable[..., Any], *args: Any, **options: Any) -> Prepare:
    return lambda: lambda: op(*args, **options)


def backward(outputs: list[Tensor], leaves: list[Tensor]) -> Run:
    slopes = [torch.empty_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, slopes)
