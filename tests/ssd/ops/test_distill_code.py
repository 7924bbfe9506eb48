"""distill_code: all that it returns against autograd through the specification in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssd.ops import reference
from ssd.ops.distill import HIDDEN_LOSSES, distill
from ssd.ops.distill_code import CodeLoss, distill_code
from ssd_kernels import _dispatch
from tests.kernels.conftest import NUMBA, triton_only
from tests.ssd.ops.test_distill import cast

IMPLS = ["reference", "torch", *NUMBA, triton_only("triton")]
NEURONS = 30
SETTINGS: dict[str, Any] = {"alpha": 0.6, "lam": 0.3, "temperature": 2.0}


def problem(
    batch: int, slots: int, classes: int, units: int, device: str, teacher: bool = True
) -> dict[str, Any]:
    """Some values are 0, at neurons that the sample names elsewhere; few are negative."""
    neurons = max(NEURONS, slots, units)
    indices = torch.rand(batch, neurons, device=device).argsort(1)[:, :slots].contiguous()
    values = torch.rand(batch, slots, device=device)
    values[torch.rand(batch, slots, device=device) < 0.2] = 0
    indices[:, 0] = torch.where(values[:, 0] == 0, indices[:, -1], indices[:, 0])
    values[0, -1] = -0.5
    given: dict[str, Any] = {
        "values": values,
        "indices": indices,
        "decoder": torch.randn(neurons, classes, device=device),
        "labels": torch.randint(classes, (batch,), device=device),
    }
    if teacher:
        given["target_logits"] = torch.randn(batch, classes, device=device)
    if units:
        given["target_hidden"] = torch.rand(batch, units, device=device)
        positions = torch.full((neurons,), units, device=device)
        chosen = torch.randperm(neurons, device=device)[:units].sort().values
        positions[chosen] = torch.arange(units, device=device)
        given["positions"] = positions
    return given


def truth(given: dict[str, Any], **options: Any) -> CodeLoss:
    """In fp64, slot by slot, without an index into a row that no value needs."""
    weight = options.pop("weight", None)
    values, indices = given["values"].double().requires_grad_(), given["indices"]
    decoder = given["decoder"].double()
    dense = values.new_zeros(len(values), len(decoder)).scatter_add(1, indices, values)
    logits = dense @ decoder
    hidden, targets = None, [given.get("target_logits"), given.get("target_hidden")]
    if targets[1] is not None:
        units = targets[1].shape[1]
        chosen = torch.stack([(given["positions"] == n).nonzero()[0, 0] for n in range(units)])
        hidden = dense[:, chosen]
    logit, taught = (None if t is None else t.double() for t in targets)
    loss = reference.distill(logits, given["labels"], logit, hidden, taught, **cast(options))
    total = (loss * (1.0 if weight is None else weight.double())).sum()
    grad_logits, grad_values = torch.autograd.grad(total, [logits, values])
    return CodeLoss(logits.detach(), loss.detach(), grad_logits, grad_values * (values > 0))


def check(given: dict[str, Any], impl: str, **options: Any) -> None:
    got = distill_code(**given, **options, impl=impl)
    for name, ours, exact in zip(CodeLoss._fields, got, truth(given, **options), strict=True):
        assert ours.dtype == given["values"].dtype, name
        torch.testing.assert_close(
            ours.double(),
            exact,
            rtol=2e-5,
            atol=2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("units", [0, 1, 12])
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_close_to_fp64(units: int, hidden_loss: str, kl: str, impl: str, device: str) -> None:
    options = {"kl": kl, "hidden_loss": hidden_loss, "hidden_weight": 1.5}
    check(problem(7, 9, 10, units, device), impl, **SETTINGS, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("units", [0, 5])
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_exact_in_fp64(units: int, hidden_loss: str, impl: str, device: str) -> None:
    given = cast(problem(7, 9, 10, units, device))
    options = SETTINGS | {"hidden_loss": hidden_loss, "hidden_weight": 30.0}
    got = distill_code(**given, **options, impl=impl)
    for ours, exact in zip(got, truth(given, **options), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("slots", "classes", "units"),
    [(1, 1, 1), (40, 10, 40), (300, 10, 33), (17, 100, 3), (3, 300, 2), (5, 2, 2500)],
)
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_sizes(
    slots: int, classes: int, units: int, hidden_loss: str, impl: str, device: str
) -> None:
    check(problem(3, slots, classes, units, device), impl, **SETTINGS, hidden_loss=hidden_loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("teacher", [True, False])
def test_settings_and_a_weight_of_each_sample(teacher: bool, impl: str, device: str) -> None:
    given = problem(6, 9, 5, 4, device, teacher)
    options = {name: torch.rand(6, device=device) for name in ("alpha", "lam", "weight")}
    options["weight"][2] = 0
    check(given, impl, **options, temperature=1 + torch.rand(6, device=device))
    squares = {"hidden_loss": "mse", "hidden_weight": 9 * torch.rand(6, device=device)}
    check(given, impl, **options, **squares, temperature=2.0)
    check(given, impl, alpha=options["alpha"], lam=0.3, temperature=2.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_some_columns(impl: str, device: str) -> None:
    columns = torch.rand(6, 9, device=device) < 0.4
    columns[:, 4] = True
    check(problem(6, 8, 9, 4, device), impl, **SETTINGS, columns=columns)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_that_is_none(impl: str, device: str) -> None:
    given = problem(4, 6, 5, 3, device)
    for name in ("values", "indices", "labels", "target_logits", "target_hidden"):
        given[name][1] = 0
    weight = torch.tensor([0.5, 0.0, 0.5, 1.0], device=device)
    output = distill_code(**given, **SETTINGS, weight=weight, impl=impl)
    assert not output.logits[1].any()
    assert not output.grad_logits[1].any()
    assert not output.grad_values[1].any()
    check(given, impl, **SETTINGS, weight=weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_empty(impl: str, device: str) -> None:
    given = problem(6, 7, 5, 4, device)
    turned = {
        n: t.mT.contiguous().mT if t.dim() == 2 else t.repeat_interleave(2)[::2]
        for n, t in given.items()
    }
    check(turned, impl, **SETTINGS)
    for batch, slots in ((0, 7), (6, 0)):
        part = given | {n: t[:batch] for n, t in given.items() if n not in ("decoder", "positions")}
        part |= {n: part[n][:, :slots] for n in ("values", "indices")}
        output = distill_code(**part, **SETTINGS, impl=impl)
        shapes = [tuple(t.shape) for t in output]
        assert shapes == [(batch, 5), (batch,), (batch, 5), (batch, slots)]
        assert not output.logits.any()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype, impl: str) -> None:
    given = cast(problem(7, 9, 10, 5, "cpu"), dtype)
    near = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    got = distill_code(**given, **SETTINGS, impl=impl)
    for ours, exact in zip(got, truth(given, **SETTINGS), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, **near)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_same_bits_every_time(impl: str, device: str) -> None:
    given = problem(8, 40, 10, 12, device)
    first, second = (distill_code(**given, **SETTINGS, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed")
def test_other_dtypes_and_wide_rows_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    table = _dispatch.TABLES["distill_code"]
    for name in ("torch", "triton"):
        monkeypatch.setitem(table, name, lambda *_, name=name, **__: served.append(name))
    given = problem(3, 5, 10, 4, "cpu")
    for change in (
        {},
        {"values": given["values"].double()},
        {"decoder": torch.randn(NEURONS, 5000)},
        {"target_hidden": torch.randn(3, 5000)},
    ):
        distill_code(**given | change, **SETTINGS, impl="triton")
    assert served == ["triton", "torch", "torch", "torch"]


def test_what_distill_refuses() -> None:
    given = problem(3, 5, 10, 4, "cpu")
    for change, message in (
        ({"labels": torch.full((3,), 10)}, "labels run from"),
        ({"target_logits": torch.zeros(3, 9)}, "target_logits has shape"),
        ({"kl": "sideways"}, "sideways"),
        ({"positions": None}, "together"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_code(**given | change, **SETTINGS, impl="torch")


@pytest.mark.skipif(not _dispatch.NUMBA, reason="numba is not installed")
def test_what_the_loops_refuse() -> None:
    """They read whatever lies where an index points."""
    given = problem(3, 5, 10, 4, "cpu")
    for change, message in (
        ({"labels": torch.full((3,), 10)}, r"labels run from 10 to 10, expected 0\.\.9"),
        ({"labels": torch.full((3,), -1)}, "labels run from -1"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "labels has shape"),
        ({"indices": torch.full((3, 5), 10**9)}, r"indices run from .*, expected 0\.\.29"),
        ({"indices": torch.full((3, 5), -1)}, "indices run from -1"),
        ({"indices": torch.zeros(3, 6, dtype=torch.int64)}, "indices has shape"),
        ({"target_logits": torch.zeros(3, 9)}, "target_logits has shape"),
        ({"target_hidden": torch.zeros(2, 4)}, "target_hidden has shape"),
        ({"positions": torch.zeros(29, dtype=torch.int64)}, "positions has shape"),
        ({"positions": None}, "together"),
        ({"columns": torch.ones(3, 9, dtype=torch.bool)}, "columns has shape"),
        ({"weight": torch.ones(2)}, "weight has shape"),
    ):
        with pytest.raises(ValueError, match=f"distill_code: .*{message}"):
            distill_code(**given | change, **SETTINGS, impl="numba")


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_distill_of_the_logits(impl: str, device: str) -> None:
    given = problem(5, 6, 4, 0, device)
    output = distill_code(**given, **SETTINGS, impl=impl)
    expected = distill(
        output.logits, given["labels"], given["target_logits"], **SETTINGS, impl=impl
    )
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.grad_logits, expected.grad_logits)
