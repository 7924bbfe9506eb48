"""Cases of sparse_linear."""

from __future__ import annotations

from functools import partial

import torch

from ssd_kernels import sparse_linear
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import SparseLinear


def call(draw: cases.Draw) -> cases.Run:
    values, indices = draw.code()
    draw.leaves.append(values.requires_grad_())
    weight, bias = draw.leaf(draw.R, draw.C), draw.leaf(draw.C)
    return lambda impl: (sparse_linear(values, indices, weight, bias, impl=impl),)


def frozen(draw: cases.Draw) -> cases.Run:
    """Of a weight that is not learned."""
    values, indices = draw.code()
    draw.leaves.append(values.requires_grad_())
    weight = draw(draw.R, draw.C)
    return lambda impl: (sparse_linear(values, indices, weight, impl=impl),)


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


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    C: int,
    bias: bool = False,
    backward: bool = False,
    aligned: bool = True,
    frozen: bool = False,
) -> None:
    values, indices = meta.code(B, R, k, dtype, grad=True)
    weight = (
        meta.new(R, C, dtype=dtype, grad=True)
        if aligned
        else meta.new(R, C + 1, dtype=dtype, grad=True)[:, 1:]
    )
    weight = weight.detach() if frozen else weight
    out = sparse_linear(
        values, indices, weight, meta.new(C, dtype=dtype, grad=True) if bias else None
    )
    if backward:
        out.backward(torch.empty_like(out))


def check(
    batch: int,
    slots: int,
    neurons: int,
    outputs: int,
    bias: bool = False,
    needs: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
) -> None:
    values, indices = small.code(batch, slots, neurons, dtype)
    weight, shift = (
        small.integers(neurons, outputs, dtype=dtype),
        small.integers(outputs, dtype=dtype),
    )
    leaves = [t.requires_grad_() for t, need in zip((values, weight), needs, strict=True) if need]
    results = []
    for impl in ("triton", "reference"):
        out = sparse_linear(values, indices, weight, shift if bias else None, impl=impl)
        results.append((out, small.gradients((out * small.ramp(out)).sum(), leaves)))
    small.equal(*results)


def decoder(
    needs: str = "vwb", C: int = 256, dtype: torch.dtype = torch.float32, **shape: int
) -> meta.Prepare:
    """The backward of sparse_linear, for v(alues), w(eight) and b(ias)."""

    def prepare() -> meta.Run:
        values, indices = meta.code(**shape, dtype=dtype, grad="v" in needs)
        weight = meta.new(shape["R"], C, dtype=dtype, grad="w" in needs)
        bias = meta.new(C, dtype=dtype, grad=True) if "b" in needs else None
        out = sparse_linear(values, indices, weight, bias)
        return meta.backward(
            [out], [t for t in (values, weight, bias) if t is not None and t.requires_grad]
        )

    return prepare


OP = cases.Op(
    sparse_linear,
    calls={"": cases.Call(call), "of a frozen weight": cases.Call(frozen)},
    good=good,
    bad=BAD,
    drawn=SparseLinear(sparse_linear),
    launch=launch,
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
        "": partial(check, 4, 6, 20, 18, bias=True),
        "one": partial(check, 3, 1, 5, 3, needs=(False, True), dtype=FP16),
        "values": partial(check, 3, 5, 9, 10, needs=(True, False)),
        "few slots": partial(check, 2, 3, 9, 6, needs=(True, False)),
    },
    tiles={"sparse_linear": cases.tile(SLOTS=4, BLOCK=16, num_warps=1)},
    pins={
        "": cases.Pin(
            meta.of(sparse_linear, *meta.code(**meta.SMALL), meta.new(10_000, 256), meta.new(256)),
            "_gather_kernel",
            0,
        ),
        "backward": cases.Pin(decoder(**meta.SMALL), f"{meta.RANKED} segment_kernel sum", 1),
        "backward to values": cases.Pin(
            decoder("v", **meta.SMALL), f"{meta.RANKED} segment_kernel", 1
        ),
        "backward to weight": cases.Pin(
            decoder("w", **meta.SMALL), f"{meta.RANKED} segment_kernel", 1
        ),
        "backward to bias": cases.Pin(decoder("b", **meta.SMALL), "sum", 0),
        "backward large": cases.Pin(decoder(**meta.LARGE), f"{meta.SORTED} segment_kernel sum", 4),
        # A row of two tiles: their products are added up.
        "backward wide": cases.Pin(
            decoder(C=4096, dtype=BF16, **meta.LARGE),
            f"{meta.SORTED} segment_kernel sum _to_copy sum",
            7,
        ),
    },
)
