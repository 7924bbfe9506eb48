"""Cases of linear_inhibit."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd_kernels import linear_inhibit
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearInhibit


def call(draw: cases.Draw, networks: int = 1) -> cases.Run:
    x, weight, bias = draw.layer(networks)
    gaba, counts = draw.ramp(-1, networks), draw.counts(networks * draw.R)

    def run(impl: str | None) -> cases.Results:
        now = counts.clone()
        options: dict[str, Any] = {"counts": now, "networks": networks, "impl": impl}
        return linear_inhibit(x, weight, draw.K, gaba, bias, **options), now

    return run


def without_gradients(draw: cases.Draw) -> cases.Run:
    x, weight = draw(2 * draw.B, draw.D), draw(2 * draw.R, draw.D)
    return lambda impl: (
        linear_inhibit(x, weight, draw.K, inhibition="mask", networks=2, impl=impl),
    )


def good() -> cases.Arguments:
    return refused.layer() | {"gaba": torch.rand(refused.NEURONS)}


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    S: int = 1,
    bias: bool = True,
    gaba: bool = True,
    counts: bool = False,
    grad: bool = True,
    **options: Any,
) -> None:
    linear_inhibit(
        meta.new(S * B, d, dtype=dtype),
        meta.new(S * R, d, dtype=dtype).requires_grad_(grad),
        k,
        meta.new(S * R, dtype=dtype) if gaba else None,
        meta.new(S * R, dtype=dtype) if bias else None,
        counts=meta.longs(S * R) if counts else None,
        networks=S,
        **options,
    )


def check(
    batch: int,
    neurons: int,
    k: int,
    gaba: bool = True,
    bias: bool = True,
    inhibition: str = "subtract",
    count: bool = True,
    networks: int = 1,
    grad: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    x, weight, shift = small.layer(batch * networks, neurons * networks, 9, bias, dtype)
    response = torch.randint(1, 5, (neurons * networks,)).to(dtype) / 4 if gaba else None
    leaves = [t.requires_grad_(grad) for t in (x, weight, shift) if t is not None]
    results = []
    for impl in ("triton", "reference"):
        counts = small.counter(neurons * networks) if count else None
        out = linear_inhibit(
            x,
            weight,
            k,
            response,
            shift,
            inhibition=inhibition,
            counts=counts,
            networks=networks,
            impl=impl,
        )
        slopes = small.gradients((out * small.ramp(out)).sum(), leaves) if grad else ()
        results.append((out, counts, slopes))
    small.equal(*results)


def pinned(grad: bool, dtype: torch.dtype = torch.float32) -> meta.Prepare:
    x, weight, gaba = (
        meta.new(128, 256, dtype=dtype),
        meta.new(10_000, 256, dtype=dtype),
        meta.new(10_000),
    )
    return meta.of(linear_inhibit, x.requires_grad_(grad), weight, 10, gaba)


OP = cases.Op(
    linear_inhibit,
    calls={
        "": cases.Call(call),
        "of networks": cases.Call(partial(call, networks=2)),
        "without gradients": cases.Call(without_gradients),
    },
    good=good,
    bad=[*refused.LAYER, *refused.GABA],
    drawn=LinearInhibit(linear_inhibit),
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, d=256, R=10000, k=10, bias=False, counts=True, inhibition="mask"),
        *cases.grid(BF16, B=128, d=256, R=10000, k=10, gaba=False, grad=False),
        *cases.grid(FP32, B=128, d=64, R=200, k=200),
        *cases.grid(FP32, S=10, B=128, d=256, R=1000, k=10, counts=True),
    ],
    checked={
        "gaba": partial(check, 5, 70, 3),
        "one": partial(check, 2, 40, 1, gaba=False, count=False),
        "networks": partial(check, 3, 40, 2, bias=False, inhibition="mask", networks=2, grad=False),
        "all": partial(check, 2, 40, 40),
        "half": partial(check, 2, 40, 2, dtype=FP16, grad=False),
    },
    tiles={"linear_inhibit": cases.tile(BM=4, BN=32, num_warps=1)},
    pins={
        "": cases.Pin(pinned(False), "mm _select_kernel _select_kernel _inhibit_kernel", 6),
        "with gradients": cases.Pin(
            pinned(True), "mm _select_kernel _select_kernel _inhibit_kernel", 7
        ),
    },
)
