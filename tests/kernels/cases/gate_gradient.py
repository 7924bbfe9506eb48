"""Cases of gate_gradient."""

from __future__ import annotations

from functools import partial

import torch

from ssd.ops.gate_gradient import gate_gradient
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta


def call(draw: cases.Draw) -> cases.Run:
    rows, neurons = draw.S * draw.B, draw.S * draw.R
    starts, gate = [draw(rows, draw.R) for _ in range(3)], draw(rows, draw.R)
    slopes, positions = draw(rows, draw.K), (draw.range(neurons) % draw.R).clamp(max=draw.K)

    def run(impl: str | None) -> cases.Results:
        gradients = [gradient.clone() for gradient in starts]
        gate_gradient(gradients[0], gate, slopes, positions, impl=impl)
        gate_gradient(gradients[1], gate > 0, slopes, positions, gated=False, impl=impl)
        gate_gradient(gradients[2], gate, impl=impl)
        return tuple(gradients)

    return run


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    n: int = 0,
    S: int = 1,
    gate: torch.dtype = FP32,
    gated: bool = True,
    transposed: bool = False,
) -> None:
    shape = (R, S * B) if transposed else (S * B, R)
    pair = [meta.new(*shape, dtype=kind) for kind in (dtype, gate)]
    gate_gradient(
        *(t.T if transposed else t for t in pair),
        meta.new(S * B, n, dtype=dtype) if n else None,
        meta.longs(S * R) if n else None,
        gated=gated,
    )


def check(neurons: int, subnetwork: int, gated: bool, transposed: bool = False) -> None:
    gate, positions = (
        small.integers(6, neurons),
        torch.stack([torch.randperm(neurons) for _ in range(2)]),
    )
    slopes = torch.randn(6, subnetwork) if subnetwork else None
    places = positions.clamp(max=subnetwork).flatten() if subnetwork else None
    results = []
    for impl in ("triton", "reference"):
        wide = torch.arange(6.0 * (neurons + small.TAIL)).view(6, -1)
        wide = wide.T.contiguous().T if transposed else wide
        mask = gate > 0 if transposed else gate
        gate_gradient(wide[:, :neurons], mask, slopes, places, gated=gated, impl=impl)
        results.append(wide)
    small.equal(*results)


OP = cases.Op(
    gate_gradient,
    calls={"": cases.Call(call, half=False)},
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, R=10000),
        *cases.grid(FP32, S=10, B=128, R=1000, n=20),
        *cases.grid(FP32, B=128, R=10000, n=200, gate=torch.bool, gated=False),
        *cases.grid(FP32, B=128, R=1000, n=20, transposed=True),
    ],
    checked={
        "": partial(check, 9, 3, True),
        "behind": partial(check, 7, 2, False, transposed=True),
        "alone": partial(check, 1, 0, True),
    },
    tiles={"gate_gradient": cases.tile(BLOCK=4, num_warps=1)},
    pins={
        "": cases.Pin(
            meta.of(
                gate_gradient,
                meta.new(1280, 1000),
                meta.new(1280, 1000),
                meta.new(1280, 20),
                meta.longs(10_000),
            ),
            "_gate_kernel",
            0,
        )
    },
)
