"""linear_active: the neurons that fire somewhere in a batch, dense among them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssd_kernels import reference
from ssd_kernels._graded_code import ActiveNeurons, Scratch, linear_active
from tests.kernels.conftest import NUMBA

IMPLS = ["torch", "reference", *NUMBA]


def layer(batch: int, features: int, neurons: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = torch.randn(batch, features, dtype=dtype)
    weight = torch.randn(neurons, features, dtype=dtype)
    return x, weight, torch.rand(neurons, dtype=dtype) * 0.5 + 0.5


def dense(active: ActiveNeurons, neurons: int, what: str = "values") -> Tensor:
    part = getattr(active, what)
    if active.neurons is None:
        return part
    return part.new_zeros(len(part), neurons).index_copy_(1, active.neurons, part)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inhibition", ["subtract", "mask"])
@pytest.mark.parametrize("graded", [None, "inhibited", "excited"])
@pytest.mark.parametrize(
    ("batch", "neurons", "k"),
    [(5, 63, 3), (1, 16, 16), (7, 17, 16), (3, 1000, 10), (128, 33, 1), (9, 3001, 10)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_dense_layer(
    batch: int,
    neurons: int,
    k: int,
    graded: str | None,
    inhibition: str,
    impl: str,
    dtype: torch.dtype,
) -> None:
    x, weight, gaba = layer(batch, 12, neurons, dtype)
    if graded == "excited":
        gaba = 2 * gaba.flip(0) - 1.5
    gaba_or_none = gaba if graded else None
    counts = torch.zeros(neurons, dtype=torch.int64)
    active = linear_active(
        x, weight, k, gaba_or_none, inhibition=inhibition, counts=counts, impl=impl
    )
    expected = reference.linear_inhibit(
        x.double(), weight.double(), k, gaba.double() if graded else None, inhibition=inhibition
    )
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert (dense(active, neurons) - expected).abs().max() <= tolerance
    assert active.values.dtype == dtype
    if active.neurons is not None:
        assert (active.neurons.diff() > 0).all()
        assert ((active.values > 0).any(0)).all()
    passes = (dense(active, neurons) > 0) & (x.double() @ weight.double().T > tolerance)
    assert (dense(active, neurons, "gate") > 0)[passes].all()
    if dtype == torch.float64:
        assert torch.equal(dense(active, neurons, "gate") > 0, passes)
    assert torch.equal(counts, (dense(active, neurons) > 0).sum(0))
    if dtype == torch.float64:
        assert torch.equal(counts, (expected > 0).sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_that_no_short_mantissa_holds(dtype: torch.dtype) -> None:
    x, weight, counts = torch.ones(999, 4), torch.ones(20, 4), torch.zeros(20, dtype=torch.int64)
    linear_active(x.to(dtype), weight.to(dtype), 3, torch.full((20,), 0.5).to(dtype), counts=counts)
    assert (counts == 999).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 70) | st.integers(600, 900), st.data())
def test_any_shape_and_ties(batch: int, neurons: int, data: st.DataObject) -> None:
    """Small whole numbers: many equal scores, many at the inhibition, rows of zeros."""
    k = data.draw(st.integers(1, neurons if neurons <= 70 else 2))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randint(-2, 3, (batch, 3), generator=draw).double()
    weight = torch.randint(-2, 3, (neurons, 3), generator=draw).double()
    gaba = torch.tensor([0.25, 0.5, 1.0]).double()[torch.randint(3, (neurons,), generator=draw)]
    active = linear_active(x, weight, k, gaba)
    expected = reference.linear_inhibit(x, weight, k, gaba, inhibition="subtract")
    assert torch.equal(dense(active, neurons), expected)


def test_scratch_holds_nothing_that_matters() -> None:
    scratch = Scratch()
    for batch, neurons in ((9, 50), (4, 200), (9, 50)):
        x, weight, gaba = layer(batch, 8, neurons, torch.float32)
        for number in (0, 1, 2):
            scratch(number, x, 200 + 16, 9).fill_(torch.nan)
        active = linear_active(x, weight, 5, gaba, scratch=scratch)
        fresh = linear_active(x, weight, 5, gaba)
        assert torch.equal(active.values, fresh.values)
        assert torch.equal(dense(active, neurons), dense(fresh, neurons))


def test_not_a_number_is_seen() -> None:
    x, weight, gaba = layer(4, 8, 50, torch.float32)
    x[2, 3] = torch.nan
    for impl in IMPLS:
        active = linear_active(x, weight, 5, gaba, impl=impl)
        assert active.values[2].isnan().any()
        assert active.neurons is None or active.neurons.max() < 50
        assert not active.values[[0, 1, 3]].isnan().any()


def test_empty_batch_and_silence() -> None:
    _, weight, gaba = layer(1, 8, 50, torch.float32)
    assert linear_active(torch.zeros(0, 8), weight, 5, gaba).values.shape == (0, 0)
    assert linear_active(torch.zeros(3, 8), weight, 5, gaba).values.shape == (3, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_neuron_and_several_networks(impl: str) -> None:
    """As the step on CUDA takes it: all columns, networks side by side."""
    x, weight, gaba = layer(6, 8, 60, torch.float32)
    active = linear_active(x, weight, 3, gaba - 0.7, networks=2, impl=impl)
    for own in range(2):
        rows, part = slice(3 * own, 3 * own + 3), slice(30 * own, 30 * own + 30)
        alone = linear_active(x[rows], weight[part], 3, gaba[part] - 0.7, every=True, impl=impl)
        assert active.neurons is None
        assert alone.neurons is None
        torch.testing.assert_close(active.values[rows], alone.values)
        assert torch.equal(active.gate[rows] > 0, alone.gate > 0)
