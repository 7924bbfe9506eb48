"""Cases of linear_code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd_kernels._graded_code import Shadow, linear_code
from tests.kernels import cases
from tests.kernels.cases import FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearCode


def call(
    draw: cases.Draw, batch: int | None = None, networks: int = 1, shadow: torch.dtype | None = None
) -> cases.Run:
    rows, neurons = networks * (batch or draw.B), networks * draw.R
    x, weight = draw(rows, draw.D).abs(), draw(neurons, draw.D).abs()
    gaba = draw.ramp(0.9, networks)

    def run(impl: str | None) -> cases.Results:
        counts = draw.counts(neurons)
        given: dict[str, Any] = {"counts": counts, "networks": networks, "impl": impl}
        if shadow is not None and impl != "triton" and not x.is_meta:
            given["shadow"] = Shadow(weight, shadow)
        width = min(4 * draw.K, draw.R)
        code, wider = linear_code(x, weight, draw.K, width, gaba, **given)
        # Slots of value 0 are padding, whatever their index.
        dense = torch.zeros_like(gaba).expand(rows, -1).scatter_add(1, code.indices, code.values)
        return dense, wider, counts

    return run


def good() -> cases.Arguments:
    return refused.active_layer() | {"width": refused.SLOTS + 2}


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    width: int,
    S: int = 1,
    counts: bool = False,
    **options: Any,
) -> None:
    shapes = (S * B, d), (S * R, d), (S * R,)
    x, weight, gaba = (meta.new(*shape, dtype=dtype) for shape in shapes)
    given = {"counts": meta.longs(S * R) if counts else None, "networks": S, **options}
    linear_code(x, weight, k, width, gaba, **given)


def check(
    dtype: torch.dtype,
    gaba: bool,
    inhibition: str,
    shadow: bool = False,
    networks: int = 1,
    impl: str = "triton",
    count: bool = False,
    crowded: bool = False,
) -> None:
    """By way of the kernels; or the torch path, for what it reads. Crowded: too many fire."""
    x, weight = torch.rand(4, 9).to(dtype), torch.rand(400 * networks, 9).to(dtype)
    x[1::networks] += 1
    response = (1 - torch.rand(400 * networks) / 64).to(dtype) if gaba else None
    if crowded and response is not None:
        response *= 0.5
    copy = Shadow(weight) if shadow else None
    counts = small.counter(400 * networks) if count else None
    got, wider = linear_code(
        x,
        weight,
        2,
        6,
        response,
        inhibition=inhibition,
        counts=counts,
        shadow=copy,
        networks=networks,
        impl=impl,
    )
    expected, _ = linear_code(
        x, weight, 2, 6, response, inhibition=inhibition, networks=networks, impl="reference"
    )
    assert bool(wider.all()) if crowded else not wider.any()
    if not crowded:
        torch.testing.assert_close(got.values, expected.values, rtol=1e-2, atol=1e-2)
    if counts is not None:
        fired = torch.bincount(got.indices[got.values > 0], minlength=len(counts))
        small.equal(counts, fired + 1)


OP = cases.Op(
    linear_code,
    calls={
        "": cases.Call(call, half=False),
        "of networks": cases.Call(partial(call, networks=2), half=False),
        "large": cases.Call(partial(call, batch=cases.Draw.MANY), half=False, traced=False),
        "by a copy": cases.Call(partial(call, shadow=torch.float32), half=False, traced=False),
        "by a copy in 16 bits": cases.Call(
            partial(call, shadow=torch.bfloat16), half=False, traced=False
        ),
    },
    good=good,
    bad=[
        *refused.GRADED,
        ({"width": 2.5}, TypeError, r"width=2\.5 must be an integer"),
        ({"width": True}, TypeError, "width=True must be an integer"),
        ({"width": 10}, ValueError, r"width=10 must lie in 2\.\.9"),
    ],
    drawn=LinearCode(linear_code),
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, d=256, R=10000, k=10, width=64, counts=True),
        *cases.grid(FP32, B=1024, d=256, R=10000, k=10, width=64, inhibition="mask"),
        *cases.grid(FP32, S=10, B=128, d=512, R=1000, k=10, width=128, counts=True),
        *cases.grid(FP32, B=1024, d=1024, R=65536, k=32, width=128),
    ],
    checked={
        "half": partial(check, FP16, False, "mask"),
        "half gaba": partial(check, FP16, True, "mask", networks=2),
        "graded": partial(check, FP32, True, "mask"),
        "graded networks": partial(check, FP32, True, "subtract", networks=2, count=True),
        "graded crowded": partial(check, FP32, True, "mask", count=True, crowded=True),
        "torch": partial(check, FP32, True, "subtract", networks=2, impl="torch"),
        "torch shadow": partial(check, FP32, True, "subtract", shadow=True, impl="torch"),
    },
    pins={
        "": cases.Pin(
            meta.of(
                linear_code, meta.new(128, 256), meta.new(10_000, 256), 10, 40, meta.new(10_000)
            ),
            "_halve_kernel _keys_kernel _graded_kernel",
            1,
        )
    },
)
