"""Cases of tally."""

from __future__ import annotations

from functools import partial

import torch

from ssd.ops.batch import tally
from ssd.ops.reference import Tally
from tests.kernels import cases
from tests.kernels.cases import FP32, FP64
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta


def call(draw: cases.Draw, wider: bool = True) -> cases.Run:
    rows = draw.S * draw.MANY
    logits, weight, labels = draw(rows, draw.C), draw(rows), draw.labels(rows)

    def run(impl: str | None) -> cases.Results:
        losses = torch.zeros(draw.S, dtype=FP64, device=draw.device)
        sums = losses, draw.counts(draw.S), draw.counts(draw.S), draw.counts(1)[0]
        crowded = torch.zeros(draw.S, dtype=torch.bool, device=draw.device)
        more = (weight > 1, crowded) if wider else ()
        tally(Tally(weight, logits, labels, weight, *sums, *more), impl=impl)
        return losses.float(), *sums[1:], crowded

    return run


def launch(dtype: torch.dtype, *, B: int, C: int, S: int = 1, wider: bool = False) -> None:
    rows = S * B
    batch = Tally(
        meta.new(rows, dtype=dtype),
        meta.new(rows, C, dtype=dtype),
        meta.longs(rows),
        meta.new(rows, dtype=dtype),
        meta.new(S, dtype=FP64),
        meta.longs(S),
        meta.longs(S),
        meta.longs(),
        meta.new(rows, dtype=torch.bool) if wider else None,
        meta.new(S, dtype=torch.bool) if wider else None,
    )
    tally(batch)


def check(learners: int, size: int, classes: int, wider: bool) -> None:
    rows = learners * size
    weight = (torch.arange(rows) % 3 != 1).float()
    given = [
        small.integers(rows),
        small.integers(rows, classes),
        torch.randint(classes, (rows,)),
        weight,
    ]
    results = []
    for impl in ("triton", "reference"):
        sums = [
            small.counter(learners).double(),
            small.counter(learners),
            small.counter(learners),
            torch.tensor(4),
        ]
        crowded = [torch.arange(rows) == 2, small.counter(learners) > 1] if wider else []
        tally(Tally(*given, *sums, *crowded), impl=impl)
        results.append(sums + crowded)
    small.equal(*results)


def pinned(S: int = 10, B: int = 128) -> meta.Prepare:
    rows = S * B
    sums = meta.new(S, dtype=torch.float64), meta.longs(S), meta.longs(S), meta.longs()
    crowded = meta.new(rows, dtype=torch.bool), meta.new(S, dtype=torch.bool)
    given = meta.new(rows), meta.new(rows, 10), meta.longs(rows), meta.new(rows)
    return meta.of(tally, Tally(*given, *sums, *crowded))


OP = cases.Op(
    tally,
    calls={
        "": cases.Call(call, half=False),
        "of all": cases.Call(partial(call, wider=False), half=False),
    },
    launch=launch,
    compiled=[*cases.grid(FP32, B=128, C=10), *cases.grid(FP32, S=10, B=1024, C=100, wider=True)],
    checked={"": partial(check, 3, 6, 9, True), "one": partial(check, 1, 1, 1, False)},
    tiles={"tally": cases.tile(SAMPLES=4, BLOCK=4, num_warps=1)},
    pins={"": cases.Pin(pinned(), "_tally_kernel", 0)},
)
