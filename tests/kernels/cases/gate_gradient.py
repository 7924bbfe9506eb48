"""Cases of gate_gradient."""

from __future__ import annotations

import torch

from ssd.ops.gate_gradient import gate_gradient
from tests.kernels import cases
from tests.kernels.cases import FP32


def call(
    draw: cases.Draw,
    gate: torch.dtype = FP32,
    gated: bool = True,
    transposed: bool = False,
) -> cases.Run:
    """An N of 0: no slopes."""
    rows, neurons = draw.S * draw.B, draw.S * draw.R
    shape = (draw.R, rows) if transposed else (rows, draw.R)
    start, passes = (t.T if transposed else t for t in (draw(*shape), draw(*shape)))
    passes = passes > 0 if gate == torch.bool else passes
    more: tuple[torch.Tensor, ...] = ()
    if draw.N:
        positions = (draw.range(neurons) * 7 % draw.R).clamp(max=draw.N)
        more = draw(rows, draw.N), positions

    def run(impl: str | None) -> cases.Results:
        gradient = draw.copy(start)
        gate_gradient(gradient, passes, *more, gated=gated, impl=impl)
        return (gradient,)

    return run


MASK = {"gate": torch.bool, "gated": False}
OP = cases.Op(
    gate_gradient,
    call,
    calls={"": {"S": 2}, "of a mask": {"S": 2, **MASK}, "alone": {"S": 2, "N": 0}},
    compiled=[
        *cases.grid(FP32, B=128, R=10000),
        *cases.grid(FP32, S=10, B=128, R=1000, n=20),
        *cases.grid(FP32, B=128, R=10000, n=200, **MASK),
        *cases.grid(FP32, B=128, R=1000, n=20, transposed=True),
    ],
    checked={
        "": cases.check(S=2, B=3, R=9, N=3),
        "behind": cases.check(S=2, B=3, R=7, N=2, transposed=True, **MASK),
        "alone": cases.check(S=2, B=3, R=1, N=0),
    },
    tiles={"gate_gradient": cases.tile(BLOCK=4, num_warps=1)},
    pins={"": cases.pin("_gate_kernel", 0, S=10, B=128, R=1000, N=20)},
)
