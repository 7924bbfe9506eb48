"""Cases of row_gradient."""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch

from ssd_kernels import _segments
from ssd_kernels._row_gradient import row_gradient
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.property_codes import RowGradient


def call(draw: cases.Draw) -> cases.Run:
    values, indices = draw.code()
    inputs = draw(draw.B, draw.D)
    return lambda impl: (row_gradient(values, inputs, indices, draw.R, impl=impl),)


def launch(dtype: torch.dtype, *, B: int, R: int, k: int, d: int, sums: bool = False) -> None:
    values, indices = meta.code(B, R, k, dtype, grad=True)
    inputs = meta.new(B, d, dtype=dtype)
    if sums:  # what a compiled graph calls
        _segments.row_gradients(values.detach(), inputs, indices, R, True, None, ())
    else:
        row_gradient(values, inputs, indices, R)


def check(batch: int, slots: int, neurons: int, features: int, ranked: bool = True) -> None:
    values, indices = small.code(batch, slots, neurons)
    inputs = small.integers(batch, features)
    limit = _segments.MAX_RANKED if ranked else 0
    with mock.patch.object(_segments, "MAX_RANKED", limit):
        got = row_gradient(values, inputs, indices, neurons, impl="triton")
    small.equal(got, row_gradient(values, inputs, indices, neurons, impl="reference"))


def row_bias(neurons: int) -> None:
    """The sums of the coefficients, which no op but a compiled linear_topk asks for."""
    values, indices = small.code(5, 3, neurons)
    got, sums = _segments.row_gradients(
        values, small.integers(5, 9), indices, neurons, True, None, ()
    )
    assert got.shape == (neurons, 9)
    small.equal(sums, torch.zeros(neurons).index_add_(0, indices.flatten(), values.flatten()))


def pinned(B: int = 128, R: int = 10_000, k: int = 10) -> meta.Prepare:
    coefficients, indices = meta.code(B, R, k)
    return meta.of(row_gradient, coefficients, meta.new(B, 256), indices, R)


OP = cases.Op(
    row_gradient,
    calls={"": cases.Call(call)},
    drawn=RowGradient(row_gradient),
    launch=launch,
    compiled=[*cases.grid(FP32, B=128, R=10000, k=10, d=256, sums=True)],
    checked={
        "": partial(check, 6, 4, 7, 11),
        "one": partial(check, 1, 1, 1, 1),
        "sorted": partial(check, 4, 3, 9, 5, ranked=False),
        "bias": partial(row_bias, 7),
    },
    tiles={
        "rank_slots": cases.tile(BLOCK=8, RIVALS=16, num_warps=1),
        "offsets": cases.tile(BLOCK=4, num_warps=1),
        "segments": cases.tile(SLOTS=2, BLOCK=8, num_warps=1),
    },
    pins={"": cases.Pin(pinned(), f"{meta.RANKED} segment_kernel", 1)},
)
