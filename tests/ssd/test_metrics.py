"""The measures on matrices worked out by hand."""

import math

import pytest
import torch

from ssd import metrics

ACCURACY = torch.tensor([[0.9, 0.0, 0.1], [0.6, 0.8, 0.0], [0.5, 0.2, 0.7]], dtype=torch.float64)


def test_mean_accuracy_is_that_of_the_last_row() -> None:
    assert metrics.mean_accuracy(ACCURACY) == pytest.approx((0.5 + 0.2 + 0.7) / 3)


def test_backward_transfer() -> None:
    assert metrics.backward_transfer(ACCURACY) == pytest.approx(((0.5 - 0.9) + (0.2 - 0.8)) / 2)


def test_forgetting_looks_for_the_best_earlier_row() -> None:
    matrix = ACCURACY.clone()
    matrix[1, 0] = 0.95
    assert metrics.forgetting(matrix) == pytest.approx(((0.95 - 0.5) + (0.8 - 0.2)) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    single = torch.tensor([[0.7]])
    assert metrics.backward_transfer(single) == metrics.forgetting(single) == 0


def test_entropy_in_bits() -> None:
    entropy = metrics.activation_entropy(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    quarter = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert entropy.tolist() == pytest.approx([0.0, 1.0, 0.0, quarter])


def test_dead_fraction() -> None:
    assert metrics.dead_fraction(torch.tensor([0.0, 0.1, 0.0, 1.0])) == 0.5
