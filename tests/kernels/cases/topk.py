"""Cases of topk."""

from __future__ import annotations

from math import inf, nan

import torch
from torch import Tensor

from ssd_kernels import topk
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import TopK


def fill(kind: str, x: Tensor) -> Tensor:
    """Scores of a kind, of normal ones [B, R]."""
    if kind == "ascending":
        return (torch.arange(x.shape[1]) // 3).float().expand(len(x), -1).contiguous()
    if kind == "special":
        pool = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
        return pool[torch.randint(len(pool), x.shape)]
    fillings = {"normal": x, "zero": 0 * x, "negative": -x.abs() - 1, "ties": (2 * x).round()}
    return (fillings | {"sparse": (x - 2).relu()})[kind]


def call(
    draw: cases.Draw,
    kind: str = "normal",
    boost: bool = False,
    mask: bool = False,
    allowed: float = 0.7,
) -> cases.Run:
    """allowed: the share of neurons that a mask allows."""
    scores = draw.leaf("scores", draw.put(fill(kind, draw(draw.B, draw.R))))
    given = {
        "boost": draw(draw.R).abs() if boost else None,
        "mask": draw.range(draw.R) * 37 % draw.R < allowed * draw.R if mask else None,
    }

    def run(impl: str | None) -> cases.Results:
        out = topk(scores, draw.K, **given, impl=impl)
        return out.values, out.indices  # torch.compile of torch 2.6 cannot slice a named tuple

    return run


def good() -> cases.Arguments:
    return {
        "scores": torch.randn(refused.BATCH, refused.NEURONS),
        "k": refused.SLOTS,
        "boost": torch.rand(refused.NEURONS),
        "mask": torch.ones(refused.NEURONS, dtype=torch.bool),
    }


BAD: list[cases.Bad] = [
    *refused.SETTINGS,
    ({"scores": torch.ones(4, 9).long()}, TypeError, "scores has dtype torch.int64"),
    ({"scores": torch.ones(())}, ValueError, "at least one dimension"),
    ({"boost": torch.ones(9).half()}, TypeError, "boost has dtype torch.float16"),
    ({"boost": torch.ones(8)}, ValueError, r"boost has shape \[8\]"),
    ({"boost": torch.ones(9, device=refused.META)}, ValueError, "boost is on meta"),
    ({"mask": torch.ones(9)}, TypeError, "mask has dtype torch.float32"),
    ({"mask": torch.ones(8).bool()}, ValueError, r"mask has shape \[8\]"),
    ({"mask": torch.ones(9, device=refused.META).bool()}, ValueError, "mask is on meta"),
]


OP = cases.Op(
    topk,
    call,
    calls={
        "": {"boost": True, "mask": True},
        "of ties": {"kind": "ties"},
        "in parts": {"B": 2, "R": 40_003, "K": 64},
    },
    half=True,
    untraced=["in parts"],
    good=good,
    bad=BAD,
    drawn=TopK(topk),
    compiled=[
        *cases.grid(FP32, B=8192, R=512, k=64),
        *cases.grid(FP32, BF16, FP16, B=8192, R=1024, k=32),
        *cases.grid(FP32, B=8192, R=1000, k=7, boost=True, mask=True),
        *cases.grid(FP32, B=8192, R=131072, k=256),
        *cases.grid(FP32, BF16, B=8192, R=16384, k=32, boost=True, mask=True),
        *cases.grid(FP32, B=16, R=131072, k=64),
        *cases.grid(BF16, B=16, R=131072, k=256, boost=True, mask=True),
        *cases.grid(FP32, B=5, R=50257, k=40),
    ],
    checked={
        **{k: cases.check(kind=k, B=3, R=200, K=5) for k in ("ties", "special", "zero")},
        "many cuts": cases.check(kind="ascending", B=2, R=320, K=20),
        "cuts with ties": cases.check(kind="ties", B=5, R=500, K=31),
        "one": cases.check(B=5, R=65, K=1),
        "all": cases.check(kind="ties", B=2, R=33, K=33),
        "parts": cases.check(kind="ties", B=1, R=520, K=3),
        "parts boost mask": cases.check(B=2, R=520, K=30, boost=True, mask=True, allowed=0.4),
        "few allowed": cases.check(FP16, B=2, R=70, K=4, mask=True, allowed=0.03),
    },
    tiles={"topk": cases.tile(TILE=64, PROGRAMS=2, num_warps=1)},
    pins={
        "": cases.pin("_select_kernel", 1, B=8192, R=10_000, K=10, grad=False),
        "of few rows": cases.pin(
            "_select_kernel _select_kernel", 4, B=128, R=10_000, K=10, grad=False
        ),
    },
)
