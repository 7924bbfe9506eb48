"""The network: constraints, schedules, and the sparse code of an almost k-sparse layer."""

import pytest
import torch

from ssd.sdmlp import SDMLP, AnnealedTopKLinear
from ssd_kernels import TopKOutput


def test_constraints_hold_from_the_start() -> None:
    model = SDMLP(20, 50, 4, 5, generator=torch.Generator().manual_seed(1))
    assert model.encoder.weight.min() == 0
    assert model.decoder.weight.min() >= 0
    torch.testing.assert_close(model.encoder.weight.norm(dim=1), torch.ones(50))


def test_an_all_zero_address_stays_zero() -> None:
    model = SDMLP(5, 8, 2, 3)
    with torch.no_grad():
        model.encoder.weight[3] = -1.0
    model.constrain()
    assert torch.equal(model.encoder.weight[3], torch.zeros(5))
    assert model.encoder.weight.isfinite().all()
    assert model(torch.zeros(2, 5)).isfinite().all()


def test_the_seed_decides_the_weights() -> None:
    def draw(seed: int) -> torch.Tensor:
        return SDMLP(7, 9, 3, 2, generator=torch.Generator().manual_seed(seed)).encoder.weight

    assert torch.equal(draw(4), draw(4))
    assert not torch.equal(draw(4), draw(5))


def test_input_is_rectified_and_normalised() -> None:
    address = SDMLP(3, 4, 2, 1).address(torch.tensor([[3.0, -5.0, 4.0], [-1.0, -1.0, -1.0]]))
    torch.testing.assert_close(address, torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 0.0]]))


def test_gaba_goes_from_excited_to_inhibited_and_only_in_training() -> None:
    layer = AnnealedTopKLinear(6, 20, 3, anneal_samples=40)
    x = torch.rand(10, 6) + 0.1
    with torch.no_grad():
        layer.weight.abs_()
    layer.eval()
    layer(x)
    assert layer.counts.sum() == 0
    assert layer.gaba().tolist() == [-1.0] * 20
    layer.train()
    hidden = layer(x)
    assert isinstance(hidden, torch.Tensor)
    assert (hidden > 0).all()  # every neuron is excited
    assert layer.gaba().tolist() == [-0.5] * 20
    layer.counts.fill_(40)
    assert layer.inhibited()
    assert isinstance(layer(x), TopKOutput)


def test_linear_schedule_lowers_k() -> None:
    layer = AnnealedTopKLinear(6, 21, 1, schedule="linear", anneal_samples=40)
    seen = []
    for _ in range(5):
        seen.append(layer.current_k())
        layer(torch.rand(10, 6))
    assert seen == [21, 16, 11, 6, 1]
    assert layer.inhibited()


def test_flat_schedule_is_sparse_at_once() -> None:
    layer = AnnealedTopKLinear(6, 20, 3, schedule="flat")
    assert layer(torch.rand(4, 6)).values.shape == (4, 3)


def test_sparse_code_of_stragglers_equals_the_dense_layer() -> None:
    """Neurons on their way to full inhibition fire beyond the k; the code is wider and exact."""
    layer = AnnealedTopKLinear(16, 400, 3, anneal_samples=100)
    with torch.no_grad():
        layer.weight.abs_()
    layer.counts.copy_(torch.randint(95, 101, (400,)))
    hidden = layer(torch.rand(12, 16))
    assert isinstance(hidden, torch.Tensor)
    code = layer.sparse_code(hidden)
    assert code is not None
    assert 3 < code.values.shape[1] <= 50
    dense = torch.zeros_like(hidden).scatter(1, code.indices, code.values)
    assert torch.equal(dense, hidden)


def test_an_excited_layer_has_no_sparse_code() -> None:
    layer = AnnealedTopKLinear(16, 400, 3, anneal_samples=100)
    layer.counts.fill_(100)
    layer.counts[7] = 49  # inhibited from the next step on, but not in this one
    hidden = layer(torch.rand(4, 16))
    assert layer.gaba()[7] > 0
    assert layer.sparse_code(hidden) is None


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        AnnealedTopKLinear(3, 4, 2, schedule="sometimes")
