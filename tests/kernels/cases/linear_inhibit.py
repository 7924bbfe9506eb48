"""Cases of linear_inhibit."""

from __future__ import annotations

from typing import Any

import torch

from ssd_kernels import linear_inhibit
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearInhibit


def call(
    draw: cases.Draw, bias: bool = True, gaba: bool = True, counts: bool = False, **options: Any
) -> cases.Run:
    x, weight, shift = draw.layer(bias)
    start = draw.counts(draw.S * draw.R)
    response = draw.response(-1) if gaba else None

    def run(impl: str | None) -> cases.Results:
        now = draw.copy(start) if counts else None
        given = {"counts": now, "networks": draw.S, "impl": impl, **options}
        return linear_inhibit(x, weight, draw.K, response, shift, **given), now

    return run


def good() -> cases.Arguments:
    return refused.layer() | {"gaba": torch.rand(refused.NEURONS)}


LAUNCHES = "mm _select_kernel _select_kernel _inhibit_kernel"
OP = cases.Op(
    linear_inhibit,
    call,
    calls={
        "": {"counts": True},
        "of networks": {"counts": True, "S": 2},
        "without gradients": {
            "S": 2,
            "bias": False,
            "gaba": False,
            "grad": False,
            "inhibition": "mask",
        },
    },
    half=True,
    good=good,
    bad=[*refused.LAYER, *refused.GABA],
    drawn=LinearInhibit(linear_inhibit),
    compiled=[
        *cases.grid(FP32, B=128, d=256, R=10000, k=10, bias=False, counts=True, inhibition="mask"),
        *cases.grid(BF16, B=128, d=256, R=10000, k=10, gaba=False, grad=False),
        *cases.grid(FP32, B=128, d=64, R=200, k=200),
        *cases.grid(FP32, S=10, B=128, d=256, R=1000, k=10, counts=True),
    ],
    checked={
        "gaba": cases.check(B=5, D=9, R=70, K=3, counts=True),
        "one": cases.check(B=2, D=9, R=40, K=1, gaba=False),
        "networks": cases.check(
            S=2, B=3, D=9, R=40, K=2, bias=False, counts=True, inhibition="mask", grad=False
        ),
        "all": cases.check(B=2, D=9, R=40, K=40, counts=True),
        "half": cases.check(FP16, B=2, D=9, R=40, K=2, counts=True, grad=False),
    },
    tiles={"linear_inhibit": cases.tile(BM=4, BN=32, num_warps=1)},
    pins={
        "": cases.pin(LAUNCHES, 6, **cases.SMALL, bias=False, grad=False),
        "with gradients": cases.pin(LAUNCHES, 7, **cases.SMALL, bias=False),
    },
)
