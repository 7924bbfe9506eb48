"""Cases of count_active."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd_kernels import count_active
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import CountActive


def call(draw: cases.Draw) -> cases.Run:
    values, indices = draw.code()
    step = draw.integers(7)[0]

    def run(impl: str | None) -> cases.Results:
        counts, last = draw.counts(), draw.counts() - 1
        count_active(values, indices, counts, last, 3, impl=impl)
        count_active(values[:1], indices[:1], counts, last, step, impl=impl)
        count_active(values, indices, counts, impl=impl)
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


def launch(
    dtype: torch.dtype, *, B: int, R: int, k: int, stamp: bool = False, tensor_step: bool = False
) -> None:
    step = meta.longs() if tensor_step else 7
    values, indices = meta.code(B, R, k, dtype, grad=True)
    count_active(values, indices, meta.longs(R), meta.longs(R) if stamp else None, step)


def check(
    batch: int, slots: int, neurons: int, stamp: bool = False, on_device: bool = False
) -> None:
    values, indices = small.code(batch, slots, neurons)
    step = torch.tensor(17) if on_device else 17
    results = []
    for impl in ("triton", "reference"):
        counts, last = small.counter(neurons), small.counter(neurons) if stamp else None
        count_active(values, indices, counts, last, step, impl=impl)
        results.append((counts, last))
    small.equal(*results)


def pinned(**options: Any) -> meta.Prepare:
    return meta.of(count_active, *meta.code(**meta.SMALL), meta.longs(10_000), **options)


OP = cases.Op(
    count_active,
    calls={"": cases.Call(call)},
    good=good,
    bad=BAD,
    drawn=CountActive(count_active),
    launch=launch,
    compiled=[
        *cases.grid(BF16, B=128, R=10000, k=10, stamp=True),
        *cases.grid(FP32, B=128, R=10000, k=10, stamp=True, tensor_step=True),
    ],
    checked={
        "": partial(check, 5, 4, 9),
        "stamp": partial(check, 5, 4, 9, stamp=True),
        "stamp on device": partial(check, 1, 1, 1, stamp=True, on_device=True),
    },
    tiles={"count_active": cases.tile(BLOCK=8, num_warps=1)},
    pins={
        "": cases.Pin(pinned(), "_count_kernel", 0),
        "stamp": cases.Pin(pinned(last_active=meta.longs(10_000), step=3), "_count_kernel", 0),
    },
)
