"""Cases of dense_update."""

from __future__ import annotations

from typing import Any

from ssd.ops.dense_update import dense_update
from ssd.ops.reference import Update
from tests.kernels import cases
from tests.kernels.cases import FP32


def call(
    draw: cases.Draw,
    single: bool = False,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = 1.0,
) -> cases.Run:
    """Each of several networks has its rate and bound, and every second one no samples."""
    widths = [draw.D] if single else [draw.D, draw.C]
    starts, gradients, kept = ([draw(draw.S * draw.R, w) for w in widths] for _ in range(3))
    options: dict[str, Any] = {
        "lr": draw.per_network(0.1),
        "max_norm": draw.per_network(max_norm),
        "nonnegative": project,
        "normalize": [project, False][: len(widths)],
        "momentum": momentum,
        "samples": draw.range(draw.S) % 2 if draw.S > 1 else None,
        "networks": draw.S,
    }

    def run(impl: str | None) -> cases.Results:
        weights, buffers = ([draw.copy(t) for t in tensors] for tensors in (starts, kept))
        kept_up = buffers if momentum else None
        dense_update(Update(weights, gradients, buffers=kept_up, **options), impl=impl)
        return *weights, *buffers

    return run


OP = cases.Op(
    dense_update,
    call,
    calls={
        "": {"S": 2, "momentum": 0.9},
        "plain": {"single": True, "project": False, "max_norm": None},
    },
    implied={"C": 10},
    compiled=[
        *cases.grid(FP32, R=1000, d=256, project=False, max_norm=None),
        *cases.grid(FP32, R=10000, d=4096, momentum=0.9),
        *cases.grid(FP32, S=10, R=10000, d=256, C=100),
    ],
    checked={
        "": cases.check(tolerance=1e-5, R=5, D=5, C=3, project=False, max_norm=None),
        "clipped": cases.check(tolerance=1e-5, R=5, D=11, C=8, max_norm=0.5, momentum=0.9),
        "networks": cases.check(tolerance=1e-5, S=3, R=5, D=9, C=2),
    },
    tiles={"squares": cases.tile(PARTS=3, BLOCK=4, num_warps=1)},
    pins={
        "": cases.pin(
            "_squares_kernel _dense_apply_kernel _dense_apply_kernel", 1, S=10, R=10_000, D=256
        )
    },
)
