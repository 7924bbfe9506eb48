"""Cases of draw_batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ssd.ops.batch import draw_batch
from ssd.ops.reference import Stored
from tests.kernels import cases
from tests.kernels.cases import FP32
from tests.kernels.cases import _checked as small
from tests.kernels.cases import _meta as meta


def call(draw: cases.Draw, targets: bool = True) -> cases.Run:
    stored = draw.S * draw.B
    order = draw.range(stored).flip(0).view(draw.S, draw.B) % draw.B
    samples, position = draw.integers(draw.B, 4), draw.integers(1)[0]
    given = draw(stored, draw.D), draw.range(stored), order, samples, position, 3
    rest: tuple[torch.Tensor, ...] = ()
    if targets:
        anneal = draw.integers(draw.R, 2 * draw.R)
        rest = draw(stored, draw.C), draw(stored, draw.K), draw.range(draw.S * draw.R), anneal
    return lambda impl: tuple(draw_batch(Stored(*given, *rest), impl=impl))


def launch(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    S: int = 1,
    C: int = 10,
    n: int = 0,
    R: int = 0,
    teacher: bool = True,
) -> None:
    rows, stored = S * 6000, S * 6000
    given = Stored(
        meta.new(stored, d, dtype=dtype),
        meta.longs(stored),
        meta.longs(S, 6000),
        meta.longs(S),
        meta.longs(),
        B,
        meta.new(rows, C, dtype=dtype) if teacher else None,
        meta.new(rows, n, dtype=dtype) if n else None,
        meta.longs(S * R) if R else None,
        meta.new(S, dtype=dtype) if R else None,
    )
    draw_batch(given)


def check(features: int, teacher: bool, gaba: bool) -> None:
    learners, stored, size = 2, 7, 3
    rows = learners * stored
    order = torch.stack([torch.randperm(stored) for _ in range(learners)])
    given: dict[str, Any] = {"order": order, "samples": torch.tensor([7, 5])}
    given |= {"inputs": torch.randn(rows, features), "labels": torch.randint(1, 4, (rows,))}
    if teacher:
        given |= {"target_logits": torch.randn(rows, 4), "target_hidden": torch.randn(rows, 9)}
    if gaba:
        given |= {"counts": torch.arange(10), "anneal_samples": torch.tensor([9.0, 4.0])}
    for position in range(3):
        now = Stored(**given, position=torch.tensor(position), size=size)
        small.equal(*(draw_batch(now, impl=impl) for impl in ("triton", "reference")))


def pinned(S: int = 10, B: int = 128) -> meta.Prepare:
    """draw_batch with all that it draws."""
    stored = S * 6000
    targets = meta.new(stored, 10), meta.new(stored, 200), meta.longs(S * 10_000), meta.new(S)
    order, samples, position = meta.longs(S, 6000), meta.longs(S), meta.longs()
    given = meta.new(stored, 256), meta.longs(stored), order, samples, position, B, *targets
    return meta.of(draw_batch, Stored(*given))


OP = cases.Op(
    draw_batch,
    calls={
        "": cases.Call(call, half=False),
        "without targets": cases.Call(partial(call, targets=False), half=False),
    },
    launch=launch,
    compiled=[
        *cases.grid(FP32, B=128, d=256, teacher=False),
        *cases.grid(FP32, S=10, B=128, d=256, n=200, R=10000),
        *cases.grid(FP32, B=1024, d=3072, C=100, n=20, R=1000),
    ],
    checked={"": partial(check, 5, True, True), "only": partial(check, 1, False, False)},
    tiles={"draw_batch": cases.tile(BLOCK=4, num_warps=1)},
    pins={"": cases.Pin(pinned(), "_draw_kernel", 0)},
)
