"""Cases of tally."""

from __future__ import annotations

from ssd.ops.batch import tally
from ssd.ops.reference import Tally
from tests.kernels import cases
from tests.kernels.cases import FP32


def call(draw: cases.Draw, wider: bool = False) -> cases.Run:
    rows = draw.S * draw.B
    loss, logits, weight, labels = draw(rows), draw(rows, draw.C), draw(rows), draw.labels(rows)
    counts = draw.counts(draw.S)
    starts = [counts.double(), counts, counts, draw.counts(1)[0]]
    starts += [weight > 1, counts > 1] if wider else []

    def run(impl: str | None) -> cases.Results:
        sums = [draw.copy(start) for start in starts]
        tally(Tally(loss, logits, labels, weight, *sums), impl=impl)
        return tuple(sums)

    return run


OP = cases.Op(
    tally,
    call,
    calls={"": {"S": 2, "B": cases.MANY, "wider": True}, "of all": {"S": 2, "B": cases.MANY}},
    compiled=[*cases.grid(FP32, B=128, C=10), *cases.grid(FP32, S=10, B=1024, C=100, wider=True)],
    checked={
        "": cases.check(S=3, B=6, C=9, wider=True),
        "one": cases.check(S=1, B=1, C=1),
    },
    tiles={"tally": cases.tile(SAMPLES=4, BLOCK=4, num_warps=1)},
    pins={"": cases.pin("_tally_kernel", 0, S=10, B=128, C=10, wider=True)},
)
