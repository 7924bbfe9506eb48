"""Cases of dense_update."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd.ops.dense_update import dense_update
from ssd.ops.reference import Update
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.cases import _meta as meta


def call(draw: cases.Draw) -> cases.Run:
    neurons = draw.S * draw.R
    starts, gradients, kept = ([draw(neurons, draw.D), draw(neurons, draw.C)] for _ in range(3))
    samples = draw.integers(0, 3)
    rates = torch.tensor([0.1, 0.2], device=draw.device)

    def run(impl: str | None) -> cases.Results:
        weights, buffers = [w.clone() for w in starts], [b.clone() for b in kept]
        update = Update(
            weights,
            gradients,
            lr=rates,
            max_norm=1.0,
            nonnegative=True,
            normalize=[True, False],
            momentum=0.9,
            buffers=buffers,
            samples=samples,
            networks=draw.S,
        )
        dense_update(update, impl=impl)
        return *weights, *buffers

    return run


def plain(draw: cases.Draw) -> cases.Run:
    start, gradient = draw(draw.R, draw.D), draw(draw.R, draw.D)

    def run(impl: str | None) -> cases.Results:
        weight = start.clone()
        dense_update(Update([weight], [gradient], lr=0.1), impl=impl)
        return (weight,)

    return run


def launch(
    dtype: torch.dtype,
    *,
    R: int,
    d: int,
    C: int = 10,
    S: int = 1,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = 1.0,
) -> None:
    weights = [meta.new(S * R, width, dtype=dtype) for width in (d, C)]
    several = S > 1  # each with its rate and bound
    update = Update(
        weights,
        [torch.empty_like(weight) for weight in weights],
        lr=meta.new(S, dtype=FP32) if several else 0.1,
        max_norm=meta.new(S, dtype=FP32) if several and max_norm is not None else max_norm,
        nonnegative=project,
        normalize=[project, False],
        momentum=momentum,
        buffers=[torch.empty_like(weight) for weight in weights] if momentum else None,
        samples=meta.longs(S) if several else None,
        networks=S,
    )
    dense_update(update)


def check(widths: list[int], networks: int, nonnegative: bool = True, **options: Any) -> None:
    given = [[torch.randn(5 * networks, width) for width in widths] for _ in range(3)]
    if networks > 1:
        bounds, samples = torch.rand(networks), torch.arange(networks) % 2
        options |= {"max_norm": bounds, "lr": bounds.flip(0), "samples": samples}
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        weights, gradients, buffers = ([t.to(dtype, copy=True) for t in ts] for ts in given)
        kept = buffers if "momentum" in options else None
        update = Update(
            weights,
            gradients,
            nonnegative=nonnegative,
            normalize=[True, False],
            buffers=kept,
            networks=networks,
            **options,
        )
        dense_update(update, impl=impl)
        results.append([t.double() for t in weights + buffers])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def pinned(S: int = 10) -> meta.Prepare:
    weights, gradients = ([meta.new(S * 10_000, width) for width in (256, 10)] for _ in range(2))
    samples = meta.longs(S)
    update = Update(
        weights,
        gradients,
        lr=meta.new(S),
        max_norm=meta.new(S),
        samples=samples,
        normalize=[True, False],
        networks=S,
    )
    return meta.of(dense_update, update)


OP = cases.Op(
    dense_update,
    calls={"": cases.Call(call, half=False), "plain": cases.Call(plain, half=False)},
    launch=launch,
    compiled=[
        *cases.grid(FP32, R=1000, d=256, project=False, max_norm=None),
        *cases.grid(FP32, R=10000, d=4096, momentum=0.9),
        *cases.grid(FP32, S=10, R=10000, d=256, C=100),
    ],
    checked={
        "": partial(check, [5, 3], 1, False, lr=0.1),
        "clipped": partial(check, [11, 8], 1, lr=0.1, max_norm=0.5, momentum=0.9),
        "networks": partial(check, [9, 2], 3),
    },
    tiles={"squares": cases.tile(PARTS=3, BLOCK=4, num_warps=1)},
    pins={"": cases.Pin(pinned(), "_squares_kernel _dense_apply_kernel _dense_apply_kernel", 1)},
)
