"""distill: loss and gradients against autograd through the specification in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssd.ops import reference
from ssd.ops.distill import HIDDEN_LOSSES, distill
from tests.kernels.conftest import INTERPRETED, NUMBA, triton_only

FAST = ["torch", *NUMBA, triton_only("triton")]
IMPLS = ["reference", *FAST]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def problem(
    batch: int, classes: int, units: int, device: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs already rounded to dtype, so that fp64 sees the same numbers."""

    def draw(size: int) -> Tensor:
        return (3 * torch.randn(batch, size, device=device)).to(dtype)

    return {
        "logits": draw(classes),
        "labels": torch.randint(classes, (batch,), device=device),
        "target_logits": draw(classes),
        "hidden": draw(units).relu(),
        "target_hidden": draw(units).relu(),
    }


def cast(given: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The floating tensors in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def truth(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    wide, options = cast(inputs), cast(options)
    for name in ("logits", "hidden"):
        if name in wide:
            wide[name].requires_grad_()
    loss = reference.distill(**wide, **options)
    leaves = [wide[n] for n in ("logits", "hidden") if n in wide]
    gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), *gradients


def check(inputs: dict[str, Tensor], impl: str, **options: Any) -> None:
    output = distill(**inputs, impl=impl, **options)
    scale = 8.0  # terms are multiplied by T^2
    epsilon = 16 * scale * torch.finfo(inputs["logits"].dtype).eps
    got = [t for t in output if t is not None]
    for ours, exact in zip(got, truth(inputs, **options), strict=True):
        assert ours.dtype == inputs["logits"].dtype
        torch.testing.assert_close(ours.double(), exact, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_close_to_fp64(
    impl: str, dtype: torch.dtype, kl: str, hidden_loss: str, device: str
) -> None:
    inputs = problem(7, 10, 13, device, dtype)
    hidden = {"hidden_loss": hidden_loss, "hidden_weight": 0.75}
    check(inputs, impl, alpha=0.7, lam=0.25, temperature=2.0, kl=kl, **hidden)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_exact_in_fp64(impl: str, hidden_loss: str, device: str) -> None:
    inputs = cast(problem(7, 10, 13, device))
    options: dict[str, Any] = {"alpha": 0.7, "lam": 0.1, "temperature": 8.0}
    options |= {"hidden_loss": hidden_loss, "hidden_weight": 30.0}
    output = distill(**inputs, impl=impl, **options)
    for ours, exact in zip(output, truth(inputs, **options), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_squared_error_by_hand(impl: str, device: str) -> None:
    """(1 - alpha) lam weight sum (h_s - h_t)^2; no mean, and no temperature."""
    given = {
        "logits": torch.zeros(1, 2, device=device),
        "labels": torch.zeros(1, dtype=torch.int64, device=device),
        "target_logits": torch.zeros(1, 2, device=device),
        "hidden": torch.tensor([[1.0, 0.0, 3.0]], device=device),
        "target_hidden": torch.tensor([[0.5, 2.0, 3.0]], device=device),
    }
    options: dict[str, Any] = {"alpha": 0.5, "lam": 0.5, "temperature": 7.0, "hidden_weight": 4.0}
    loss, _, slopes = distill(**given, **options, hidden_loss="mse", impl=impl)
    entropy = 0.5 * torch.tensor(2.0).log().item()
    assert loss.item() == pytest.approx(entropy + 0.25 + 4.0)
    assert slopes is not None
    assert slopes.tolist() == [[1.0, -4.0, 0.0]]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("classes", "units"), [(2, 1), (10, 40), (100, 3), (3, 3000), (16, 16)])
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_widths(impl: str, hidden_loss: str, classes: int, units: int, device: str) -> None:
    options: dict[str, Any] = {"alpha": 0.5, "lam": 0.5, "temperature": 3.0}
    check(problem(5, classes, units, device), impl, hidden_loss=hidden_loss, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_some_columns(impl: str, kl: str, device: str) -> None:
    columns = torch.rand(6, 9, device=device) < 0.4
    columns[:, 4] = True
    columns[0] = columns[0].new_tensor([False] * 4 + [True] + [False] * 4)  # one column: no term
    options: dict[str, Any] = {"alpha": 0.5, "lam": 0.2, "temperature": 2.0, "kl": kl}
    check(problem(6, 9, 4, device), impl, columns=columns, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hidden_loss", HIDDEN_LOSSES)
def test_settings_of_each_sample(impl: str, hidden_loss: str, device: str) -> None:
    inputs = problem(6, 5, 4, device)
    options = {
        "alpha": torch.rand(6, device=device),
        "lam": torch.rand(6, device=device),
        "temperature": 1 + torch.rand(6, device=device),
        "hidden_weight": 5 * torch.rand(6, device=device),
    }
    check(inputs, impl, **options, hidden_loss=hidden_loss)
    row = {name: tensor[2:3] for name, tensor in inputs.items()}
    numbers = {name: tensor[2].item() for name, tensor in options.items()}
    alone = distill(**row, **numbers, hidden_loss=hidden_loss, impl=impl)
    together = distill(**inputs, impl=impl, **options, hidden_loss=hidden_loss)
    for one, all_ in zip(alone, together, strict=True):
        torch.testing.assert_close(one, all_[2:3])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("each", [True, False])
def test_a_weight_multiplies_gradients_alone(impl: str, each: bool, device: str) -> None:
    inputs = problem(6, 5, 4, device)
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.25, 0.0], device=device)
    alpha = torch.rand(6, device=device) if each else 0.5
    options: dict[str, Any] = {"alpha": alpha, "lam": 0.5, "temperature": 2.0, "impl": impl}
    for given in (inputs, inputs | {"target_logits": None}):
        plain = distill(**given, **options)
        loss, *gradients = distill(**given, **options, weight=weight)
        assert torch.equal(loss, plain.loss)
        for ours, unweighted in zip(gradients, plain[1:], strict=True):
            torch.testing.assert_close(ours, unweighted * weight.unsqueeze(1))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_teacher_or_hidden(impl: str, device: str) -> None:
    inputs = problem(6, 5, 4, device)
    bare = {n: inputs[n] for n in ("logits", "labels")}
    output = distill(**bare, impl=impl, alpha=0.3)
    assert output.grad_hidden is None
    for ours, exact in zip(output, truth(bare), strict=False):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    taught = bare | {"target_logits": inputs["target_logits"]}
    check(taught, impl, alpha=0.3, lam=0.1, temperature=4.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_empty_batch(impl: str, device: str) -> None:
    inputs = problem(6, 5, 4, device)
    strided = {
        n: t.repeat_interleave(2, -1)[..., ::2] if t.is_floating_point() else t
        for n, t in inputs.items()
    }
    assert not strided["logits"].is_contiguous()
    check(strided, impl, alpha=0.5, lam=0.1, temperature=2.0)
    turned = {n: t.mT.contiguous().mT if t.dim() == 2 else t for n, t in inputs.items()}
    check(turned, impl, alpha=0.5, lam=0.1, temperature=2.0)
    empty = distill(**{n: t[:0] for n, t in inputs.items()}, impl=impl, alpha=0.5, lam=0.1)
    assert [tuple(t.shape) for t in empty if t is not None] == [(0,), (0, 5), (0, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels have|labels has"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "int64"),
        ({"target_logits": torch.zeros(6, 4)}, "target_logits"),
        ({"target_hidden": None}, "together"),
        ({"hidden": torch.zeros(6, 3)}, "target_hidden"),
        ({"kl": "backward"}, "backward"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' is not one of kl, mse"),
        ({"hidden_weight": -1.0}, r"hidden_weight=-1\.0 must be finite and at least 0"),
        ({"columns": torch.zeros(6, 5)}, "torch.bool"),
    ],
)
def test_errors_come_first(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = problem(6, 5, 4, "cpu")
    with pytest.raises((TypeError, ValueError), match=message):
        distill(**(inputs | change))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_a_class_without_probability_adds_nothing(kl: str, impl: str, device: str) -> None:
    """0 log 0 is 0: a logit of -inf in both, or where the weight of the divergence is."""
    least = -torch.inf
    full = torch.tensor([[0.5, 1.0, -3.0], [1.0, 0.0, -2.0]], device=device)
    cut = torch.tensor([[0.0, 1.0, least], [0.3, 0.1, least]], device=device)
    labels = torch.tensor([0, 1], device=device)
    student, teacher = (cut, full) if kl == "reverse" else (full, cut)
    options: dict[str, Any] = {"alpha": 0.5, "temperature": 2.0, "kl": kl, "impl": impl}
    for a, b in ((student, teacher), (cut, cut.flip(0))):
        loss, gradient, _ = distill(a, labels, b, **options)
        p, q = ((t.double() / 2).log_softmax(1) for t in (a, b))
        p, q = (q, p) if kl == "forward" else (p, q)
        terms = torch.where(p.exp() == 0, 0.0, p.exp() * (p - q))
        entropy = torch.nn.functional.cross_entropy(a.double(), labels, reduction="none")
        torch.testing.assert_close(loss, (0.5 * entropy + 0.5 * 4 * terms.sum(1)).float())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_not_what_temperature_magnifies(impl: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(64, 10)).to(dtype)
    target = (logits + 0.1 * torch.randn(64, 10)).to(dtype)
    labels = torch.zeros(64, dtype=torch.int64)
    options: dict[str, Any] = {"alpha": 0.0, "temperature": 8.0}
    got = distill(logits, labels, target, impl=impl, **options)
    want = distill(logits.double(), labels, target.double(), impl="reference", **options)
    assert bool((got.loss >= 0).all())
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    torch.testing.assert_close(got.loss.double(), want.loss, **near)
    torch.testing.assert_close(got.grad_logits.double(), want.grad_logits, **near)


@pytest.mark.parametrize("impl", IMPLS)
def test_settings_may_be_tensors_of_no_dimension(impl: str, device: str) -> None:
    logits, target = torch.randn(2, 4, 3, device=device)
    labels = torch.tensor([0, 1, 2, 0], device=device)
    numbers: dict[str, Any] = {"alpha": 0.5, "lam": 0.25, "temperature": 2.0, "hidden_weight": 3.0}
    tensors = {name: torch.tensor(value, device=device) for name, value in numbers.items()}
    given = (logits, labels, target, logits, target)
    got, want = distill(*given, **tensors, impl=impl), distill(*given, **numbers, impl=impl)
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have, expected)
