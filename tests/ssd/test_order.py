"""The counter-based order of samples."""

import torch

from ssd.data import _mix, shuffled


def test_it_is_splitmix64() -> None:
    """The first outputs of the generator seeded with 0, from its authors' reference code."""
    increment = 0x9E3779B97F4A7C15
    outputs = [_mix(i * increment) for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_every_part_of_the_key_matters_and_every_sample_comes_once() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)]
    orders = [tuple(shuffled(50, *key).tolist()) for key in keys]
    assert len(set(orders)) == len(keys)
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert shuffled(50, 0, 1).tolist() == list(orders[1])


def test_orders_are_fair() -> None:
    """Where sample 0 comes: uniform over 8 places, chi-squared with 7 degrees of freedom."""
    places = torch.stack([shuffled(8, 5, key) for key in range(4000)]).eq(0).double().sum(0)
    statistic = ((places - 500) ** 2 / 500).sum()
    assert statistic < 24.3  # exceeded once in a thousand


def test_the_tensor_and_the_integer_arithmetic_agree() -> None:
    from ssd.data import INCREMENT, _mix_tensor, _signed

    counters = [0, 1, 2, 12345, 2**40]
    ours = _mix_tensor(torch.tensor(counters) * _signed(INCREMENT))
    assert [v % 2**64 for v in ours.tolist()] == [_mix(c * INCREMENT) for c in counters]


def test_empty_and_single() -> None:
    assert shuffled(0, 1).tolist() == []
    assert shuffled(1, 1).tolist() == [0]
