"""Cases of linear_topk."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd_kernels import linear_topk, sparse_linear
from tests.kernels import cases
from tests.kernels.cases import BF16, FP16, FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_layers import LinearTopK

# fp32 inputs take descriptors and the walk over tiles, 16-bit ones of odd strides neither.
TILE = {"TOGETHER": 2, "BM": 4, "BN": 64, "BK": 8, "num_warps": 1, "num_stages": 1}
PLAIN, DESCRIBED = ({**TILE, "DESCRIPTORS": on, "PERSISTENT": on} for on in (0, 1))


def call(draw: cases.Draw, networks: int = 1) -> cases.Run:
    x, weight, bias = draw.layer(networks)
    counts = draw.counts(networks * draw.R)

    def run(impl: str | None) -> cases.Results:
        now = counts.clone()
        out = linear_topk(
            x,
            weight,
            draw.K,
            bias,
            inhibition="subtract",
            threshold=True,
            counts=now,
            networks=networks,
            impl=impl,
        )
        return out.values, out.indices, out.threshold, now

    return run


def of_all(draw: cases.Draw) -> cases.Run:
    """Every neuron stays active, and none is counted."""
    x, weight, bias = draw.layer()

    def run(impl: str | None) -> cases.Results:
        out = linear_topk(x, weight, draw.R, bias, impl=impl)
        return out.values, out.indices

    return run


def preactivations(draw: cases.Draw) -> cases.Run:
    x, weight, bias = draw.layer()

    def run(impl: str | None) -> cases.Results:
        out = linear_topk(x, weight, draw.K, bias, preactivations=True, impl=impl)
        return out.values, out.indices, out.preactivations

    return run


def forward(draw: cases.Draw, batch: int, d: int, networks: int = 1) -> cases.Run:
    x, weight = draw(networks * batch, d), draw(networks * draw.R, d)
    bias = draw(networks * draw.R)

    def run(impl: str | None) -> cases.Results:
        out = linear_topk(x, weight, draw.K, bias, networks=networks, impl=impl)
        return out.values, out.indices

    return run


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    S: int = 1,
    bias: bool = True,
    counts: bool = False,
    backward: bool = False,
    **options: Any,
) -> None:
    output = linear_topk(
        meta.new(S * B, d, dtype=dtype, grad=True),
        meta.new(S * R, d, dtype=dtype, grad=True),
        k,
        meta.new(S * R, dtype=dtype, grad=True) if bias else None,
        counts=meta.longs(S * R) if counts else None,
        networks=S,
        **options,
    )
    if backward:
        loss = output.values.sum()
        (loss if output.threshold is None else loss + output.threshold.sum()).backward()


def check(
    batch: int,
    neurons: int,
    features: int,
    k: int,
    bias: bool = True,
    inhibition: str = "mask",
    count: bool = True,
    networks: int = 1,
    grad: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    given = small.layer(batch * networks, neurons * networks, features, bias, dtype)
    leaves = [t.requires_grad_(grad) for t in given if t is not None]
    results = []
    for name in ("triton", "reference"):
        counts = small.counter(neurons * networks) if count else None
        out = linear_topk(
            given[0],
            given[1],
            k,
            given[2],
            inhibition=inhibition,
            threshold=True,
            counts=counts,
            networks=networks,
            impl=name,
        )
        assert out.threshold is not None
        loss = (out.values * small.ramp(out.values)).sum() + (
            out.threshold * small.ramp(out.threshold)
        ).sum()
        results.append((out[:3], counts, small.gradients(loss, leaves) if grad else ()))
    small.equal(*results)


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


def encoder(needs: str = "xwb", parts: str = "values", **shape: int) -> meta.Prepare:
    """The backward of linear_topk, for x, w(eight) and b(ias)."""

    def prepare() -> meta.Run:
        B, R = shape["B"], shape["R"]
        leaves = [
            meta.new(*size, grad=name in needs)
            for name, size in (("x", (B, 256)), ("w", (R, 256)), ("b", (R,)))
        ]
        out = linear_topk(*leaves[:2], shape["k"], leaves[2], threshold=True)
        outputs = [getattr(out, part) for part in parts.split()]
        return meta.backward(outputs, [leaf for leaf in leaves if leaf.requires_grad])

    return prepare


def encode(
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    backward: bool = False,
    threshold: bool = False,
    **shape: int,
) -> meta.Prepare:
    """linear_topk, and its backward to x, weight and bias."""

    def prepare() -> meta.Run:
        B, R = shape["B"], shape["R"]
        leaves = [meta.new(*size, dtype=dtype, grad=grad) for size in ((B, 256), (R, 256), (R,))]
        slopes, counts = meta.new(B, shape["k"], dtype=dtype), meta.longs(R)

        def run() -> Any:
            x, weight, bias = leaves
            out = linear_topk(x, weight, shape["k"], bias, threshold=threshold, counts=counts)
            return out, torch.autograd.grad(out.values, leaves, slopes) if backward else None

        return run

    return prepare


def both(**shape: int) -> meta.Prepare:
    """The backward of a decoder and its encoder."""

    def prepare() -> meta.Run:
        leaves = [meta.new(shape["R"], 256, grad=True) for _ in range(2)]
        hidden = linear_topk(meta.new(shape["B"], 256), leaves[0], shape["k"])
        return meta.backward([sparse_linear(hidden.values, hidden.indices, leaves[1])], leaves)

    return prepare


ENCODE = "_keys_kernel _code_kernel"
PINS = {
    "": cases.Pin(encode(threshold=True, **meta.SMALL), f"_halve_kernel {ENCODE}", 2),
    "in 16 bits": cases.Pin(encode(BF16, threshold=True, **meta.SMALL), ENCODE, 2),
    "with gradients": cases.Pin(
        encode(grad=True, threshold=True, **meta.SMALL), f"_halve_kernel {ENCODE}", 2
    ),
    "both ways": cases.Pin(
        encode(grad=True, backward=True, threshold=True, **meta.SMALL),
        f"_halve_kernel {ENCODE} _gather_kernel {meta.RANKED} segment_kernel",
        3,
    ),
    # Two blocks of rows.
    "both ways, large": cases.Pin(
        encode(grad=True, backward=True, threshold=True, **meta.LARGE),
        f"_halve_kernel {ENCODE} {ENCODE} _gather_kernel {meta.SORTED} segment_kernel",
        6,
    ),
    "backward": cases.Pin(encoder(**meta.SMALL), f"_gather_kernel {meta.RANKED} segment_kernel", 1),
    "backward to x": cases.Pin(encoder("x", **meta.SMALL), "_gather_kernel", 0),
    "backward to weight": cases.Pin(encoder("w", **meta.SMALL), f"{meta.RANKED} segment_kernel", 1),
    "backward to bias": cases.Pin(encoder("b", **meta.SMALL), f"{meta.RANKED} segment_kernel", 1),
    "backward large": cases.Pin(
        encoder(**meta.LARGE), f"_gather_kernel {meta.SORTED} segment_kernel", 4
    ),
    "backward of threshold": cases.Pin(
        encoder(parts="threshold", **meta.SMALL), f"_gather_kernel {meta.RANKED} segment_kernel", 1
    ),
    "backward of values and threshold": cases.Pin(
        encoder(parts="values threshold", **meta.SMALL),
        f"cat cat cat _gather_kernel {meta.RANKED} segment_kernel",
        4,
    ),
    "with its decoder, backward": cases.Pin(
        both(**meta.SMALL), f"{meta.RANKED} segment_kernel segment_kernel", 2
    ),
    "with its decoder, backward large": cases.Pin(
        both(**meta.LARGE), f"{meta.SORTED} segment_kernel segment_kernel", 5
    ),
}


OP = cases.Op(
    linear_topk,
    calls={
        "": cases.Call(call),
        "of networks": cases.Call(partial(call, networks=2)),
        "of all neurons": cases.Call(of_all),
        "and preactivations": cases.Call(preactivations),
        "large": cases.Call(partial(forward, batch=cases.Draw.MANY, d=24), traced=False),
        "large, unaligned": cases.Call(
            partial(forward, batch=cases.Draw.MANY, d=cases.Draw.UNALIGNED), traced=False
        ),
        "of networks, large": cases.Call(
            partial(forward, batch=cases.Draw.MANY, d=24, networks=2), traced=False
        ),
    },
    good=refused.layer,
    bad=refused.LAYER,
    drawn=LinearTopK(linear_topk),
    launch=launch,
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
            f"{name} {word}": partial(check, *shape, **options, dtype=dtype)
            for dtype, word in ((FP32, "single"), (FP16, "half"))
            for name, shape, options in (
                ("one", (5, 70, 9, 1), {"bias": False}),
                ("ties", (3, 130, 9, 3), {"inhibition": "subtract"}),
                ("networks", (5, 65, 9, 2), {"networks": 2, "bias": False, "count": False}),
                ("all", (1, 33, 37, 33), {"count": False}),
                ("many groups", (2, 700, 1, 1), {"bias": False, "grad": False}),
            )
        },
        "": partial(check, 2, 40, 3, 3),
        "rescored": partial(rescored, 2, True),
        "rescored without bias": partial(rescored, 1, False),
    },
    tiles={"linear_topk": (({"aligned": 0}, PLAIN), ({}, DESCRIBED))},
    pins=PINS,
)
