"""Cases of topk."""

from __future__ import annotations

from functools import partial
from math import inf, nan
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import topk
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import TopK


def call(draw: cases.Draw) -> cases.Run:
    scores = draw.leaf(draw.B, draw.R)
    boost = draw(draw.R)
    generator = torch.Generator(device="cpu").manual_seed(1)
    mask = (torch.rand(draw.R, generator=generator, device="cpu") > 0.3).to(draw.device)

    def run(impl: str | None) -> cases.Results:
        plain = topk(scores, draw.K, impl=impl)
        chosen = topk(scores, draw.K, boost=boost, mask=mask, impl=impl)
        # By name: torch.compile of torch 2.6 cannot slice a named tuple.
        return plain.values, plain.indices, chosen.values, chosen.indices

    return run


def ties(draw: cases.Draw) -> cases.Run:
    scores = draw(draw.B, draw.R).round()

    def run(impl: str | None) -> cases.Results:
        out = topk(scores, draw.K, impl=impl)
        return out.values, out.indices

    return run


def parts(draw: cases.Draw) -> cases.Run:
    scores = draw(2, 40_003)
    return lambda impl: topk(scores, 64, impl=impl)[:2]


def good() -> cases.Arguments:
    return {
        "scores": torch.randn(refused.BATCH, refused.NEURONS),
        "k": refused.SLOTS,
        "boost": torch.rand(refused.NEURONS),
        "mask": torch.ones(refused.NEURONS, dtype=torch.bool),
    }


BAD: list[cases.Bad] = [
    *refused.SETTINGS,
    ({"k": 0}, ValueError, r"k=0 must lie in 1\.\.9"),
    ({"k": 10}, ValueError, r"k=10 must lie in 1\.\.9"),
    ({"scores": torch.ones(4, 9).long()}, TypeError, "scores has dtype torch.int64"),
    ({"scores": torch.ones(())}, ValueError, "at least one dimension"),
    ({"boost": torch.ones(9).half()}, TypeError, "boost has dtype torch.float16"),
    ({"boost": torch.ones(8)}, ValueError, r"boost has shape \[8\]"),
    ({"boost": torch.ones(9, device=refused.META)}, ValueError, "boost is on meta"),
    ({"mask": torch.ones(9)}, TypeError, "mask has dtype torch.float32"),
    ({"mask": torch.ones(8).bool()}, ValueError, r"mask has shape \[8\]"),
    ({"mask": torch.ones(9, device=refused.META).bool()}, ValueError, "mask is on meta"),
]


def launch(
    dtype: torch.dtype, *, B: int, R: int, k: int, boost: bool = False, mask: bool = False
) -> None:
    topk(
        meta.new(B, R, dtype=dtype),
        k,
        boost=meta.new(R, dtype=dtype) if boost else None,
        mask=meta.new(R, dtype=torch.bool) if mask else None,
    )


def fill(kind: str, batch: int, neurons: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(batch, neurons)
    fillings = {
        "normal": lambda: x,
        "zero": lambda: torch.zeros_like(x),
        "negative": lambda: -x.abs() - 1,
        "ties": lambda: (x * 2).round(),
        "sparse": lambda: (x - 2).relu(),
        "ascending": lambda: (torch.arange(neurons) // 3).float().expand(batch, -1).contiguous(),
        "special": lambda: _special(x),
    }
    return fillings[kind]().to(dtype)


def _special(x: Tensor) -> Tensor:
    pool = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0])
    return pool[torch.randint(len(pool), x.shape)]


def check(
    kind: str,
    batch: int,
    neurons: int,
    k: int,
    boost: bool = False,
    allowed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    scores = fill(kind, batch, neurons, dtype).requires_grad_()
    options: dict[str, Any] = {"boost": torch.rand(neurons).to(dtype)} if boost else {}
    if allowed is not None:
        options["mask"] = torch.randperm(neurons) < allowed
    got = topk(scores, k, impl="triton", **options)
    expected = topk(scores, k, impl="reference", **options)
    small.equal(got[:2], expected[:2])
    slopes = [
        small.gradients((o.values * small.ramp(o.values)).sum(), [scores]) for o in (got, expected)
    ]
    small.equal(*slopes)


OP = cases.Op(
    topk,
    calls={
        "": cases.Call(call),
        "of ties": cases.Call(ties),
        "in parts": cases.Call(parts, traced=False),
    },
    good=good,
    bad=BAD,
    drawn=TopK(topk),
    launch=launch,
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
        **{kind: partial(check, kind, 3, 200, 5) for kind in ("ties", "special", "zero")},
        "many cuts": partial(check, "ascending", 2, 320, 20),
        "cuts with ties": partial(check, "ties", 5, 500, 31),
        "one": partial(check, "normal", 5, 65, 1),
        "all": partial(check, "ties", 2, 33, 33),
        "parts": partial(check, "ties", 1, 520, 3),
        "parts boost mask": partial(check, "normal", 2, 520, 30, boost=True, allowed=200),
        "few allowed": partial(check, "normal", 2, 70, 4, allowed=2, dtype=FP16),
    },
    tiles={"topk": cases.tile(TILE=64, PROGRAMS=2, num_warps=1)},
    pins={
        "": cases.Pin(meta.of(topk, meta.new(8192, 10_000), 10), "_select_kernel", 1),
        "of few rows": cases.Pin(
            meta.of(topk, meta.new(128, 10_000), 10), "_select_kernel _select_kernel", 4
        ),
    },
)
