"""Cases of linear_code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ssd_kernels._graded_code import Shadow, linear_code
from tests.kernels import cases
from tests.kernels.cases import FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearCode


def call(
    draw: cases.Draw,
    width: int | None = None,
    counts: bool = False,
    shadow: torch.dtype | None = None,
    **options: Any,
) -> cases.Run:
    rows, neurons = draw.S * draw.B, draw.S * draw.R
    x, weight = draw(rows, draw.D).abs(), draw(neurons, draw.D).abs()
    gaba, start = draw.response(0.9), draw.counts(neurons)
    width = width or min(4 * draw.K, draw.R)

    def run(impl: str | None) -> cases.Results:
        now = draw.copy(start) if counts else None
        given = {"counts": now, "networks": draw.S, "impl": impl, **options}
        if shadow is not None and impl != "triton" and not x.is_meta:
            given["shadow"] = Shadow(weight, shadow)
        code, wider = linear_code(x, weight, draw.K, width, gaba, **given)
        # Slots of value 0 are padding, whatever their index.
        dense = torch.zeros_like(gaba).expand(rows, -1).scatter_add(1, code.indices, code.values)
        return dense, wider, now

    return run


def good() -> cases.Arguments:
    return refused.active_layer() | {"width": refused.SLOTS + 2}


def check(
    dtype: torch.dtype = FP32,
    gaba: bool = True,
    networks: int = 1,
    impl: str = "triton",
    shadow: bool = False,
    count: bool = False,
    crowded: bool = False,
    inhibition: str = "mask",
) -> None:
    """By way of the kernels; or the torch path, for what it reads. Crowded: too many fire."""
    x, weight = torch.rand(4, 9).to(dtype), torch.rand(400 * networks, 9).to(dtype)
    x[1::networks] += 1
    response = 1 - torch.rand(400 * networks) / 64
    if crowded:
        response *= 0.5
    counts = torch.ones(800 * networks, dtype=torch.int64)[::2] if count else None
    given: dict[str, Any] = {"inhibition": inhibition, "networks": networks}
    given["gaba"] = response.to(dtype) if gaba else None
    copy = Shadow(weight) if shadow else None
    got, wider = linear_code(x, weight, 2, 6, counts=counts, shadow=copy, impl=impl, **given)
    expected, _ = linear_code(x, weight, 2, 6, impl="reference", **given)
    assert bool(wider.all()) if crowded else not wider.any()
    if not crowded:
        torch.testing.assert_close(got.values, expected.values, rtol=1e-2, atol=1e-2)
    if counts is not None:
        fired = torch.bincount(got.indices[got.values > 0], minlength=len(counts))
        assert torch.equal(counts, fired + 1)


def pinned() -> Callable[[], Any]:
    draw = cases.Draw("meta", **cases.SMALL)
    x, weight, gaba = draw(draw.B, draw.D), draw(draw.R, draw.D), draw(draw.R)
    return lambda: linear_code(x, weight, draw.K, 40, gaba)


OP = cases.Op(
    linear_code,
    call,
    calls={
        "": {"counts": True},
        "of networks": {"counts": True, "S": 2},
        "large": {"counts": True, "B": cases.MANY},
        "by a copy": {"counts": True, "shadow": torch.float32},
        "by a copy in 16 bits": {"counts": True, "shadow": torch.bfloat16},
    },
    untraced=["large", "by a copy", "by a copy in 16 bits"],
    good=good,
    bad=[
        *refused.GRADED,
        ({"width": 2.5}, TypeError, r"width=2\.5 must be an integer"),
        ({"width": True}, TypeError, "width=True must be an integer"),
        ({"width": 1}, ValueError, r"width=1 must lie in 2\.\.9"),
        ({"width": 10}, ValueError, r"width=10 must lie in 2\.\.9"),
    ],
    drawn=LinearCode(linear_code),
    compiled=[
        *cases.grid(FP32, B=128, d=256, R=10000, k=10, width=64, counts=True),
        *cases.grid(FP32, B=1024, d=256, R=10000, k=10, width=64, inhibition="mask"),
        *cases.grid(FP32, S=10, B=128, d=512, R=1000, k=10, width=128, counts=True),
        *cases.grid(FP32, B=1024, d=1024, R=65536, k=32, width=128),
    ],
    checked={
        "half": partial(check, FP16, gaba=False),
        "half gaba": partial(check, FP16, networks=2),
        "graded": check,
        "graded networks": partial(check, networks=2, count=True, inhibition="subtract"),
        "graded crowded": partial(check, count=True, crowded=True),
        "torch": partial(check, networks=2, impl="torch", inhibition="subtract"),
        "torch shadow": partial(check, shadow=True, impl="torch", inhibition="subtract"),
    },
    pins={"": cases.pin("_halve_kernel _keys_kernel _graded_kernel", 1, pinned)},
)
