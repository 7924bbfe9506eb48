"""Cases of linear_active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ssd_kernels._graded_code import linear_active
from tests.kernels import cases
from tests.kernels.cases import FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearActive


def call(draw: cases.Draw, least: float = 0.9, **options: Any) -> cases.Run:
    x, weight = draw(draw.S * draw.B, draw.D), draw(draw.S * draw.R, draw.D)
    gaba, start = draw.response(least), draw.counts(draw.S * draw.R)
    options = {"inhibition": "mask", "networks": draw.S, **options}

    def run(impl: str | None) -> cases.Results:
        counts = draw.copy(start)
        active = linear_active(x, weight, draw.K, gaba, counts=counts, **options, impl=impl)
        return active.values, active.neurons, active.gate > 0, counts

    return run


def pinned() -> Callable[[], Any]:
    draw = cases.Draw("meta", **cases.SMALL)
    x, weight = draw(draw.B, draw.D), draw(draw.R, draw.D)
    return lambda: linear_active(x, weight, draw.K)


EVERY = {"inhibition": "subtract", "every": True}
OP = cases.Op(
    linear_active,
    call,
    calls={"": EVERY, "of networks, excited": {**EVERY, "S": 2, "least": -1.0}},
    untraced=["", "of networks, excited"],
    good=refused.active_layer,
    bad=refused.ACTIVE,
    drawn=LinearActive(linear_active),
    compiled=cases.grid(FP32, B=128, d=256, R=10000, k=10),
    checked={
        "half": cases.check(FP16, impl="torch", B=4, D=9, R=70, K=2, inhibition="subtract"),
        "torch": cases.check(impl="torch", B=4, D=9, R=70, K=2),
    },
    pins={"": cases.pin("mm _select_kernel _select_kernel _inhibit_kernel", 6, pinned)},
)
