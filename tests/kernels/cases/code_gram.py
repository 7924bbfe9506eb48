"""Cases of code_gram."""

from __future__ import annotations

import torch

from ssd.ops.code_gram import code_gram
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32, FP64
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import CodeGram


def call(draw: cases.Draw, labels: bool = True, into: torch.dtype = FP32) -> cases.Run:
    """targets: labels, or dense; none where C is 0."""
    values, indices = draw.code()
    into = FP64 if draw.wide else into
    starts = [torch.ones(draw.R, n, dtype=into, device=draw.device) for n in (draw.R, draw.C)]
    targets = []
    if draw.C:
        targets = [draw.labels() if labels else draw(draw.B, draw.C).contiguous()]

    def run(impl: str | None) -> cases.Results:
        sums = [draw.copy(start) for start in starts[: 1 + len(targets)]]
        code_gram(values, indices, *sums, *targets, impl=impl)
        return tuple(sums)

    return run


def good() -> cases.Arguments:
    return refused.code() | {
        "gram": torch.rand(refused.NEURONS, refused.NEURONS),
        "cross": torch.rand(refused.NEURONS, refused.OUTPUTS),
        "targets": torch.randint(refused.OUTPUTS, (refused.BATCH,)),
    }


BAD: list[cases.Bad] = [
    *refused.CODE,
    ({"values": torch.ones(4, 2).long()}, TypeError, "values has dtype torch.int64"),
    (
        {"values": torch.ones(2), "indices": torch.ones(2).long()},
        ValueError,
        r"indices have shape \[2\], expected \[B, K\]",
    ),
    ({"indices": torch.full((4, 2), 9)}, ValueError, r"from 9 to 9, expected 0\.\.8"),
    ({"indices": torch.full((4, 2), -1)}, ValueError, r"from -1 to -1, expected 0\.\.8"),
    ({"gram": torch.ones(9, 8)}, ValueError, r"gram has shape \[9, 8\], expected \[R, R\]"),
    ({"gram": torch.ones(9, 9).half()}, TypeError, "gram has dtype torch.float16"),
    ({"gram": torch.ones(9, 18)[:, ::2]}, ValueError, "gram with strides"),
    ({"gram": torch.ones(9, 9, device=refused.META)}, ValueError, "gram is on meta"),
    ({"cross": None}, ValueError, "cross and targets must be given together"),
    ({"targets": None}, ValueError, "cross and targets must be given together"),
    ({"cross": torch.ones(8, 3)}, ValueError, r"cross has shape \[8, 3\], expected \[9, C\]"),
    ({"cross": torch.ones(9, 3).double()}, TypeError, "cross has dtype torch.float64"),
    ({"cross": torch.ones(9, 3, device=refused.META)}, ValueError, "cross is on meta"),
    ({"cross": torch.ones(3, 9).T}, ValueError, "cross with strides"),
    ({"targets": torch.ones(4).int()}, TypeError, "labels have dtype torch.int32"),
    ({"targets": torch.ones(5).long()}, ValueError, r"targets has shape \[5\]"),
    ({"targets": torch.full((4,), 3)}, ValueError, r"labels run from 3 to 3, expected 0\.\.2"),
    ({"targets": torch.ones(4)}, ValueError, r"targets has shape \[4\], expected \[4, 3\]"),
    ({"targets": torch.ones(4, 2)}, ValueError, r"targets has shape \[4, 2\]"),
    ({"targets": torch.ones(4, 3).long()}, TypeError, "targets has dtype torch.int64"),
    ({"targets": torch.ones(4, 3, device=refused.META)}, ValueError, "targets is on meta"),
]


OP = cases.Op(
    code_gram,
    call,
    calls={"": {}, "of targets": {"labels": False}, "alone": {"C": 0}},
    good=good,
    bad=BAD,
    drawn=CodeGram(code_gram),
    compiled=[
        *cases.grid(FP32, B=1024, R=10000, k=32),
        *cases.grid(BF16, B=1024, R=10000, k=32, C=10, into=FP64),
        *cases.grid(FP32, B=1024, R=10000, k=300, C=10, labels=False, into=FP64),
    ],
    checked={
        "": cases.check(B=4, K=6, R=9, C=0),
        "labels": cases.check(B=4, K=6, R=9, C=3, into=FP64),
        "dense": cases.check(B=4, K=3, R=5, C=5, labels=False),
        "one": cases.check(B=3, K=1, R=2, C=3),
    },
    tiles={"code_gram": cases.tile(BLOCK=4, num_warps=1)},
    pins={"": cases.pin(f"{cases.RANKED} _gram_kernel", 1, **cases.SMALL)},
)
