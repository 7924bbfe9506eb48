"""Slots by neuron: the list for the torch path, the sorted form and the walk of the Triton path."""

from __future__ import annotations

import pytest
import torch

from ssd_kernels import _segments, reference
from ssd_kernels._segments import row_gradients, segments, sorted_slots
from tests.kernels.conftest import INTERPRETED, triton_only


def test_segments_by_hand() -> None:
    indices = torch.tensor([[4, 1], [1, 4], [1, 0]])
    kept = torch.tensor([[True, True], [False, True], [True, False]])
    group = segments(indices, kept)
    assert group.neurons.tolist() == [1, 4]
    assert group.offsets.tolist() == [0, 2]
    assert group.slots.tolist() == [1, 4, 0, 3]


def test_segments_of_nothing() -> None:
    group = segments(torch.tensor([[3]]), torch.tensor([[False]]))
    assert [len(field) for field in group] == [0, 0, 0]


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 30), (2, 150)])
@pytest.mark.parametrize("neurons", [1, 7, 2**31 - 1])
def test_ranking_is_a_stable_sort(
    impl: str, shape: tuple[int, int], neurons: int, device: str
) -> None:
    indices = torch.randint(neurons, shape, device=device)
    expected = indices.flatten().sort(stable=True)
    ranked, slots = sorted_slots(indices)
    assert torch.equal(ranked, expected.values)
    assert torch.equal(slots, expected.indices)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_many_slots_are_sorted_alike(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    indices = torch.randint(9, (20, 5), device=device)
    ranked = sorted_slots(indices)
    monkeypatch.setattr(_segments, "MAX_RANKED", 99)
    for few, many in zip(ranked, sorted_slots(indices), strict=True):
        assert torch.equal(few, many)


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("width", [1, 33, 300, 2054])
def test_row_gradients(impl: str, width: int, device: str) -> None:
    indices = torch.randint(6, (7, 5), device=device)
    coefficients = torch.randn(7, 5, device=device).relu()
    inputs = torch.randn(7, width, device=device)
    gradient, sums = row_gradients(coefficients, inputs, indices, 11, bias=True)
    exact = reference.row_gradient(coefficients.double(), inputs.double(), indices, 11)
    native = reference.row_gradient(coefficients, inputs, indices, 11)
    assert (gradient - exact).abs().max() <= (native - exact).abs().max() + 1e-6
    expected = torch.zeros(11, device=device, dtype=torch.float64).index_add_(
        0, indices.flatten(), coefficients.double().flatten()
    )
    torch.testing.assert_close(sums, expected.float())
    assert not gradient[6:].any()


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_row_gradients_repeat_bit_for_bit(impl: str, device: str) -> None:
    indices = torch.randint(3, (40, 4), device=device)
    coefficients, inputs = torch.randn(40, 4, device=device), torch.randn(40, 20, device=device)
    first, _ = row_gradients(coefficients, inputs, indices, 3)
    for _ in range(3 if INTERPRETED else 20):
        assert torch.equal(row_gradients(coefficients, inputs, indices, 3)[0], first)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_row_gradients_of_nothing(impl: str, device: str) -> None:
    empty = torch.zeros(0, 4, device=device)
    gradient, sums = row_gradients(empty, torch.zeros(0, 3, device=device), empty.long(), 5, True)
    assert torch.equal(gradient, torch.zeros(5, 3, device=device))
    assert torch.equal(sums, torch.zeros(5, device=device))
