"""Every public function refuses what does not fit: clearly, and before it changes anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import ops as sk

Arguments = dict[str, Any]
BATCH, SLOTS, NEURONS, INPUTS, OUTPUTS = 4, 2, 9, 5, 3


def _topk() -> Arguments:
    return {
        "scores": torch.randn(BATCH, NEURONS),
        "k": SLOTS,
        "boost": torch.rand(NEURONS),
        "mask": torch.ones(NEURONS, dtype=torch.bool),
    }


def _linear_topk() -> Arguments:
    return {
        "x": torch.randn(BATCH, INPUTS),
        "weight": torch.randn(NEURONS, INPUTS),
        "k": SLOTS,
        "bias": torch.randn(NEURONS),
        "counts": torch.zeros(NEURONS, dtype=torch.int64),
    }


def _linear_inhibit() -> Arguments:
    return _linear_topk() | {"gaba": torch.rand(NEURONS)}


def _code() -> Arguments:
    return {
        "values": torch.rand(BATCH, SLOTS),
        "indices": torch.randint(NEURONS, (BATCH, SLOTS)),
    }


def _sparse_linear() -> Arguments:
    return _code() | {"weight": torch.randn(NEURONS, OUTPUTS), "bias": torch.randn(OUTPUTS)}


def _count_active() -> Arguments:
    counts = torch.zeros(NEURONS, dtype=torch.int64)
    return _code() | {"counts": counts, "last_active": counts.clone(), "step": 3}


def _code_gram() -> Arguments:
    return _code() | {
        "gram": torch.rand(NEURONS, NEURONS),
        "cross": torch.rand(NEURONS, OUTPUTS),
        "targets": torch.randint(OUTPUTS, (BATCH,)),
    }


def _row_update() -> Arguments:
    code = _code()
    return {
        "weights": [torch.rand(NEURONS, INPUTS), torch.rand(NEURONS, OUTPUTS)],
        "coefficients": [code["values"], code["values"]],
        "inputs": [torch.rand(BATCH, INPUTS), torch.rand(BATCH, OUTPUTS)],
        "indices": code["indices"],
        "lr": 0.1,
        "momentum": 0.9,
        "buffers": [torch.rand(NEURONS, INPUTS), torch.rand(NEURONS, OUTPUTS)],
        "normalize": [True, True],
    }


def _distill() -> Arguments:
    logits = torch.randn(BATCH, OUTPUTS)
    hidden = torch.randn(BATCH, SLOTS)
    labels = torch.randint(OUTPUTS, (BATCH,))
    taught = {"target_logits": logits, "hidden": hidden, "target_hidden": hidden}
    return {"logits": logits, "labels": labels, "columns": logits > -9, "lam": 0.5} | taught


def _linear_active() -> Arguments:
    layer = {"x": torch.rand(BATCH, INPUTS), "weight": torch.rand(NEURONS, INPUTS), "k": SLOTS}
    return layer | {"gaba": 1 - torch.rand(NEURONS)}


def _linear_code() -> Arguments:
    return _linear_active() | {"width": SLOTS + 2}


GOOD: dict[str, Callable[[], Arguments]] = {
    "topk": _topk,
    "linear_topk": _linear_topk,
    "linear_inhibit": _linear_inhibit,
    "sparse_linear": _sparse_linear,
    "code_gram": _code_gram,
    "count_active": _count_active,
    "row_update": _row_update,
    "distill": _distill,
    "linear_active": _linear_active,
    "linear_code": _linear_code,
}
META = torch.device("meta")
SETTINGS: list[tuple[Arguments, type[Exception], str]] = [
    ({"k": True}, TypeError, "k=True must be an integer"),
    ({"k": 2.0}, TypeError, r"k=2\.0 must be an integer"),
    ({"k": torch.tensor(2)}, TypeError, "must be an integer"),
    ({"k": "2"}, TypeError, "k='2' must be an integer"),
]
LAYER: list[tuple[Arguments, type[Exception], str]] = [
    *SETTINGS,
    ({"k": 0}, ValueError, r"k=0 must lie in 1\.\.9"),
    ({"k": 10}, ValueError, r"k=10 must lie in 1\.\.9"),
    ({"blocks": True}, TypeError, "blocks=True must be an integer"),
    ({"blocks": 1.0}, TypeError, r"blocks=1\.0 must be an integer"),
    ({"x": torch.ones(4, 5, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
    ({"weight": torch.ones(9, 5).half()}, TypeError, "weight has dtype torch.float16"),
    ({"bias": torch.ones(9).double()}, TypeError, "bias has dtype torch.float64"),
    ({"weight": torch.ones(9, 5, device=META)}, ValueError, "weight is on meta"),
    ({"weight": torch.ones(9)}, ValueError, r"weight has shape \[9\], expected \[R, d\]"),
    ({"x": torch.ones(4, 6)}, ValueError, r"x has shape \[4, 6\]"),
    ({"x": torch.ones(())}, ValueError, r"x has shape \[\]"),
    ({"bias": torch.ones(8)}, ValueError, r"bias has shape \[8\], expected \[9\]"),
    ({"inhibition": "divide"}, ValueError, "inhibition='divide'"),
    ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
    ({"counts": torch.zeros(8).long()}, ValueError, r"counts has shape \[8\]"),
    ({"counts": torch.zeros(9, device=META).long()}, ValueError, "counts is on meta"),
    ({"blocks": 0}, ValueError, "blocks=0 must divide the 4 rows of x"),
    ({"blocks": -1}, ValueError, "blocks=-1 must divide the 4 rows of x"),
    ({"blocks": 3}, ValueError, "blocks=3 must divide the 4 rows of x"),
    ({"blocks": 2}, ValueError, "blocks=2 must divide the 9 rows of weight"),
    ({"blocks": 3, "x": torch.ones(3, 5), "k": 4}, ValueError, r"k=4 must lie in 1\.\.3"),
]
GABA: list[tuple[Arguments, type[Exception], str]] = [
    ({"gaba": torch.ones(8)}, ValueError, r"gaba has shape \[8\], expected \[9\]"),
    ({"gaba": torch.ones(9).long()}, TypeError, "gaba has dtype torch.int64"),
    ({"gaba": torch.ones(9, device=META)}, ValueError, "gaba is on meta"),
]
ACTIVE: list[tuple[Arguments, type[Exception], str]] = [
    *SETTINGS,
    *GABA,
    ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
    ({"x": torch.ones(2, 4, 5)}, ValueError, r"x has shape \[2, 4, 5\], expected \[B, d\]"),
    ({"blocks": 3}, ValueError, "blocks=3 must divide the 4 rows of x"),
]
GRADED: list[tuple[Arguments, type[Exception], str]] = [
    *ACTIVE,
    ({"gaba": torch.zeros(9)}, ValueError, r"gaba runs from 0 to 0, expected in \(0, 1\]"),
    ({"gaba": torch.full((9,), 1.5)}, ValueError, "gaba runs from 1.5 to 1.5"),
    ({"gaba": torch.full((9,), torch.nan)}, ValueError, "gaba runs from nan to nan"),
]
INDICES: list[tuple[Arguments, type[Exception], str]] = [
    (
        {"indices": torch.full((4, 2), bad)},
        ValueError,
        rf"indices run from {bad} to {bad}, .*0\.\.8",
    )
    for bad in (-1, 9, 2**40, -(2**63))
]
CODE: list[tuple[Arguments, type[Exception], str]] = [
    ({"indices": torch.zeros(4, 2).int()}, TypeError, "indices have dtype torch.int32"),
    ({"indices": torch.zeros(4, 3).long()}, ValueError, r"indices \[4, 3\]"),
    ({"indices": torch.zeros(4, 2, device=META).long()}, ValueError, "indices is on meta"),
    *INDICES,
]
BAD: dict[str, list[tuple[Arguments, type[Exception], str]]] = {
    "topk": [
        *SETTINGS,
        ({"k": 0}, ValueError, r"k=0 must lie in 1\.\.9"),
        ({"k": 10}, ValueError, r"k=10 must lie in 1\.\.9"),
        ({"scores": torch.ones(4, 9).long()}, TypeError, "scores has dtype torch.int64"),
        ({"scores": torch.ones(())}, ValueError, "at least one dimension"),
        ({"boost": torch.ones(9).half()}, TypeError, "boost has dtype torch.float16"),
        ({"boost": torch.ones(8)}, ValueError, r"boost has shape \[8\]"),
        ({"boost": torch.ones(9, device=META)}, ValueError, "boost is on meta"),
        ({"mask": torch.ones(9)}, TypeError, "mask has dtype torch.float32"),
        ({"mask": torch.ones(8).bool()}, ValueError, r"mask has shape \[8\]"),
        ({"mask": torch.ones(9, device=META).bool()}, ValueError, "mask is on meta"),
    ],
    "linear_topk": LAYER,
    "linear_inhibit": [*LAYER, *GABA],
    "linear_active": ACTIVE,
    "linear_code": [
        *GRADED,
        ({"width": 2.5}, TypeError, r"width=2\.5 must be an integer"),
        ({"width": True}, TypeError, "width=True must be an integer"),
        ({"width": 10}, ValueError, r"width=10 must lie in 2\.\.9"),
    ],
    "distill": [
        ({"labels": torch.full((4,), -100)}, ValueError, r"labels run from -100 to -100, .*0\.\.2"),
        ({"labels": torch.full((4,), 3)}, ValueError, r"labels run from 3 to 3, expected 0\.\.2"),
        ({"labels": torch.zeros(4, device=META).long()}, ValueError, "labels is on meta"),
        ({"labels": torch.zeros(4).int()}, TypeError, "labels have dtype torch.int32"),
        ({"target_hidden": torch.ones(4, 2).half()}, TypeError, "target_hidden has dtype"),
        ({"target_hidden": torch.ones(4, 2, device=META)}, ValueError, "target_hidden is on meta"),
        ({"target_hidden": torch.ones(4, 1)}, ValueError, r"target_hidden has shape \[4, 1\]"),
        ({"target_logits": torch.ones(4, 1)}, ValueError, r"target_logits has shape \[4, 1\]"),
        ({"columns": torch.ones(4, 3, device=META).bool()}, ValueError, "columns is on meta"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \[3\], expected \[4\]"),
        ({"weight": torch.ones(4, device=META)}, ValueError, "weight is on meta"),
        ({"alpha": torch.ones(3)}, ValueError, r"alpha has shape \[3\], expected \[4\]"),
        ({"lam": torch.ones(4, 1)}, ValueError, r"lam has shape \[4, 1\], expected \[4\]"),
        ({"temperature": torch.ones(4, device=META)}, ValueError, "temperature is on meta"),
        ({"temperature": 0.0}, ValueError, r"temperature=0\.0 must be finite and above 0"),
        ({"temperature": -1}, ValueError, "temperature=-1 must be finite and above 0"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan must be finite and at least 0"),
        ({"alpha": True}, TypeError, "alpha=True must be a number"),
        ({"lam": "1"}, TypeError, "lam='1' must be a number"),
    ],
    "sparse_linear": [
        *CODE,
        ({"values": torch.ones(4, 2).long()}, TypeError, "values has dtype torch.int64"),
        ({"weight": torch.ones(9, 3).half()}, TypeError, "weight has dtype torch.float16"),
        ({"weight": torch.ones(9)}, ValueError, r"weight has shape \[9\], expected \[R, C\]"),
        ({"weight": torch.ones(9, 3, device=META)}, ValueError, "weight is on meta"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \[4\], expected \[3\]"),
        ({"bias": torch.ones(3).half()}, TypeError, "bias has dtype torch.float16"),
    ],
    "code_gram": [
        *CODE,
        ({"values": torch.ones(4, 2).long()}, TypeError, "values has dtype torch.int64"),
        (
            {"values": torch.ones(2), "indices": torch.ones(2).long()},
            ValueError,
            r"indices have shape \[2\], expected \[B, K\]",
        ),
        ({"indices": torch.full((4, 2), 9)}, ValueError, r"from 9 to 9, expected 0\.\.8"),
        ({"indices": torch.full((4, 2), -1)}, ValueError, r"from -1 to -1, expected 0\.\.8"),
        ({"gram": torch.ones(9, 8)}, ValueError, r"gram has shape \[9, 8\], expected \[R, R\]"),
        ({"gram": torch.ones(9, 9).half()}, TypeError, "gram has dtype torch.float16"),
        ({"gram": torch.ones(9, 18)[:, ::2]}, ValueError, "gram with strides"),
        ({"gram": torch.ones(9, 9, device=META)}, ValueError, "gram is on meta"),
        ({"cross": None}, ValueError, "cross and targets must be given together"),
        ({"targets": None}, ValueError, "cross and targets must be given together"),
        ({"cross": torch.ones(8, 3)}, ValueError, r"cross has shape \[8, 3\], expected \[9, C\]"),
        ({"cross": torch.ones(9, 3).double()}, TypeError, "cross has dtype torch.float64"),
        ({"cross": torch.ones(9, 3, device=META)}, ValueError, "cross is on meta"),
        ({"cross": torch.ones(3, 9).T}, ValueError, "cross with strides"),
        ({"targets": torch.ones(4).int()}, TypeError, "labels have dtype torch.int32"),
        ({"targets": torch.ones(5).long()}, ValueError, r"targets has shape \[5\]"),
        ({"targets": torch.full((4,), 3)}, ValueError, r"labels run from 3 to 3, expected 0\.\.2"),
        ({"targets": torch.ones(4)}, ValueError, r"targets has shape \[4\], expected \[4, 3\]"),
        ({"targets": torch.ones(4, 2)}, ValueError, r"targets has shape \[4, 2\]"),
        ({"targets": torch.ones(4, 3).long()}, TypeError, "targets has dtype torch.int64"),
        ({"targets": torch.ones(4, 3, device=META)}, ValueError, "targets is on meta"),
    ],
    "count_active": [
        *CODE,
        ({"counts": torch.zeros(9)}, TypeError, "counts has dtype torch.float32"),
        ({"counts": torch.zeros(9, device=META).long()}, ValueError, "counts is on meta"),
        ({"counts": torch.zeros(()).long()}, ValueError, r"counts has shape \[\]"),
        ({"step": 2.5}, TypeError, r"step=2\.5 must be an integer"),
        ({"step": True}, TypeError, "step=True must be an integer"),
        ({"step": torch.tensor(2.5)}, TypeError, "step has dtype torch.float32"),
        ({"step": torch.ones(1).long()}, TypeError, r"step has dtype torch.int64 and shape \[1\]"),
        ({"last_active": torch.zeros(9)}, TypeError, "last_active has dtype torch.float32"),
        ({"last_active": torch.zeros(8).long()}, ValueError, r"last_active has shape \[8\]"),
    ],
    "row_update": [
        ({"weights": []}, ValueError, "weights is empty"),
        ({"weights": [torch.rand(9, 5)]}, ValueError, "2 coefficients for 1 weights"),
        ({"normalize": [True]}, ValueError, "1 normalize for 2 weights"),
        ({"buffers": None}, ValueError, "momentum=0.9 and buffers must be given together"),
        ({"momentum": 0.0}, ValueError, "momentum=0.0 and buffers must be given together"),
        *CODE,
        ({"blocks": True}, TypeError, "blocks=True must be an integer"),
        ({"lr": torch.ones(1, device=META)}, ValueError, "lr is on meta"),
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
            {"buffers": [torch.rand(9, 5), torch.rand(9, 3, device=META)]},
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
            {"inputs": [torch.rand(4, 5, device=META), torch.rand(4, 3)]},
            ValueError,
            "inputs is on meta",
        ),
        (
            {"buffers": [torch.rand(9, 5), torch.rand(9, 4)]},
            ValueError,
            r"buffers\[1\] has shape \[9, 4\]",
        ),
    ],
}
GRID = [
    pytest.param(op, *bad, id=f"{op}-{number}-{next(iter(bad[0]))}")
    for op, cases in BAD.items()
    for number, bad in enumerate(cases)
]


def tensors(arguments: Arguments) -> list[Tensor]:
    values = [v for a in arguments.values() for v in (a if isinstance(a, list) else [a])]
    return [v for v in values if isinstance(v, Tensor) and not v.is_meta]


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(("op", "wrong", "error", "message"), GRID)
def test_refused(
    op: str, wrong: Arguments, error: type[Exception], message: str, impl: str | None
) -> None:
    arguments = GOOD[op]() | wrong | {"impl": impl}
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(error, match=message) as raised:
        getattr(sk, op)(**arguments)
    assert str(raised.value).startswith(f"{op}: ")
    for after, original in zip(tensors(arguments), before, strict=True):
        torch.testing.assert_close(after, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", GOOD)
def test_the_same_arguments_without_the_fault_are_served(op: str) -> None:
    getattr(sk, op)(**GOOD[op]())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", [op for op in GOOD if "indices" in GOOD[op]()])
def test_indices_on_a_gpu_are_looked_at_on_request(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSD_KERNELS_CHECK_INDICES", "1")
    given = GOOD[op]() | {"indices": torch.full((4, 2), -1)}
    moved = {
        name: [t.cuda() for t in a] if name in ("weights", "coefficients", "inputs", "buffers")
        and isinstance(a, list) else a.cuda() if isinstance(a, Tensor) else a
        for name, a in given.items()
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{op}: indices run from -1 to -1"):
        getattr(sk, op)(**moved)


@pytest.mark.parametrize("op", GOOD)
def test_unknown_implementation(op: str) -> None:
    arguments = GOOD[op]()
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(ValueError, match=rf"{op}: impl='magic' is not one of .*reference"):
        getattr(sk, op)(**arguments, impl="magic")
    for after, original in zip(tensors(arguments), before, strict=True):
        torch.testing.assert_close(after, original, rtol=0, atol=0, equal_nan=True)
