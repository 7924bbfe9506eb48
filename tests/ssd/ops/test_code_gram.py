"""code_gram: the second moments of a sparse code, against the dense product in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssd.ops import reference
from ssd.ops.code_gram import code_gram
from tests.kernels.conftest import INTERPRETED, triton_only

IMPLS = ["torch", triton_only("triton")]


def problem(
    batch: int, slots: int, neurons: int, classes: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A code with distinct neurons of which some have value 0, and dense targets."""
    indices = torch.rand(batch, neurons, device=device).argsort(1)[:, :slots]
    values = torch.randn(batch, slots, device=device).relu()
    return values, indices, torch.randn(batch, classes, device=device)


def moments(
    values: Tensor, indices: Tensor, targets: Tensor, neurons: int, classes: int, impl: str | None
) -> tuple[Tensor, Tensor]:
    gram = values.new_ones(neurons, neurons)
    cross = values.new_full((neurons, classes), 2.0)
    if impl is None:
        reference.code_gram(values, indices, gram, cross, targets)
    else:
        code_gram(values, indices, gram, cross, targets, impl=impl)
    return gram, cross


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("batch", "slots", "neurons", "classes"),
    [(7, 5, 9, 3), (1, 1, 1, 1), (11, 3, 63, 40), (6, 33, 70, 2), (5, 4, 1000, 1), (0, 3, 5, 2)],
)
def test_equals_the_specification(
    impl: str, labels: bool, batch: int, slots: int, neurons: int, classes: int, device: str
) -> None:
    values, indices, targets = problem(batch, slots, neurons, classes, device)
    if labels:
        targets = torch.randint(classes, (batch,), device=device)
    wide = targets if labels else targets.double()
    found = moments(values, indices, targets, neurons, classes, impl)
    exact = moments(values.double(), indices, wide, neurons, classes, None)
    native = moments(values, indices, targets, neurons, classes, None)
    for got, true, plain in zip(found, exact, native, strict=True):
        assert (got - true).abs().max() <= (plain - true).abs().max() + 1e-6


def test_by_hand() -> None:
    gram, cross = torch.zeros(3, 3), torch.zeros(3, 2)
    values, indices = torch.tensor([[2.0, 3.0], [1.0, 0.0]]), torch.tensor([[0, 2], [2, 1]])
    code_gram(values, indices, gram, cross, torch.tensor([1, 0]))
    assert gram.tolist() == [[4, 0, 6], [0, 0, 0], [6, 0, 10]]
    assert cross.tolist() == [[0, 2], [0, 0], [1, 3]]


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_may_name_an_active_neuron(impl: str, device: str) -> None:
    values = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]], device=device)
    indices = torch.tensor([[1, 1, 1], [0, 0, 0]], device=device)
    gram = torch.zeros(2, 2, device=device)
    cross = torch.zeros(2, 1, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    code_gram(values, indices, gram, cross, labels, impl=impl)
    assert gram.tolist() == [[0, 0], [0, 4]]
    assert cross.tolist() == [[0], [2]]


@pytest.mark.parametrize("impl", IMPLS)
def test_float64_sums_of_narrow_values(impl: str, device: str) -> None:
    values, indices, targets = problem(9, 4, 12, 3, device)
    narrow = values.half()
    gram = torch.zeros(12, 12, dtype=torch.float64, device=device)
    cross = torch.zeros(12, 3, dtype=torch.float64, device=device)
    code_gram(narrow, indices, gram, cross, targets, impl=impl)
    exact = torch.zeros_like(gram), torch.zeros_like(cross)
    reference.code_gram(narrow.double(), indices, *exact, targets.double())
    torch.testing.assert_close((gram, cross), exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("chunk", [1, 100])
def test_every_way_of_the_torch_path(
    dense: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    module = import_module("ssd.ops.code_gram")
    monkeypatch.setattr(module, "SCATTER_COST", 10**9 if dense else 0)
    monkeypatch.setattr(module, "CHUNK", chunk)
    values, indices, targets = problem(13, 4, 20, 3, "cpu")
    values, targets = values.double(), targets.double()
    torch.testing.assert_close(
        moments(values, indices, targets, 20, 3, "torch"),
        moments(values, indices, targets, 20, 3, None),
    )


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4))
def test_any_shape(batch: int, slots: int, classes: int) -> None:
    values, indices, targets = problem(batch, slots, 7, classes, "cpu")
    torch.testing.assert_close(
        moments(values, indices, targets, 7, classes, "torch"),
        moments(values, indices, targets, 7, classes, None),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_are_bit_equal(impl: str, device: str) -> None:
    values, indices, targets = problem(30, 4, 6, 3, device)
    first = moments(values, indices, targets, 6, 3, impl)
    for _ in range(3 if INTERPRETED else 20):
        for got, want in zip(moments(values, indices, targets, 6, 3, impl), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_targets(impl: str, device: str) -> None:
    values, indices, targets = problem(8, 3, 10, 2, device)
    gram = torch.ones(10, 10, device=device)
    code_gram(values, indices, gram, impl=impl)
    assert torch.equal(gram, moments(values, indices, targets, 10, 2, impl)[0])
