"""Cases of linear_topk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ssd_kernels import linear_topk, sparse_linear
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearTopK

# fp32 inputs take descriptors and the walk over tiles, 16-bit ones of odd strides neither.
TILE = {"TOGETHER": 2, "BM": 4, "BN": 64, "BK": 8, "num_warps": 1, "num_stages": 1}
PLAIN, DESCRIBED = ({**TILE, "DESCRIPTORS": on, "PERSISTENT": on} for on in (0, 1))


CHECKED: dict[str, cases.Arguments] = {
    "one": {"B": 5, "R": 70, "D": 9, "K": 1, "bias": False},
    "ties": {"B": 3, "R": 130, "D": 9, "K": 3, "inhibition": "subtract"},
    "networks": {"S": 2, "B": 5, "R": 65, "D": 9, "K": 2, "bias": False, "counts": False},
    "all": {"B": 1, "R": 33, "D": 37, "K": 33, "counts": False},
    "many groups": {"B": 2, "R": 700, "D": 1, "K": 1, "bias": False, "grad": False},
}


def call(
    draw: cases.Draw, bias: bool = True, counts: bool = False, every: bool = False, **options: Any
) -> cases.Run:
    """every: every neuron stays active."""
    x, weight, shift = draw.layer(bias)
    k, start = draw.R if every else draw.K, draw.counts(draw.S * draw.R)

    def run(impl: str | None) -> cases.Results:
        now = draw.copy(start) if counts else None
        given = {"counts": now, "networks": draw.S, "impl": impl, **options}
        return *linear_topk(x, weight, k, shift, **given), now

    return run


def rescored(networks: int, bias: bool) -> None:
    """Scores that differ, of which few are looked at; and a row whose scores are too close."""
    x, weight = torch.randn(3 * networks, 7), torch.randn(170 * networks, 7)
    x[1] = 10 + torch.rand(7)
    weight[:170] = x[1] + 1e-5 * torch.rand(170, 7)
    shift = torch.randn(170 * networks) * 1e-3 if bias else None
    got = linear_topk(x, weight, 2, shift, networks=networks, impl="triton")
    expected = linear_topk(
        x.double(),
        weight.double(),
        2,
        None if shift is None else shift.double(),
        networks=networks,
        impl="reference",
    )
    torch.testing.assert_close(got.values.double(), expected.values, rtol=1e-5, atol=1e-5)


def with_decoder(sizes: dict[str, int]) -> cases.Prepare:
    """The backward of a decoder and its encoder."""

    def prepare() -> Callable[[], Any]:
        draw = cases.Draw("meta", **sizes)
        leaves = [draw(draw.R, draw.D).requires_grad_() for _ in range(2)]
        hidden = linear_topk(draw(draw.B, draw.D), leaves[0], draw.K)
        out = sparse_linear(hidden.values, hidden.indices, leaves[1])
        return partial(torch.autograd.grad, out, leaves, torch.empty_like(out))

    return prepare


ALL = {"counts": True, "inhibition": "subtract", "threshold": True}
KEPT = {"counts": True, "threshold": True}
ENCODE = "_keys_kernel _code_kernel"
BACKWARD = f"_gather_kernel {cases.RANKED} segment_kernel"


def backward(launches: str, allocations: int, *outputs: int, **given: Any) -> cases.Pin:
    given = cases.SMALL | {"threshold": True} | given
    return cases.pin(launches, allocations, backward=outputs or (0,), forward=False, **given)


OP = cases.Op(
    linear_topk,
    call,
    calls={
        "": ALL,
        "of networks": {**ALL, "S": 2},
        "of all neurons": {"every": True},
        "and preactivations": {"preactivations": True},
        "large": {"B": cases.MANY},
        "large, unaligned": {"B": cases.MANY, "D": cases.UNALIGNED},
        "of networks, large": {"B": cases.MANY, "S": 2},
    },
    half=True,
    untraced=["large", "large, unaligned", "of networks, large"],
    good=refused.layer,
    bad=refused.LAYER,
    drawn=LinearTopK(linear_topk),
    compiled=[
        *cases.grid(
            FP32, B=128, d=256, R=10000, k=10, bias=False, inhibition="subtract", counts=True
        ),
        *cases.grid(
            FP32, BF16, B=1024, d=256, R=10000, k=10, threshold=True, counts=True, backward=True
        ),
        *cases.grid(FP16, B=64, d=512, R=4096, k=32, backward=True),
        *cases.grid(BF16, B=64, d=512, R=4096, k=32),
        *cases.grid(FP32, B=128, d=1024, R=8192, k=10, counts=True, inhibition="subtract"),
        *cases.grid(FP32, B=8192, d=1024, R=131072, k=127),
        *cases.grid(FP32, B=8192, d=1024, R=262144, k=255),
        *cases.grid(BF16, B=8192, d=1024, R=1048576, k=32),
        *cases.grid(FP32, B=37, d=100, R=517, k=16, bias=False),
        *cases.grid(FP32, BF16, B=8192, d=1021, R=16384, k=32),  # no whole 16 bytes
        *cases.grid(FP32, S=10, B=128, d=512, R=10000, k=10, counts=True, bias=False),
    ],
    checked={
        **{
            f"{name} {word}": cases.check(dtype, **KEPT | given)
            for dtype, word in ((FP32, "single"), (FP16, "half"))
            for name, given in CHECKED.items()
        },
        "": cases.check(B=2, R=40, D=3, K=3, **KEPT),
        "rescored": partial(rescored, 2, True),
        "rescored without bias": partial(rescored, 1, False),
    },
    tiles={"linear_topk": (({"aligned": 0}, PLAIN), ({}, DESCRIBED))},
    pins={
        "": cases.pin(f"_halve_kernel {ENCODE}", 2, **cases.SMALL, **KEPT, grad=False),
        "in 16 bits": cases.pin(ENCODE, 2, dtype=BF16, **cases.SMALL, **KEPT, grad=False),
        "with gradients": cases.pin(f"_halve_kernel {ENCODE}", 2, **cases.SMALL, **KEPT),
        "both ways": cases.pin(
            f"_halve_kernel {ENCODE} {BACKWARD}", 3, backward=[0], **cases.SMALL, **KEPT
        ),
        # Two blocks of rows.
        "both ways, large": cases.pin(
            f"_halve_kernel {ENCODE} {ENCODE} _gather_kernel {cases.SORTED} segment_kernel",
            6,
            backward=[0],
            **cases.LARGE,
            **KEPT,
        ),
        "backward": backward(BACKWARD, 1),
        "backward to x": backward("_gather_kernel", 0, learned=["x"]),
        "backward to weight": backward(f"{cases.RANKED} segment_kernel", 1, learned=["weight"]),
        "backward to bias": backward(f"{cases.RANKED} segment_kernel", 1, learned=["bias"]),
        "backward large": backward(
            f"_gather_kernel {cases.SORTED} segment_kernel", 4, **cases.LARGE
        ),
        "backward of threshold": backward(BACKWARD, 1, 2),
        "backward of values and threshold": backward(f"cat cat cat {BACKWARD}", 4, 0, 2),
        "with its decoder, backward": cases.pin(
            f"{cases.RANKED} segment_kernel segment_kernel", 2, with_decoder(cases.SMALL)
        ),
        "with its decoder, backward large": cases.pin(
            f"{cases.SORTED} segment_kernel segment_kernel", 5, with_decoder(cases.LARGE)
        ),
    },
)
