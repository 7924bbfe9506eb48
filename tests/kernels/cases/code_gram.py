"""Cases of code_gram."""

from __future__ import annotations

from functools import partial

import torch

from ssd.ops.code_gram import code_gram
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32, FP64
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import CodeGram


def call(draw: cases.Draw) -> cases.Run:
    values, indices = draw.code()
    labels, targets = draw.labels(), draw(draw.B, draw.C)

    def run(impl: str | None) -> cases.Results:
        gram, cross = values.new_zeros(draw.R, draw.R), values.new_zeros(2, draw.R, draw.C)
        code_gram(values, indices, gram, cross[0], labels, impl=impl)
        code_gram(values, indices, gram, cross[1], targets, impl=impl)
        code_gram(values, indices, gram, impl=impl)
        return gram, cross

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


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    C: int = 0,
    labels: bool = True,
    into: torch.dtype = FP32,
) -> None:
    targets = meta.longs(B) if labels else meta.new(B, C, dtype=dtype)
    cross = meta.new(R, C, dtype=into) if C else None
    code_gram(
        *meta.code(B, R, k, dtype, grad=True),
        meta.new(R, R, dtype=into),
        cross,
        targets if C else None,
    )


def check(
    batch: int, slots: int, neurons: int, targets: str, dtype: torch.dtype = torch.float32
) -> None:
    values, indices = small.code(batch, slots, neurons)
    wanted = {
        "none": None,
        "labels": torch.randint(3, (batch,)),
        "dense": small.integers(batch, 5).contiguous(),
    }[targets]
    classes = 3 if targets == "labels" else 5
    results = []
    for impl in ("triton", "reference"):
        gram = torch.ones(neurons, neurons, dtype=dtype)
        cross = None if wanted is None else torch.ones(neurons, classes, dtype=dtype)
        code_gram(values, indices, gram, cross, wanted, impl=impl)
        results.append((gram, cross))
    small.equal(*results)


OP = cases.Op(
    code_gram,
    calls={"": cases.Call(call, half=False)},
    good=good,
    bad=BAD,
    drawn=CodeGram(code_gram),
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=1024, R=10000, k=32),
        *cases.grid(BF16, B=1024, R=10000, k=32, C=10, into=FP64),
        *cases.grid(FP32, B=1024, R=10000, k=300, C=10, labels=False, into=FP64),
    ],
    checked={
        "": partial(check, 4, 6, 9, "none"),
        "labels": partial(check, 4, 6, 9, "labels", FP64),
        "dense": partial(check, 4, 3, 5, "dense"),
        "one": partial(check, 3, 1, 2, "labels"),
    },
    tiles={"code_gram": cases.tile(BLOCK=4, num_warps=1)},
    pins={
        "": cases.Pin(
            meta.of(code_gram, *meta.code(**meta.SMALL), meta.new(10_000, 10_000)),
            f"{meta.RANKED} _gram_kernel",
            1,
        )
    },
)
