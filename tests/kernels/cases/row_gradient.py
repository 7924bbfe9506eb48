"""Cases of row_gradient."""

from __future__ import annotations

from ssd_kernels import _segments, reference
from ssd_kernels._row_gradient import row_gradient
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.property_codes import RowGradient


def call(draw: cases.Draw, sums: bool = False) -> cases.Run:
    """sums: also those of the coefficients, as a compiled linear_topk asks for them."""
    values, indices = draw.code()
    given = values, draw(draw.B, draw.D), indices, draw.R

    def run(impl: str | None) -> cases.Results:
        if not sums:
            return (row_gradient(*given, impl=impl),)
        if impl != "reference":
            return _segments.row_gradients(*given, True, None, ())
        totals = values.new_zeros(draw.R).index_add_(0, indices.flatten(), values.flatten())
        return reference.row_gradient(*given), totals

    return run


OP = cases.Op(
    row_gradient,
    call,
    calls={"": {}},
    half=True,
    drawn=RowGradient(row_gradient),
    compiled=cases.grid(FP32, B=128, R=10000, k=10, d=256, sums=True),
    checked={
        "": cases.check(B=6, K=4, R=7, D=11),
        "one": cases.check(B=1, K=1, R=1, D=1),
        "sorted": cases.check(B=4, K=3, R=9, D=5),
        "bias": cases.check(B=5, K=3, R=7, D=9, sums=True),
    },
    tiles={
        "rank_slots": cases.tile(BLOCK=8, RIVALS=16, num_warps=1),
        "offsets": cases.tile(BLOCK=4, num_warps=1),
        "segments": cases.tile(SLOTS=2, BLOCK=8, num_warps=1),
    },
    pins={"": cases.pin(f"{cases.RANKED} segment_kernel", 1, **cases.SMALL)},
)
