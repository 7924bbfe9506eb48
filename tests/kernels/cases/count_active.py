"""Cases of count_active."""

from __future__ import annotations

from typing import Any

import torch

from ssd_kernels import count_active
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import CountActive


def call(draw: cases.Draw, stamp: bool = False, tensor_step: bool = False) -> cases.Run:
    values, indices = draw.code()
    step: Any = draw.range(8)[7] if tensor_step else 7
    start = draw.counts(draw.R)

    def run(impl: str | None) -> cases.Results:
        counts, last = draw.copy(start), draw.copy(start) if stamp else None
        count_active(values, indices, counts, last, step, impl=impl)
        return counts, last

    return run


def good() -> cases.Arguments:
    counts = torch.zeros(refused.NEURONS, dtype=torch.int64)
    return refused.code() | {"counts": counts, "last_active": counts.clone(), "step": 3}


BAD: list[cases.Bad] = [
    *refused.CODE,
    ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
    ({"counts": torch.zeros(9, device=refused.META).long()}, ValueError, "counts is on meta"),
    ({"counts": torch.zeros(()).long()}, ValueError, r"counts has shape \[\]"),
    ({"step": 2.5}, TypeError, r"step=2\.5 must be an integer"),
    ({"step": True}, TypeError, "step=True must be an integer"),
    ({"step": torch.tensor(2.5)}, TypeError, "step has dtype torch.float32"),
    ({"step": torch.ones(1).long()}, TypeError, r"step has dtype torch.int64 and shape \[1\]"),
    ({"last_active": torch.zeros(9)}, TypeError, "last_active has dtype torch.float32"),
    ({"last_active": torch.zeros(8).long()}, ValueError, r"last_active has shape \[8\]"),
]


OP = cases.Op(
    count_active,
    call,
    calls={
        "": {"stamp": True},
        "on device": {"stamp": True, "tensor_step": True},
        "alone": {},
    },
    half=True,
    good=good,
    bad=BAD,
    drawn=CountActive(count_active),
    compiled=[
        *cases.grid(BF16, B=128, R=10000, k=10, stamp=True),
        *cases.grid(FP32, B=128, R=10000, k=10, stamp=True, tensor_step=True),
    ],
    checked={
        "": cases.check(B=5, K=4, R=9),
        "stamp": cases.check(B=5, K=4, R=9, stamp=True),
        "stamp on device": cases.check(B=1, K=1, R=1, stamp=True, tensor_step=True),
    },
    tiles={"count_active": cases.tile(BLOCK=8, num_warps=1)},
    pins={
        "": cases.pin("_count_kernel", 0, **cases.SMALL),
        "stamp": cases.pin("_count_kernel", 0, **cases.SMALL, stamp=True),
    },
)
