"""Cases of sparse_linear."""

from __future__ import annotations

from typing import Any

import torch

from ssd_kernels import sparse_linear
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import SparseLinear


def call(
    draw: cases.Draw, bias: bool = False, aligned: bool = True, frozen: bool = False
) -> cases.Run:
    """frozen: of a weight that is not learned."""
    values, indices = draw.code()
    weight = draw(draw.R, draw.C) if aligned else draw(draw.R, draw.C + 1)[:, 1:]
    weight = weight if frozen else draw.leaf("weight", weight)
    shift = draw.leaf("bias", draw(draw.C)) if bias else None
    values = draw.leaf("values", values)
    return lambda impl: (sparse_linear(values, indices, weight, shift, impl=impl),)


def good() -> cases.Arguments:
    weight, bias = torch.randn(refused.NEURONS, refused.OUTPUTS), torch.randn(refused.OUTPUTS)
    return refused.code() | {"weight": weight, "bias": bias}


BAD: list[cases.Bad] = [
    *refused.CODE,
    ({"values": torch.ones(4, 2).long()}, TypeError, "values has dtype torch.int64"),
    ({"weight": torch.ones(9, 3).half()}, TypeError, "weight has dtype torch.float16"),
    ({"weight": torch.ones(9)}, ValueError, r"weight has shape \[9\], expected \[R, C\]"),
    ({"weight": torch.ones(9, 3, device=refused.META)}, ValueError, "weight is on meta"),
    ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\], expected \[3\]"),
    ({"bias": torch.ones(3).half()}, TypeError, "bias has dtype torch.float16"),
]


def backward(launches: str, allocations: int, *learned: str, **given: Any) -> cases.Pin:
    given = {**cases.SMALL, "C": 256, "bias": True, "learned": learned or None, **given}
    return cases.pin(launches, allocations, backward=[0], forward=False, **given)


WALK = f"{cases.RANKED} segment_kernel"
OP = cases.Op(
    sparse_linear,
    call,
    calls={"": {"bias": True}, "of a frozen weight": {"frozen": True}},
    half=True,
    good=good,
    bad=BAD,
    drawn=SparseLinear(sparse_linear),
    compiled=[
        *(
            call
            for C in (10, 64, 256, 1000)
            for call in cases.grid(FP32, BF16, B=128, R=10000, k=32, C=C, bias=True, backward=True)
        ),
        *cases.grid(FP16, B=8192, R=65536, k=64, C=1024, backward=True),
        *cases.grid(FP32, B=128, R=10000, k=10, C=64, aligned=False, backward=True),
        *cases.grid(FP32, B=128, R=10000, k=10, C=10, frozen=True, backward=True),
    ],
    checked={
        "": cases.check(B=4, K=6, R=20, C=18, bias=True),
        "one": cases.check(FP16, B=3, K=1, R=5, C=3, learned=["weight"]),
        "values": cases.check(B=3, K=5, R=9, C=10, learned=["values"]),
        "few slots": cases.check(B=2, K=3, R=9, C=6, learned=["values"]),
    },
    tiles={"sparse_linear": cases.tile(SLOTS=4, BLOCK=16, num_warps=1)},
    pins={
        "": cases.pin("_gather_kernel", 0, **cases.SMALL, C=256, bias=True, grad=False),
        "backward": backward(f"{WALK} sum", 1),
        "backward to values": backward(WALK, 1, "values"),
        "backward to weight": backward(WALK, 1, "weight"),
        "backward to bias": backward("sum", 0, "bias"),
        "backward large": backward(f"{cases.SORTED} segment_kernel sum", 4, **cases.LARGE),
        # A row of two tiles: their products are added up.
        "backward wide": backward(
            f"{cases.SORTED} segment_kernel sum _to_copy sum",
            7,
            dtype=BF16,
            **cases.LARGE | {"C": 4096},
        ),
    },
)
