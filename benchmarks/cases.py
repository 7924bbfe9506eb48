"""What is measured: a case is one op, mode, dtype and shape with its providers and its gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Provider = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """inputs() draws a fresh set; a provider maps a set to a result; check(provider, set, result)
    says what is wrong, or "". size and operations are the op's floor: bytes and FLOPs."""

    op: str
    mode: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[], Any]
    providers: dict[str, Provider]
    check: Callable[[str, Any, Any], str]
    size: int
    operations: int = 0

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.shape.items())
        return f"{self.op} {self.mode} {str(self.dtype).removeprefix('torch.')} {sizes}"


@dataclass(frozen=True)
class Shape:
    """One line of the tables below; build_cases makes a Case of it."""

    op: str
    mode: str
    dtype: torch.dtype
    sizes: dict[str, int]


def _shape(op: str, mode: str, dtype: torch.dtype, **sizes: int) -> Shape:
    return Shape(op, mode, dtype, sizes)


FP32, BF16 = torch.float32, torch.bfloat16

# Every shape that targets.py names, what matters most first: the time budget cuts from the end.
TARGETS = [
    _shape("linear_topk", "forward", BF16, B=8192, d=1024, R=131072, k=32),
    _shape("linear_topk", "forward", FP32, B=8192, d=256, R=10000, k=10),
    _shape("linear_topk", "forward", FP32, B=128, d=256, R=10000, k=10),
    _shape("linear_topk", "forward", FP32, B=8192, d=1024, R=65536, k=32),
    _shape("linear_topk", "forward", BF16, B=8192, d=4096, R=131072, k=32),
    _shape("linear_topk", "full", BF16, B=8192, d=1024, R=131072, k=32),
    _shape("linear_topk", "full", FP32, B=8192, d=256, R=10000, k=10),
    _shape("topk", "forward", FP32, B=8192, R=131072, k=64),
    _shape("sparse_linear", "full", BF16, B=8192, R=65536, k=64, C=4096),
    *(_shape("topk", "forward", FP32, B=65536, R=r, k=k) for r in (4096, 1024) for k in (10, 32)),
    _shape("linear_topk", "forward", FP32, B=1024, d=256, R=10000, k=10),
    _shape("linear_topk", "forward", BF16, B=1024, d=1024, R=131072, k=32),
]
OTHERS = [
    _shape("linear_topk", "full", FP32, B=128, d=256, R=10000, k=10),
    _shape("sparse_linear", "forward", BF16, B=8192, R=65536, k=64, C=4096),
    _shape("linear_inhibit", "forward", FP32, B=128, d=256, R=10000, k=10),
    # S networks at once, B samples of each.
    _shape("linear_topk", "forward", FP32, S=10, B=128, d=256, R=10000, k=10),
    _shape("row_update", "step", FP32, B=128, d=256, R=10000, k=10),
    _shape("row_update", "step", FP32, B=8192, d=1024, R=65536, k=32),
    _shape("count_active", "forward", FP32, B=8192, R=131072, k=32),
    _shape("count_active", "forward", FP32, B=128, R=10000, k=10),
    _shape("sparse_linear", "full", FP32, B=128, R=10000, k=10, C=10),
    _shape("code_gram", "forward", FP32, B=8192, R=10000, k=100, C=10),
    _shape("linear_inhibit", "forward", FP32, B=1024, d=256, R=10000, k=10),
    _shape("topk", "forward", BF16, B=8192, R=131072, k=64),
]
CUDA = TARGETS + OTHERS
CPU = [
    _shape("topk", "forward", FP32, B=128, R=10000, k=10),
    _shape("topk", "forward", FP32, B=128, R=65536, k=64),
    _shape("linear_topk", "forward", FP32, B=128, d=256, R=10000, k=10),
    _shape("linear_topk", "full", FP32, B=128, d=256, R=10000, k=10),
    _shape("linear_inhibit", "forward", FP32, B=128, d=256, R=10000, k=10),
    _shape("linear_active", "forward", FP32, B=128, d=256, R=10000, k=10),
    _shape("sparse_linear", "full", FP32, B=128, R=10000, k=10, C=256),
    _shape("row_update", "step", FP32, B=128, d=256, R=10000, k=10),
    _shape("count_active", "forward", FP32, B=128, R=10000, k=10),
    *(_shape("code_gram", "forward", FP32, B=1024, R=1000, k=k, C=10) for k in (10, 100)),
    _shape("code_gram", "forward", FP32, B=1024, R=4000, k=100, C=10),
]
QUICK = [
    _shape("topk", "forward", FP32, B=16, R=4096, k=10),
    _shape("linear_topk", "forward", FP32, B=16, d=32, R=1000, k=10),
    _shape("linear_topk", "full", FP32, B=16, d=32, R=1000, k=10),
    _shape("linear_topk", "forward", FP32, S=3, B=16, d=32, R=1000, k=10),
    _shape("linear_inhibit", "forward", FP32, B=16, d=32, R=1000, k=10),
    _shape("linear_active", "forward", FP32, B=16, d=32, R=1000, k=10),
    _shape("sparse_linear", "full", FP32, B=16, R=1000, k=10, C=32),
    _shape("row_update", "step", FP32, B=16, d=32, R=1000, k=10),
    _shape("count_active", "forward", FP32, B=16, R=1000, k=10),
    _shape("code_gram", "forward", FP32, B=16, R=1000, k=10, C=10),
]
