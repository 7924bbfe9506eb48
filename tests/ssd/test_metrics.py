"""The measures on small cases worked out by hand."""

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


def test_used_fraction_counts_from_the_threshold_on() -> None:
    frequency = torch.tensor([2, 1, 0, 2000], dtype=torch.float64) / 2000
    assert metrics.used_fraction(frequency) == 0.5


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_effective_rank_of_one_hot_codes_is_their_number(scale: float) -> None:
    code = scale * torch.eye(12)[[7, 2, 2, 7, 5, 5]]  # [6, 12]
    assert metrics.effective_rank(code) == pytest.approx(3)
    assert metrics.effective_rank(code.T) == pytest.approx(3)


def test_effective_rank_weighs_the_singular_values() -> None:
    code = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics.effective_rank(code) == pytest.approx(math.exp(entropy))


def test_effective_rank_is_not_centred() -> None:
    assert metrics.effective_rank(torch.ones(5, 4)) == pytest.approx(1)


def test_effective_rank_of_degenerate_codes() -> None:
    assert metrics.effective_rank(torch.zeros(3, 4)) == 0
    assert math.isnan(metrics.effective_rank(torch.tensor([[1.0, math.nan]])))


@pytest.mark.parametrize(
    ("neurons", "others", "overlap"),
    [
        ([1, 4, 9], [1, 4, 9], 1),
        ([9, 1, 4], [1, 4, 9], 1),
        ([1, 4, 9], [0, 2, 3], 0),
        ([1, 4, 9], [4, 9, 10], 2 / 4),
        ([1], [0, 1, 2, 3], 1 / 4),
        ([], [1], 0),
        ([], [], 1),
    ],
)
def test_jaccard(neurons: list[int], others: list[int], overlap: float) -> None:
    a, b = (torch.tensor(n, dtype=torch.int64) for n in (neurons, others))
    assert metrics.jaccard(a, b) == metrics.jaccard(b, a) == pytest.approx(overlap)


def test_kl_divergence_of_equal_distributions_is_zero() -> None:
    frequency = torch.tensor([0.5, 0.0, 0.25])
    assert metrics.kl_divergence(frequency, frequency) == 0
    assert metrics.kl_divergence(frequency, frequency / 2) == pytest.approx(0, abs=1e-12)
    assert metrics.kl_divergence(torch.zeros(4), torch.ones(4)) == pytest.approx(0, abs=1e-12)


def test_kl_divergence_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    by_hand = 0.5 * math.log2(2) + 0.5 * math.log2(2 / 3)
    assert metrics.kl_divergence(p, q) == pytest.approx(by_hand, abs=1e-5)
    assert metrics.kl_divergence(q, p) == pytest.approx(
        0.25 * math.log2(0.5) + 0.75 * math.log2(1.5), abs=1e-5
    )


def test_kl_divergence_of_disjoint_neurons_is_that_of_the_smoothing() -> None:
    s = metrics.SMOOTHING
    high, low = (1 + s) / (1 + 2 * s), s / (1 + 2 * s)
    by_hand = (high - low) * math.log2(high / low)
    p, q = torch.tensor([0.3, 0.0]), torch.tensor([0.0, 0.7])
    assert metrics.kl_divergence(p, q) == pytest.approx(by_hand)


def test_address_cosine_is_of_the_means() -> None:
    addresses = torch.eye(4)[:2]  # mean (1, 1, 0, 0) / 2
    others = torch.eye(4)[1:3]  # mean (0, 1, 1, 0) / 2
    assert metrics.address_cosine(addresses, others) == pytest.approx(0.5)
    assert metrics.address_cosine(addresses, 7 * addresses) == pytest.approx(1)
    assert metrics.address_cosine(addresses, torch.zeros(3, 4)) == 0


def test_shared_address_cosine_pairs_each_neuron_with_itself() -> None:
    neurons, others = torch.tensor([2, 5, 8]), torch.tensor([5, 6, 8])
    addresses = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    other_addresses = torch.tensor([[0.0, 2.0], [1.0, 0.0], [4.0, 3.0]])
    cosine = metrics.shared_address_cosine(neurons, addresses, others, other_addresses)
    assert cosine.tolist() == pytest.approx([0, 24 / 25])  # neurons 5 and 8
    apart = metrics.shared_address_cosine(neurons, addresses, others + 10, other_addresses)
    assert apart.tolist() == []
