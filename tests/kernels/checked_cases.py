"""Small calls of every op in every implementation, for the checker of kernels.

Each compares its result with the reference, so that a result which depends on the order of the
programs, or on what fresh memory holds, fails too. Inputs are mostly small integers: sums are then
exact and ties many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ssd_kernels import _encoder, _segments, _tuning
from ssd_kernels._graded_code import Shadow
from tests.kernels import ops
from tests.kernels.test_row_update import Step
from tests.kernels.test_topk import fill

# Short tiles: the smallest shapes have several of each, and a short last one.
TILES: dict[str, _tuning.Config] = {
    "topk": {"TILE": 64, "PROGRAMS": 2, "num_warps": 1},
    "linear_inhibit": {"BM": 4, "BN": 32, "num_warps": 1},
    "count_active": {"BLOCK": 8, "num_warps": 1},
    "code_gram": {"BLOCK": 4, "num_warps": 1},
    "rank_slots": {"BLOCK": 8, "RIVALS": 16, "num_warps": 1},
    "offsets": {"BLOCK": 4, "num_warps": 1},
    "segments": {"SLOTS": 2, "BLOCK": 8, "num_warps": 1},
    "sparse_linear": {"SLOTS": 4, "BLOCK": 16, "num_warps": 1},
    "distill": {"num_warps": 1},
    "draw_batch": {"BLOCK": 4, "num_warps": 1},
    "gate_gradient": {"BLOCK": 4, "num_warps": 1},
    "tally": {"SAMPLES": 4, "BLOCK": 4, "num_warps": 1},
    "distill_code": {"TILE": 32, "num_warps": 1},
    "row_update": {"BLOCK": 8, "num_warps": 1},
    "squares": {"PARTS": 3, "BLOCK": 4, "num_warps": 1},
}
# fp32 inputs take descriptors and the walk over tiles, 16-bit ones of odd strides neither.
TILE = {"TOGETHER": 2, "BM": 4, "BN": 64, "BK": 8, "num_warps": 1, "num_stages": 1}
PLAIN, DESCRIBED = ({**TILE, "DESCRIPTORS": on, "PERSISTENT": on} for on in (0, 1))
TAIL = 3  # columns of a wider matrix that an op is not handed


@contextmanager
def small_tiles(slab: int | None = None, groups: int | None = None) -> Iterator[None]:
    """Launches with short tiles; few rows and programs of few groups where asked for."""
    table: dict[str, dict[str, _tuning.Rows]] = {
        op: {"default": (({}, chosen),)} for op, chosen in TILES.items()
    } | {"linear_topk": {"default": (({"aligned": 0}, PLAIN), ({}, DESCRIBED))}}
    limits: dict[str, Any] = {} if slab is None else {"slab_rows": lambda *_: slab, "WORKSPACE": 1}
    limits |= {} if groups is None else {"MAX_GROUPS": groups}
    with ExitStack() as stack:
        for name, limit in limits.items():
            stack.enter_context(mock.patch.object(_encoder, name, limit))
        stack.enter_context(mock.patch.object(_tuning, "TABLE", table))
        stack.enter_context(mock.patch.dict("os.environ", SSD_KERNELS_IMPL="triton"))
        yield


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In -2..2, a part of a wider matrix."""
    wide = torch.randint(-2, 3, (*shape[:-1], shape[-1] + TAIL)).to(dtype)
    return wide[..., : shape[-1]]


def counter(neurons: int) -> Tensor:
    """Every second entry of a longer one."""
    return torch.ones(2 * neurons, dtype=torch.int64)[::2]


def equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def ramp(like: Tensor) -> Tensor:
    return (torch.arange(like.numel()) % 5 - 2.0).view_as(like).to(like.dtype)


def topk(
    kind: str,
    batch: int,
    neurons: int,
    k: int,
    boost: bool = False,
    allowed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    scores = fill(kind, batch, neurons, dtype).requires_grad_()
    options: dict[str, Any] = {"boost": torch.rand(neurons).to(dtype)} if boost else {}
    if allowed is not None:
        options["mask"] = torch.randperm(neurons) < allowed
    got = ops.topk(scores, k, impl="triton", **options)
    expected = ops.topk(scores, k, impl="reference", **options)
    equal(got[:2], expected[:2])
    slopes = [gradients((o.values * ramp(o.values)).sum(), [scores]) for o in (got, expected)]
    equal(*slopes)


def layer(
    batch: int, neurons: int, features: int, bias: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = integers(batch, features, dtype=dtype), integers(neurons, features, dtype=dtype)
    return x, weight, integers(neurons, dtype=dtype) if bias else None


def linear_topk(
    batch: int,
    neurons: int,
    features: int,
    k: int,
    bias: bool = True,
    inhibition: str = "mask",
    count: bool = True,
    blocks: int = 1,
    grad: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    given = layer(batch * blocks, neurons * blocks, features, bias, dtype)
    leaves = [t.requires_grad_(grad) for t in given if t is not None]
    results = []
    for name in ("triton", "reference"):
        counts = counter(neurons * blocks) if count else None
        out = ops.linear_topk(
            given[0], given[1], k, given[2], inhibition=inhibition, threshold=True, counts=counts,
            blocks=blocks, impl=name,
        )  # fmt: skip
        assert out.threshold is not None
        loss = (out.values * ramp(out.values)).sum() + (out.threshold * ramp(out.threshold)).sum()
        results.append((out[:3], counts, gradients(loss, leaves) if grad else ()))
    equal(*results)


def rescored(blocks: int, bias: bool) -> None:
    """Scores that differ, of which few are looked at; and a row whose scores are too close."""
    x, weight = torch.randn(3 * blocks, 7), torch.randn(170 * blocks, 7)
    x[1] = 10 + torch.rand(7)
    weight[:170] = x[1] + 1e-5 * torch.rand(170, 7)
    shift = torch.randn(170 * blocks) * 1e-3 if bias else None
    got = ops.linear_topk(x, weight, 2, shift, blocks=blocks, impl="triton")
    expected = ops.linear_topk(
        x.double(), weight.double(), 2, None if shift is None else shift.double(), blocks=blocks,
        impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(got.values.double(), expected.values, rtol=1e-5, atol=1e-5)


def linear_inhibit(
    batch: int,
    neurons: int,
    k: int,
    gaba: bool = True,
    bias: bool = True,
    inhibition: str = "subtract",
    count: bool = True,
    blocks: int = 1,
    grad: bool = True,
    dtype: torch.dtype = torch.float32,
) -> None:
    x, weight, shift = layer(batch * blocks, neurons * blocks, 9, bias, dtype)
    response = torch.randint(1, 5, (neurons * blocks,)).to(dtype) / 4 if gaba else None
    leaves = [t.requires_grad_(grad) for t in (x, weight, shift) if t is not None]
    results = []
    for impl in ("triton", "reference"):
        counts = counter(neurons * blocks) if count else None
        out = ops.linear_inhibit(
            x, weight, k, response, shift, inhibition=inhibition, counts=counts, blocks=blocks,
            impl=impl,
        )  # fmt: skip
        slopes = gradients((out * ramp(out)).sum(), leaves) if grad else ()
        results.append((out, counts, slopes))
    equal(*results)


def linear_code(
    dtype: torch.dtype,
    gaba: bool,
    inhibition: str,
    shadow: bool = False,
    blocks: int = 1,
    impl: str = "triton",
    count: bool = False,
    crowded: bool = False,
) -> None:
    """By way of the kernels; or the torch path, for what it reads. Crowded: too many fire."""
    x, weight = torch.rand(4, 9).to(dtype), torch.rand(400 * blocks, 9).to(dtype)
    x[1::blocks] += 1
    response = (1 - torch.rand(400 * blocks) / 64).to(dtype) if gaba else None
    if crowded and response is not None:
        response *= 0.5
    copy = Shadow(weight) if shadow else None
    counts = counter(400 * blocks) if count else None
    got, wider = ops.linear_code(
        x, weight, 2, 6, response, inhibition=inhibition, counts=counts, shadow=copy, blocks=blocks,
        impl=impl,
    )  # fmt: skip
    expected, _ = ops.linear_code(
        x, weight, 2, 6, response, inhibition=inhibition, blocks=blocks, impl="reference"
    )
    assert bool(wider.all()) if crowded else not wider.any()
    if not crowded:
        torch.testing.assert_close(got.values, expected.values, rtol=1e-2, atol=1e-2)
    if counts is not None:
        fired = torch.bincount(got.indices[got.values > 0], minlength=len(counts))
        equal(counts, fired + 1)


def linear_active(dtype: torch.dtype, gaba: bool, inhibition: str) -> None:
    x, weight = integers(4, 9, dtype=dtype), integers(70, 9, dtype=dtype)
    response = torch.randint(1, 5, (70,)).to(dtype) / 4 if gaba else None
    results = []
    for impl in ("torch", "reference"):
        counts = counter(70)
        out = ops.linear_active(
            x, weight, 2, response, inhibition=inhibition, counts=counts, impl=impl
        )
        results.append((tuple(out), counts))
    equal(*results)


def code(
    batch: int, slots: int, neurons: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Values in 0..2; the neurons of a sample are distinct but for idle slots."""
    indices = torch.stack([torch.randperm(neurons)[:slots] for _ in range(batch)])
    values = torch.randint(3, (batch, slots)).to(dtype)
    idle = values[:, 0] == 0
    indices[idle, 0] = indices[idle, -1]
    return values, indices


def sparse_linear(
    batch: int,
    slots: int,
    neurons: int,
    outputs: int,
    bias: bool = False,
    needs: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
) -> None:
    values, indices = code(batch, slots, neurons, dtype)
    weight, shift = integers(neurons, outputs, dtype=dtype), integers(outputs, dtype=dtype)
    leaves = [t.requires_grad_() for t, need in zip((values, weight), needs, strict=True) if need]
    results = []
    for impl in ("triton", "reference"):
        out = ops.sparse_linear(values, indices, weight, shift if bias else None, impl=impl)
        results.append((out, gradients((out * ramp(out)).sum(), leaves)))
    equal(*results)


def row_gradient(batch: int, slots: int, neurons: int, features: int, ranked: bool = True) -> None:
    values, indices = code(batch, slots, neurons)
    inputs = integers(batch, features)
    limit = _segments.MAX_RANKED if ranked else 0
    with mock.patch.object(_segments, "MAX_RANKED", limit):
        got = ops.row_gradient(values, inputs, indices, neurons, impl="triton")
    equal(got, ops.row_gradient(values, inputs, indices, neurons, impl="reference"))


def row_bias(neurons: int) -> None:
    """The sums of the coefficients, which no op but a compiled linear_topk asks for."""
    values, indices = code(5, 3, neurons)
    got, sums = _segments.row_gradients(values, integers(5, 9), indices, neurons, True, None, ())
    assert got.shape == (neurons, 9)
    equal(sums, torch.zeros(neurons).index_add_(0, indices.flatten(), values.flatten()))


def row_update(widths: list[int], neurons: int = 8, blocks: int = 1, **options: Any) -> None:
    step = Step(5 if blocks == 1 else 2 * blocks, 3, neurons, widths)
    if blocks > 1:  # samples follow one another as their networks do
        own = neurons // blocks
        step.indices = step.indices % own + own * torch.arange(blocks).repeat_interleave(2)[:, None]
        bounds = torch.full((blocks,), options.pop("max_norm"))
        options |= {"blocks": blocks, "max_norm": bounds, "lr": torch.rand(blocks)}
    got = step.run("triton", torch.float32, **options)
    expected = step.run("reference", torch.float64, **options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def count_active(
    batch: int, slots: int, neurons: int, stamp: bool = False, on_device: bool = False
) -> None:
    values, indices = code(batch, slots, neurons)
    step = torch.tensor(17) if on_device else 17
    results = []
    for impl in ("triton", "reference"):
        counts, last = counter(neurons), counter(neurons) if stamp else None
        ops.count_active(values, indices, counts, last, step, impl=impl)
        results.append((counts, last))
    equal(*results)


def code_gram(
    batch: int, slots: int, neurons: int, targets: str, dtype: torch.dtype = torch.float32
) -> None:
    values, indices = code(batch, slots, neurons)
    wanted = {
        "none": None,
        "labels": torch.randint(3, (batch,)),
        "dense": integers(batch, 5).contiguous(),
    }[targets]
    classes = 3 if targets == "labels" else 5
    results = []
    for impl in ("triton", "reference"):
        gram = torch.ones(neurons, neurons, dtype=dtype)
        cross = None if wanted is None else torch.ones(neurons, classes, dtype=dtype)
        ops.code_gram(values, indices, gram, cross, wanted, impl=impl)
        results.append((gram, cross))
    equal(*results)


def distill(
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
        ops.distill(logits, labels, *given, impl=impl, **options)
        for impl in ("triton", "reference")
    )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def dense_update(widths: list[int], blocks: int, nonnegative: bool = True, **options: Any) -> None:
    given = [[torch.randn(5 * blocks, width) for width in widths] for _ in range(3)]
    if blocks > 1:
        bounds, samples = torch.rand(blocks), torch.arange(blocks) % 2
        options |= {"max_norm": bounds, "lr": bounds.flip(0), "samples": samples}
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        weights, gradients, buffers = ([t.to(dtype, copy=True) for t in ts] for ts in given)
        kept = buffers if "momentum" in options else None
        ops.dense_update(
            weights, gradients, nonnegative=nonnegative, normalize=[True, False], buffers=kept,
            blocks=blocks, impl=impl, **options,
        )  # fmt: skip
        results.append([t.double() for t in weights + buffers])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def draw_batch(features: int, teacher: bool, gaba: bool) -> None:
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
        now = torch.tensor(position)
        got, expected = (
            ops.draw_batch(**given, position=now, size=size, impl=impl)
            for impl in ("triton", "reference")
        )
        equal(got, expected)


def gate_gradient(neurons: int, subnetwork: int, gated: bool, transposed: bool = False) -> None:
    gate, positions = integers(6, neurons), torch.stack([torch.randperm(neurons) for _ in range(2)])
    slopes = torch.randn(6, subnetwork) if subnetwork else None
    places = positions.clamp(max=subnetwork).flatten() if subnetwork else None
    results = []
    for impl in ("triton", "reference"):
        wide = torch.arange(6.0 * (neurons + TAIL)).view(6, -1)
        wide = wide.T.contiguous().T if transposed else wide
        mask = gate > 0 if transposed else gate
        ops.gate_gradient(wide[:, :neurons], mask, slopes, places, gated=gated, impl=impl)
        results.append(wide)
    equal(*results)


def tally(learners: int, size: int, classes: int, wider: bool) -> None:
    rows = learners * size
    weight = (torch.arange(rows) % 3 != 1).float()
    given = [integers(rows), integers(rows, classes), torch.randint(classes, (rows,)), weight]
    results = []
    for impl in ("triton", "reference"):
        sums = [counter(learners).double(), counter(learners), counter(learners), torch.tensor(4)]
        crowded = [torch.arange(rows) == 2, counter(learners) > 1] if wider else []
        ops.tally(*given, *sums, *crowded, impl=impl)
        results.append(sums + crowded)
    equal(*results)


def distill_code(
    slots: int,
    classes: int,
    teacher: bool = True,
    units: int = 0,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    values, indices = code(3, slots, 20)
    decoder, labels = integers(20, classes), torch.randint(classes, (3,))
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
        out = ops.distill_code(values, indices, decoder, labels, *targets, impl=impl, **options)
        results.append(tuple(out))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
CASES: dict[str, Callable[[], None]] = {
    **{f"topk {kind}": partial(topk, kind, 3, 200, 5) for kind in ("ties", "special", "zero")},
    "topk many cuts": partial(topk, "ascending", 2, 320, 20),
    "topk cuts with ties": partial(topk, "ties", 5, 500, 31),
    "topk one": partial(topk, "normal", 5, 65, 1),
    "topk all": partial(topk, "ties", 2, 33, 33),
    "topk parts": partial(topk, "ties", 1, 520, 3),
    "topk parts boost mask": partial(topk, "normal", 2, 520, 30, boost=True, allowed=200),
    "topk few allowed": partial(topk, "normal", 2, 70, 4, allowed=2, dtype=HALF),
    **{
        f"linear_topk {name} {word}": partial(linear_topk, *shape, **options, dtype=dtype)
        for dtype, word in ((SINGLE, "single"), (HALF, "half"))
        for name, shape, options in (
            ("one", (5, 70, 9, 1), {"bias": False}),
            ("ties", (3, 130, 9, 3), {"inhibition": "subtract"}),
            ("blocks", (5, 65, 9, 2), {"blocks": 2, "bias": False, "count": False}),
            ("all", (1, 33, 37, 33), {"count": False}),
            ("many groups", (2, 700, 1, 1), {"bias": False, "grad": False}),
        )
    },
    "linear_topk": partial(linear_topk, 2, 40, 3, 3),
    "linear_topk rescored": partial(rescored, 2, True),
    "linear_topk rescored without bias": partial(rescored, 1, False),
    "linear_inhibit gaba": partial(linear_inhibit, 5, 70, 3),
    "linear_inhibit one": partial(linear_inhibit, 2, 40, 1, gaba=False, count=False),
    "linear_inhibit blocks": partial(
        linear_inhibit, 3, 40, 2, bias=False, inhibition="mask", blocks=2, grad=False
    ),
    "linear_inhibit all": partial(linear_inhibit, 2, 40, 40),
    "linear_inhibit half": partial(linear_inhibit, 2, 40, 2, dtype=HALF, grad=False),
    "linear_code half": partial(linear_code, HALF, False, "mask"),
    "linear_code half gaba": partial(linear_code, HALF, True, "mask", blocks=2),
    "linear_code graded": partial(linear_code, SINGLE, True, "mask"),
    "linear_code graded blocks": partial(
        linear_code, SINGLE, True, "subtract", blocks=2, count=True
    ),
    "linear_code graded crowded": partial(
        linear_code, SINGLE, True, "mask", count=True, crowded=True
    ),
    "linear_code torch": partial(linear_code, SINGLE, True, "subtract", blocks=2, impl="torch"),
    "linear_code torch shadow": partial(
        linear_code, SINGLE, True, "subtract", shadow=True, impl="torch"
    ),
    "linear_active half": partial(linear_active, HALF, True, "subtract"),
    "linear_active torch": partial(linear_active, SINGLE, True, "mask"),
    "sparse_linear": partial(sparse_linear, 4, 6, 20, 18, bias=True),
    "sparse_linear one": partial(sparse_linear, 3, 1, 5, 3, needs=(False, True), dtype=HALF),
    "sparse_linear values": partial(sparse_linear, 3, 5, 9, 10, needs=(True, False)),
    "sparse_linear few slots": partial(sparse_linear, 2, 3, 9, 6, needs=(True, False)),
    "row_gradient": partial(row_gradient, 6, 4, 7, 11),
    "row_gradient one": partial(row_gradient, 1, 1, 1, 1),
    "row_gradient sorted": partial(row_gradient, 4, 3, 9, 5, ranked=False),
    "row_gradient bias": partial(row_bias, 7),
    "row_update": partial(row_update, [11, 3]),
    "row_update clipped": partial(
        row_update, [20, 3], max_norm=0.5, nonnegative=True, normalize=[True, True], momentum=0.9
    ),
    "row_update blocks": partial(row_update, [9], 9, 3, max_norm=1e6, normalize=[True]),
    "row_update few slots": partial(row_update, [11, 3], 39, 3, max_norm=0.5, nonnegative=True),
    "count_active": partial(count_active, 5, 4, 9),
    "count_active stamp": partial(count_active, 5, 4, 9, stamp=True),
    "count_active stamp on device": partial(count_active, 1, 1, 1, stamp=True, on_device=True),
    "code_gram": partial(code_gram, 4, 6, 9, "none"),
    "code_gram labels": partial(code_gram, 4, 6, 9, "labels", DOUBLE),
    "code_gram dense": partial(code_gram, 4, 3, 5, "dense"),
    "code_gram one": partial(code_gram, 3, 1, 2, "labels"),
    "distill": partial(distill, 10, True, True, True, "reverse"),
    "distill each": partial(distill, 10, True, True, False, "reverse", each=True),
    "distill hidden alone": partial(distill, 3, False, True, False, "reverse", each=True),
    "distill forward": partial(distill, 18, True, False, False, "forward"),
    "distill labels": partial(distill, 3, False, False, False, "reverse"),
    "dense_update": partial(dense_update, [5, 3], 1, False, lr=0.1),
    "dense_update clipped": partial(dense_update, [11, 8], 1, lr=0.1, max_norm=0.5, momentum=0.9),
    "dense_update blocks": partial(dense_update, [9, 2], 3),
    "draw_batch": partial(draw_batch, 5, True, True),
    "draw_batch only": partial(draw_batch, 1, False, False),
    "gate_gradient": partial(gate_gradient, 9, 3, True),
    "gate_gradient behind": partial(gate_gradient, 7, 2, False, transposed=True),
    "gate_gradient alone": partial(gate_gradient, 1, 0, True),
    "tally": partial(tally, 3, 6, 9, True),
    "tally one": partial(tally, 1, 1, 1, False),
    "distill_code": partial(distill_code, 5, 10, units=6, each=True),
    "distill_code columns": partial(distill_code, 3, 18, columns=True, kl="forward"),
    "distill_code labels": partial(distill_code, 1, 3, teacher=False),
    "distill_code one": partial(distill_code, 4, 1, units=1),
}


def slabs(case: str) -> dict[str, int]:
    """Few rows at a time for some, few groups at a time for others."""
    if "blocks" in case or case.endswith("gaba"):
        return {"slab": 4}
    return {"groups": 3} if "ties" in case else {}


def run(case: str) -> None:
    torch.manual_seed(0)
    with small_tiles(**slabs(case)):
        CASES[case]()
