"""Cases of row_update."""

from __future__ import annotations

from typing import Any

import torch

from ssd_kernels import row_update
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _refused as refused
from tests.kernels.property_codes import RowUpdate


def call(
    draw: cases.Draw,
    single: bool = False,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = None,
    one_bound: bool = False,
) -> cases.Run:
    """Each network has its rate and, but for one_bound, its bound; each matrix its idle slots."""
    values, indices = draw.code()
    widths = [draw.D] if single else [draw.D, draw.C]
    starts, kept = ([draw(draw.S * draw.R, w) for w in widths] for _ in range(2))
    coefficients = [values, draw(*values.shape).relu()][: len(widths)]
    inputs = [draw(len(values), w) for w in widths]
    options: dict[str, Any] = {
        "lr": draw.per_network(0.1),
        "max_norm": max_norm if one_bound else draw.per_network(max_norm),
        "nonnegative": project,
        "normalize": [project, False][: len(widths)],
        "momentum": momentum,
        "networks": draw.S,
    }

    def run(impl: str | None) -> cases.Results:
        weights, buffers = ([draw.copy(t) for t in tensors] for tensors in (starts, kept))
        given = {"buffers": buffers if momentum else None, "impl": impl}
        norm = row_update(weights, coefficients, inputs, indices, **options, **given)
        return norm, *weights, *buffers

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


SUMS = f"{cases.RANKED} segment_kernel segment_kernel sum _apply_kernel _apply_kernel"
OP = cases.Op(
    row_update,
    call,
    calls={
        "": {"momentum": 0.9, "max_norm": 1.0},
        "plain": {"max_norm": 1.0},
        "of networks": {"S": 2, "max_norm": 1.0},
        "of networks, one bound": {"S": 2, "max_norm": 1.0, "one_bound": True},
        "unbounded": {"single": True, "project": False},
    },
    good=good,
    bad=BAD,
    drawn=RowUpdate(row_update),
    implied={"C": 10},
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
        "": cases.check(tolerance=1e-5, B=5, K=3, R=8, D=11, C=3, project=False),
        "clipped": cases.check(
            tolerance=1e-5, B=5, K=3, R=8, D=20, C=3, max_norm=0.5, momentum=0.9
        ),
        "networks": cases.check(tolerance=1e-5, S=3, B=2, K=3, R=3, D=7, single=True, max_norm=1e6),
        "one bound": cases.check(
            tolerance=1e-5, S=3, B=2, K=3, R=3, D=7, C=3, max_norm=0.5, one_bound=True
        ),
        "few slots": cases.check(tolerance=1e-5, S=3, B=2, K=3, R=13, D=11, C=3, max_norm=0.5),
    },
    tiles={"row_update": cases.tile(BLOCK=8, num_warps=1)},
    pins={
        "": cases.pin(
            f"{cases.RANKED} segment_kernel sum _apply_kernel",
            5,
            **cases.SMALL,
            single=True,
            max_norm=1.0,
        ),
        "of two": cases.pin(SUMS, 6, **cases.SMALL, max_norm=1.0),
        "of ten networks": cases.pin(SUMS, 6, S=10, B=128, D=256, R=1000, K=10, max_norm=1.0),
        "large": cases.pin(
            f"{cases.SORTED} segment_kernel sum _apply_kernel",
            8,
            **cases.LARGE,
            single=True,
            max_norm=1.0,
        ),
    },
)
