"""Cases of draw_batch."""

from __future__ import annotations

from typing import Any

from ssd.ops.batch import draw_batch
from ssd.ops.reference import Stored
from tests.kernels import cases
from tests.kernels.cases import FP32


def call(
    draw: cases.Draw, stored: int = 6000, position: int = 0, teacher: bool = True
) -> cases.Run:
    """Batch number `position`, of one sample less in each network; an R of 0: no responses."""
    rows = draw.S * stored
    given: dict[str, Any] = {
        "inputs": draw(rows, draw.D),
        "labels": draw.range(rows),
        "order": draw.range(rows).flip(0).view(draw.S, stored) % stored,
        "samples": stored - draw.range(draw.S),
        "position": draw.range(position + 1)[position],
        "size": draw.B,
        "target_logits": draw(rows, draw.C) if teacher else None,
        "target_hidden": draw(rows, draw.N) if draw.N else None,
    }
    if draw.R:
        given["counts"] = draw.range(draw.S * draw.R)
        given["anneal_samples"] = (draw.R * (1 + draw.range(draw.S))).to(FP32)
    return lambda impl: tuple(draw_batch(Stored(**given), impl=impl))


LAST = {"stored": 7, "position": 1}  # a batch that is not full
OP = cases.Op(
    draw_batch,
    call,
    calls={"": {"S": 2, **LAST}, "of inputs": {**LAST, "teacher": False, "N": 0, "R": 0}},
    implied={"C": 10},
    compiled=[
        *cases.grid(FP32, B=128, d=256, teacher=False),
        *cases.grid(FP32, S=10, B=128, d=256, n=200, R=10000),
        *cases.grid(FP32, B=1024, d=3072, C=100, n=20, R=1000),
    ],
    checked={
        "": cases.check(S=2, B=4, D=5, C=4, N=9, R=5, **LAST),
        "first": cases.check(S=2, B=4, D=5, C=4, N=9, R=5, stored=7),
        "past the last": cases.check(S=2, B=4, D=5, C=4, N=9, R=5, stored=7, position=2),
        "only": cases.check(B=4, D=1, N=0, R=0, teacher=False, **LAST),
    },
    tiles={"draw_batch": cases.tile(BLOCK=4, num_warps=1)},
    pins={"": cases.pin("_draw_kernel", 0, S=10, B=128, D=256, N=200, R=10_000)},
)
