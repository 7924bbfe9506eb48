"""Cases of linear_active."""

from __future__ import annotations

from functools import partial

import torch

from ssd_kernels._graded_code import linear_active
from tests.kernels import cases
from tests.kernels.cases import FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearActive


def call(draw: cases.Draw, least: float = 0.9, networks: int = 1) -> cases.Run:
    x, weight = draw(networks * draw.B, draw.D), draw(networks * draw.R, draw.D)
    gaba = draw.ramp(least, networks)

    def run(impl: str | None) -> cases.Results:
        counts = draw.counts(networks * draw.R)
        given = {"counts": counts, "every": True, "networks": networks, "impl": impl}
        active = linear_active(x, weight, draw.K, gaba, **given)
        return active.values, active.gate > 0, counts

    return run


def launch(dtype: torch.dtype, *, B: int, d: int, R: int, k: int) -> None:
    x, weight = meta.new(B, d, dtype=dtype), meta.new(R, d, dtype=dtype)
    linear_active(x, weight, k, meta.new(R, dtype=dtype), inhibition="mask", counts=meta.longs(R))


def pinned() -> meta.Prepare:
    return meta.of(linear_active, meta.new(128, 256), meta.new(10_000, 256), 10)


def check(dtype: torch.dtype, gaba: bool, inhibition: str) -> None:
    x, weight = small.integers(4, 9, dtype=dtype), small.integers(70, 9, dtype=dtype)
    response = torch.randint(1, 5, (70,)).to(dtype) / 4 if gaba else None
    results = []
    for impl in ("torch", "reference"):
        counts = small.counter(70)
        out = linear_active(x, weight, 2, response, inhibition=inhibition, counts=counts, impl=impl)
        results.append((tuple(out), counts))
    small.equal(*results)


OP = cases.Op(
    linear_active,
    calls={
        "": cases.Call(call, half=False, traced=False),
        "of networks, excited": cases.Call(
            partial(call, least=-1, networks=2), half=False, traced=False
        ),
    },
    good=refused.active_layer,
    bad=refused.ACTIVE,
    drawn=LinearActive(linear_active),
    launch=launch,
    compiled=cases.grid(FP32, B=128, d=256, R=10000, k=10),
    checked={
        "half": partial(check, FP16, True, "subtract"),
        "torch": partial(check, FP32, True, "mask"),
    },
    pins={"": cases.Pin(pinned(), "mm _select_kernel _select_kernel _inhibit_kernel", 6)},
)
