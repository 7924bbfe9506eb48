"""Cases of distill."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd.ops.distill import distill
from tests.kernels import cases
from tests.kernels.cases import BF16, FP32
from tests.kernels.cases import _meta as meta
from tests.kernels.cases import _refused as refused
from tests.kernels.property_distill import Distill


def call(draw: cases.Draw) -> cases.Run:
    logits, target = draw(draw.B, draw.C), draw(draw.B, draw.C)
    hidden, taught = draw(draw.B, draw.K).relu(), draw(draw.B, draw.K).relu()
    labels, weight = draw.labels(), draw(draw.B).abs()
    settings: dict[str, Any] = {"alpha": 0.6, "lam": 0.3, "temperature": 2.0}

    def run(impl: str | None) -> cases.Results:
        given = logits, labels, target, hidden, taught
        return (
            *distill(*given, **settings, weight=weight, impl=impl),
            *distill(logits, labels, weight=weight, impl=impl),
        )

    return run


def each_sample(draw: cases.Draw) -> cases.Run:
    """Settings of each sample, the other divergence, and columns that are left out."""
    logits, target = draw(draw.B, draw.C), draw(draw.B, draw.C)
    hidden, taught = draw(draw.B, draw.K).relu(), draw(draw.B, draw.K).relu()
    labels, columns = draw.labels(), logits > -1
    alpha, lam, weight = (draw(draw.B).abs() for _ in range(3))

    def run(impl: str | None) -> cases.Results:
        given: dict[str, Any] = {"alpha": alpha, "lam": lam, "temperature": lam + 1}
        given |= {"weight": weight, "columns": columns, "kl": "forward", "impl": impl}
        return tuple(distill(logits, labels, target, hidden, taught, **given))

    return run


def good() -> cases.Arguments:
    logits = torch.randn(refused.BATCH, refused.OUTPUTS)
    hidden = torch.randn(refused.BATCH, refused.SLOTS)
    labels = torch.randint(refused.OUTPUTS, (refused.BATCH,))
    taught = {"target_logits": logits, "hidden": hidden, "target_hidden": hidden}
    return {"logits": logits, "labels": labels, "columns": logits > -9, "lam": 0.5} | taught


BAD: list[cases.Bad] = [
    ({"labels": torch.full((4,), -100)}, ValueError, r"labels run from -100 to -100, .*0\.\.2"),
    ({"labels": torch.full((4,), 3)}, ValueError, r"labels run from 3 to 3, expected 0\.\.2"),
    ({"labels": torch.zeros(4, device=refused.META).long()}, ValueError, "labels is on meta"),
    ({"labels": torch.zeros(4).int()}, TypeError, "labels have dtype torch.int32"),
    ({"target_hidden": torch.ones(4, 2).half()}, TypeError, "target_hidden has dtype"),
    (
        {"target_hidden": torch.ones(4, 2, device=refused.META)},
        ValueError,
        "target_hidden is on meta",
    ),
    ({"target_hidden": torch.ones(4, 1)}, ValueError, r"target_hidden has shape \[4, 1\]"),
    ({"target_logits": torch.ones(4, 1)}, ValueError, r"target_logits has shape \[4, 1\]"),
    ({"columns": torch.ones(4, 3, device=refused.META).bool()}, ValueError, "columns is on meta"),
    ({"weight": torch.ones(3)}, ValueError, r"weight has shape \[3\], expected \[4\]"),
    ({"weight": torch.ones(4, device=refused.META)}, ValueError, "weight is on meta"),
    ({"alpha": torch.ones(3)}, ValueError, r"alpha has shape \[3\], expected \[4\]"),
    ({"lam": torch.ones(4, 1)}, ValueError, r"lam has shape \[4, 1\], expected \[4\]"),
    ({"temperature": torch.ones(4, device=refused.META)}, ValueError, "temperature is on meta"),
    ({"temperature": 0.0}, ValueError, r"temperature=0\.0 must be finite and above 0"),
    ({"temperature": -1}, ValueError, "temperature=-1 must be finite and above 0"),
    ({"alpha": float("nan")}, ValueError, "alpha=nan must be finite and at least 0"),
    ({"alpha": True}, TypeError, "alpha=True must be a number"),
    ({"lam": "1"}, TypeError, "lam='1' must be a number"),
]


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    n: int = 0,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    """each: settings, and a weight, of each sample."""
    hidden = meta.new(B, n, dtype=dtype) if n else None
    distill(
        meta.new(B, C, dtype=dtype),
        meta.longs(B),
        meta.new(B, C, dtype=dtype) if teacher else None,
        hidden,
        hidden,
        **meta.settings(B, each),
        kl=kl,
        columns=meta.new(B, C, dtype=torch.bool) if columns else None,
    )


def check(
    classes: int, teacher: bool, hidden: bool, columns: bool, kl: str, each: bool = False
) -> None:
    logits, labels = torch.randn(3, classes), torch.randint(classes, (3,))
    options: dict[str, Any] = {"kl": kl, "alpha": 0.3, "lam": 0.4, "temperature": 2.0}
    if each:
        options |= {"lam": torch.rand(3), "weight": torch.rand(3)}
    if columns:
        options["columns"] = torch.rand(3, classes) < 0.5
        options["columns"][:, 0] = True
    given = [torch.randn(3, classes) if teacher else None]
    given += [torch.randn(3, 18), torch.randn(3, 18)] if hidden else [None, None]
    got, expected = (
        distill(logits, labels, *given, impl=impl, **options) for impl in ("triton", "reference")
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def pinned(teacher: bool = True, each: bool = False) -> meta.Prepare:
    """distill of [128, 10]; each: settings, and a weight, of each sample."""
    logits, labels = meta.new(128, 10), meta.longs(128)
    terms = [meta.new(128, 10) for _ in range(3)] if teacher else [None, logits, logits]
    names = ("alpha", "lam", "temperature", "weight")
    options = {name: meta.new(128) for name in names} if each else {"alpha": 0.5, "lam": 0.5}
    return meta.of(distill, logits, labels, *terms, **options)


OP = cases.Op(
    distill,
    calls={"": cases.Call(call, half=False), "of each sample": cases.Call(each_sample, half=False)},
    good=good,
    bad=BAD,
    drawn=Distill(distill),
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, C=10, teacher=False),
        *cases.grid(FP32, BF16, B=128, C=10),
        *cases.grid(FP32, B=128, C=10, n=10, each=True),
        *cases.grid(FP32, B=128, C=100, n=200, columns=True, kl="forward"),
        *cases.grid(FP32, BF16, B=128, C=4096, n=4096, columns=True),
    ],
    checked={
        "": partial(check, 10, True, True, True, "reverse"),
        "each": partial(check, 10, True, True, False, "reverse", each=True),
        "hidden alone": partial(check, 3, False, True, False, "reverse", each=True),
        "forward": partial(check, 18, True, False, False, "forward"),
        "labels": partial(check, 3, False, False, False, "reverse"),
    },
    tiles={"distill": cases.tile(num_warps=1)},
    pins={
        "": cases.Pin(pinned(), "_distill_kernel", 0),
        "each": cases.Pin(pinned(each=True), "_distill_kernel", 0),
        "labels": cases.Pin(pinned(teacher=False), "_distill_kernel", 0),
    },
)
