"""Cases of distill_code."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd.ops.distill_code import distill_code
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta


def call(draw: cases.Draw) -> cases.Run:
    values, indices = draw.code()
    decoder, labels, target = draw(draw.R, draw.C), draw.labels(), draw(draw.B, draw.C)
    taught, positions = draw(draw.B, draw.K).relu(), draw.range(draw.R).clamp(max=draw.K)
    weight = draw(draw.B).abs()
    settings: dict[str, Any] = {"alpha": 0.6, "lam": 0.3, "temperature": 2.0}

    def run(impl: str | None) -> cases.Results:
        code = values, indices, decoder, labels
        options: dict[str, Any] = {"positions": positions, "weight": weight, "impl": impl}
        return (
            *distill_code(*code, target, taught, **settings, **options),
            *distill_code(*code, impl=impl),
        )

    return run


def each_sample(draw: cases.Draw) -> cases.Run:
    """Settings of each sample, the other divergence, and columns that are left out."""
    values, indices = draw.code()
    decoder, labels, target = draw(draw.R, draw.C), draw.labels(), draw(draw.B, draw.C)
    taught, positions = draw(draw.B, draw.K).relu(), draw.range(draw.R).clamp(max=draw.K)
    alpha, lam, weight = (draw(draw.B).abs() for _ in range(3))
    columns = target > -1

    def run(impl: str | None) -> cases.Results:
        given: dict[str, Any] = {"alpha": alpha, "lam": lam, "temperature": lam + 1}
        given |= {"weight": weight, "columns": columns, "kl": "forward", "impl": impl}
        code = values, indices, decoder, labels
        return tuple(distill_code(*code, target, taught, positions=positions, **given))

    return run


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    K: int,
    C: int,
    n: int = 0,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    """each: settings, and a weight, of each sample."""
    distill_code(
        *meta.code(B, R, K, dtype, grad=True),
        meta.new(R, C, dtype=dtype),
        meta.longs(B),
        meta.new(B, C, dtype=dtype) if teacher else None,
        meta.new(B, n, dtype=dtype) if n else None,
        positions=meta.longs(R) if n else None,
        **meta.settings(B, each),
        kl=kl,
        columns=meta.new(B, C, dtype=torch.bool) if columns else None,
    )


def check(
    slots: int,
    classes: int,
    teacher: bool = True,
    units: int = 0,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    values, indices = small.code(3, slots, 20)
    decoder, labels = small.integers(20, classes), torch.randint(classes, (3,))
    options: dict[str, Any] = {"kl": kl, "alpha": 0.3, "lam": 0.4, "temperature": 2.0}
    if each:
        options |= {"lam": torch.rand(3), "weight": torch.rand(3)}
    if columns:
        options["columns"] = torch.rand(3, classes) < 0.5
        options["columns"][:, 0] = True
    targets = [torch.randn(3, classes) if teacher else None]
    targets += [torch.rand(3, units) if units else None]
    if units:
        options["positions"] = torch.randperm(20).clamp(max=units)
    results = []
    for impl in ("triton", "reference"):
        out = distill_code(values, indices, decoder, labels, *targets, impl=impl, **options)
        results.append(tuple(out))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def pinned(teacher: bool = True, each: bool = False) -> meta.Prepare:
    """distill_code of [128, 10]; each: settings, and a weight, of each sample."""
    positions = meta.longs(10_000)
    names = ("alpha", "lam", "temperature", "weight")
    options = {name: meta.new(128) for name in names} if each else {"alpha": 0.5, "lam": 0.5}
    targets = [meta.new(128, 10), meta.new(128, 10)] if teacher else []
    return meta.of(
        distill_code,
        *meta.code(**meta.SMALL),
        meta.new(10_000, 10),
        meta.longs(128),
        *targets,
        positions=positions,
        **options,
    )


OP = cases.Op(
    distill_code,
    calls={"": cases.Call(call, half=False), "of each sample": cases.Call(each_sample, half=False)},
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, R=10000, K=10, C=10, teacher=False),
        *cases.grid(FP32, B=128, R=10000, K=10, C=10, n=10, each=True),
        *cases.grid(FP32, B=1280, R=100000, K=40, C=10, n=20, columns=True, each=True),
        *cases.grid(FP32, B=128, R=10000, K=40, C=10),
        *cases.grid(FP32, B=128, R=10000, K=300, C=100, n=200, kl="forward"),
        *cases.grid(FP32, B=128, R=10000, K=128, C=128, n=4096, each=True),
        *cases.grid(FP32, B=128, R=10000, K=300, C=4096, n=4096, columns=True),
    ],
    checked={
        "": partial(check, 5, 10, units=6, each=True),
        "columns": partial(check, 3, 18, columns=True, kl="forward"),
        "labels": partial(check, 1, 3, teacher=False),
        "one": partial(check, 4, 1, units=1),
    },
    tiles={"distill_code": cases.tile(TILE=32, num_warps=1)},
    pins={
        "": cases.Pin(pinned(), "_distill_code_kernel", 0),
        "each": cases.Pin(pinned(each=True), "_distill_code_kernel", 0),
        "labels": cases.Pin(pinned(teacher=False, each=True), "_distill_code_kernel", 0),
    },
)
