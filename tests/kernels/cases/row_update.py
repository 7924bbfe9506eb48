"""Cases of row_update."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import row_update
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import RowUpdate


def call(draw: cases.Draw, networks: int = 1, momentum: float = 0.0) -> cases.Run:
    coefficients, indices = draw.code(networks)
    rows, neurons = networks * draw.B, networks * draw.R
    starts, kept = ([draw(neurons, draw.D), draw(neurons, draw.C)] for _ in range(2))
    inputs = [draw(rows, draw.D), draw(rows, draw.C)]
    rates: Any = 0.1
    if networks > 1:
        rates = torch.linspace(0.1, 0.2, networks, device="cpu").to(coefficients)

    def run(impl: str | None) -> cases.Results:
        weights = [weight.clone() for weight in starts]
        buffers = [buffer.clone() for buffer in kept] if momentum else []
        norm = row_update(
            weights,
            [coefficients, 2 * coefficients],
            inputs,
            indices,
            lr=rates,
            max_norm=1.0,
            nonnegative=True,
            normalize=[True, False],
            momentum=momentum,
            buffers=buffers or None,
            networks=networks,
            impl=impl,
        )
        return norm, *weights, *buffers

    return run


def unbounded(draw: cases.Draw) -> cases.Run:
    """Neither clipped nor projected."""
    coefficients, indices = draw.code()
    start, inputs = draw(draw.R, draw.D), draw(draw.B, draw.D)

    def run(impl: str | None) -> cases.Results:
        weight = start.clone()
        return row_update([weight], [coefficients], [inputs], indices, lr=0.1, impl=impl), weight

    return run


def good() -> cases.Arguments:
    code = refused.code()
    return {
        "weights": [
            torch.rand(refused.NEURONS, refused.INPUTS),
            torch.rand(refused.NEURONS, refused.OUTPUTS),
        ],
        "coefficients": [code["values"], code["values"]],
        "inputs": [
            torch.rand(refused.BATCH, refused.INPUTS),
            torch.rand(refused.BATCH, refused.OUTPUTS),
        ],
        "indices": code["indices"],
        "lr": 0.1,
        "momentum": 0.9,
        "buffers": [
            torch.rand(refused.NEURONS, refused.INPUTS),
            torch.rand(refused.NEURONS, refused.OUTPUTS),
        ],
        "normalize": [True, True],
    }


BAD: list[cases.Bad] = [
    ({"weights": []}, ValueError, "weights is empty"),
    ({"weights": [torch.rand(9, 5)]}, ValueError, "2 coefficients for 1 weights"),
    ({"normalize": [True]}, ValueError, "1 normalize for 2 weights"),
    ({"buffers": None}, ValueError, "momentum=0.9 and buffers must be given together"),
    ({"momentum": 0.0}, ValueError, "momentum=0.0 and buffers must be given together"),
    *refused.CODE,
    ({"networks": True}, TypeError, "networks=True must be an integer"),
    ({"lr": torch.ones(1, device=refused.META)}, ValueError, "lr is on meta"),
    ({"lr": float("nan")}, ValueError, "lr=nan must be finite"),
    ({"lr": True}, TypeError, "lr=True must be a number"),
    ({"lr": "1"}, TypeError, "lr='1' must be a number"),
    ({"max_norm": -1.0}, ValueError, r"max_norm=-1\.0 must be finite"),
    ({"max_norm": float("nan")}, ValueError, "max_norm=nan must be finite"),
    ({"momentum": float("nan")}, ValueError, "momentum=nan must be finite"),
    ({"momentum": -0.5}, ValueError, r"momentum=-0\.5 must be finite"),
    ({"indices": torch.zeros(4).long()}, ValueError, r"indices have shape \[4\]"),
    ({"weights": [torch.rand(()), torch.rand(9, 3)]}, ValueError, r"weights\[0\] has shape"),
    (
        {"buffers": [torch.rand(9, 5), torch.rand(9, 3).half()]},
        TypeError,
        "buffers has dtype torch.float16",
    ),
    (
        {"buffers": [torch.rand(9, 5), torch.rand(9, 3, device=refused.META)]},
        ValueError,
        "buffers is on meta",
    ),
    (
        {"weights": [torch.rand(9, 5), torch.rand(8, 3)]},
        ValueError,
        r"weights\[1\] has shape \[8, 3\]",
    ),
    (
        {"weights": [torch.rand(9, 5), torch.rand(9, 3).half()]},
        TypeError,
        "coefficients has dtype torch.float32 but weight has torch.float16",
    ),
    (
        {"inputs": [torch.rand(4, 5), torch.rand(4, 4)]},
        ValueError,
        r"inputs\[1\] has shape \[4, 4\], expected \[4, 3\]",
    ),
    (
        {"inputs": [torch.rand(4, 5, device=refused.META), torch.rand(4, 3)]},
        ValueError,
        "inputs is on meta",
    ),
    (
        {"buffers": [torch.rand(9, 5), torch.rand(9, 4)]},
        ValueError,
        r"buffers\[1\] has shape \[9, 4\]",
    ),
]


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    d: int,
    C: int = 10,
    S: int = 1,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = None,
) -> None:
    values, indices = meta.code(S * B, R, k, dtype, grad=True)
    several = S > 1  # each with its rate and bound
    weights = [meta.new(S * R, width, dtype=dtype) for width in (d, C)]
    row_update(
        weights,
        [values, torch.empty_like(values)],
        [meta.new(S * B, width, dtype=dtype) for width in (d, C)],
        indices,
        lr=meta.new(S, dtype=FP32) if several else 0.1,
        max_norm=meta.new(S, dtype=FP32) if several and max_norm is not None else max_norm,
        nonnegative=project,
        normalize=[project, False],
        momentum=momentum,
        buffers=[torch.empty_like(weight) for weight in weights] if momentum else None,
        networks=S,
    )


class Step:
    """One update's inputs; `run` works on copies and returns the norm and all it wrote."""

    def __init__(
        self, batch: int, slots: int, neurons: int, widths: list[int], device: str = "cpu"
    ) -> None:
        self.weights = [torch.rand(neurons, w, device=device) for w in widths]
        self.buffers = [torch.randn(neurons, w, device=device) for w in widths]
        self.inputs = [torch.randn(batch, w, device=device) for w in widths]
        self.indices = torch.randint(neurons, (batch, slots), device=device)
        # Some slots are idle, each for its own matrices.
        self.coefficients = [torch.randn(batch, slots, device=device).relu() for _ in widths]

    def run(self, impl: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        weights = [w.to(dtype, copy=True) for w in self.weights]
        buffers = [b.to(dtype, copy=True) for b in self.buffers] if "momentum" in options else None
        coefficients = [c.to(dtype) for c in self.coefficients]
        inputs = [i.to(dtype) for i in self.inputs]
        norm = row_update(
            weights,
            coefficients,
            inputs,
            self.indices,
            buffers=buffers,
            impl=impl,
            **{"lr": 0.1, **options},
        )
        return [norm, *weights, *(buffers or [])]

    def round_to(self, dtype: torch.dtype) -> Step:
        for tensors in (self.weights, self.buffers, self.inputs, self.coefficients):
            tensors[:] = [t.to(dtype).to(t.dtype) for t in tensors]
        return self


def check(widths: list[int], neurons: int = 8, networks: int = 1, **options: Any) -> None:
    step = Step(5 if networks == 1 else 2 * networks, 3, neurons, widths)
    if networks > 1:  # samples follow one another as their networks do
        own = neurons // networks
        step.indices = (
            step.indices % own + own * torch.arange(networks).repeat_interleave(2)[:, None]
        )
        bounds = torch.full((networks,), options.pop("max_norm"))
        options |= {"networks": networks, "max_norm": bounds, "lr": torch.rand(networks)}
    got = step.run("triton", torch.float32, **options)
    expected = step.run("reference", torch.float64, **options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def update(*widths: int, S: int = 1, **shape: int) -> meta.Prepare:
    values, indices = meta.code(**shape)
    rates = meta.new(S) if S > 1 else 0.1
    return meta.of(
        row_update,
        [meta.new(shape["R"], width) for width in widths],
        [values] * len(widths),
        [meta.new(shape["B"], width) for width in widths],
        indices,
        lr=rates,
        max_norm=rates,
        normalize=[True] * len(widths),
        networks=S,
    )


SUMS = f"{meta.RANKED} segment_kernel segment_kernel sum _apply_kernel _apply_kernel"
OP = cases.Op(
    row_update,
    calls={
        "": cases.Call(partial(call, momentum=0.9), half=False),
        "plain": cases.Call(call, half=False),
        "of networks": cases.Call(partial(call, networks=2), half=False),
        "unbounded": cases.Call(unbounded, half=False),
    },
    good=good,
    bad=BAD,
    drawn=RowUpdate(row_update),
    launch=launch,
    compiled=[
        *(
            call
            for d in (64, 256, 1024, 4096)
            for call in cases.grid(FP32, BF16, B=128, R=10000, k=10, d=d)
        ),
        *cases.grid(FP32, B=128, R=10000, k=10, d=256, project=False),
        *cases.grid(FP32, BF16, B=128, R=10000, k=10, d=256, momentum=0.9, max_norm=1.0),
        *cases.grid(FP32, B=128, R=10000, k=10, d=4096, momentum=0.9, max_norm=1.0),
        *cases.grid(FP32, S=10, B=128, R=1000, k=10, d=256, max_norm=1.0),
    ],
    checked={
        "": partial(check, [11, 3]),
        "clipped": partial(
            check, [20, 3], max_norm=0.5, nonnegative=True, normalize=[True, True], momentum=0.9
        ),
        "networks": partial(check, [9], 9, 3, max_norm=1e6, normalize=[True]),
        "few slots": partial(check, [11, 3], 39, 3, max_norm=0.5, nonnegative=True),
    },
    tiles={"row_update": cases.tile(BLOCK=8, num_warps=1)},
    pins={
        "": cases.Pin(
            update(256, **meta.SMALL), f"{meta.RANKED} segment_kernel sum _apply_kernel", 5
        ),
        "of two": cases.Pin(update(256, 10, **meta.SMALL), SUMS, 6),
        "of ten networks": cases.Pin(update(256, 10, S=10, B=1280, R=10_000, k=10), SUMS, 6),
        "large": cases.Pin(
            update(1024, **meta.LARGE), f"{meta.SORTED} segment_kernel sum _apply_kernel", 8
        ),
    },
)
