"""Activations of layers: read off their outputs, recorded, counted; modes that come back."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.activations import (
    Hook,
    Recorder,
    activations_of,
    count_activations,
    evaluating,
    preactivations_of,
    single,
)
from ssd_kernels import topk
from ssd_kernels.nn import KSparseMLP, TopK, TopKLinear


def test_activations_of_a_code_are_those_of_the_dense_layer() -> None:
    dense = torch.randn(20, 50).relu()
    values, indices, *_ = topk(dense, 9)
    kept = torch.zeros_like(dense).scatter(1, indices, values)
    for neurons in (torch.tensor([0, 7, 49]), torch.arange(50), torch.tensor([13])):
        sparse = activations_of(topk(dense, 9), neurons)
        assert torch.equal(sparse, activations_of(kept, neurons))


def test_activations_of_a_code_pass_gradients_to_its_values() -> None:
    code = topk(torch.rand(3, 8, dtype=torch.float64), 4)
    neurons = torch.tensor([1, 2, 5])

    def read(values: Tensor) -> Tensor:
        return activations_of(code._replace(values=values), neurons)

    assert torch.autograd.gradcheck(read, code.values.clone().requires_grad_())


def test_preactivations_of_every_kind_of_layer() -> None:
    x, neurons = torch.randn(6, 12), torch.tensor([2, 9])
    layer = TopKLinear(12, 20, 3)
    expected = F.linear(x, layer.weight, layer.bias).relu()[:, neurons]
    torch.testing.assert_close(preactivations_of(layer, x, neurons), expected)
    torch.testing.assert_close(preactivations_of(TopK(3), x, neurons), x[:, neurons].relu())


def test_counting_leaves_mode_hooks_and_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 40), TopK(6), KSparseMLP(40, 30, 5, 4)).train()
    x = torch.randn(30, 12)
    counts = count_activations(model, ["1", "2.encoder"], x)
    assert model.training
    assert not model[1]._forward_hooks
    assert torch.equal(counts["1"], (model[1](model[0](x)) > 0).sum(0))
    assert counts["1"].sum() <= 30 * 6


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 40), nn.BatchNorm1d(40), TopK(6), nn.Dropout(0.5), KSparseMLP(40, 30, 5, 4)
    )


class Merging(nn.Linear):
    """A layer that does work when its mode changes, as low-rank adapters do."""

    changes = 0

    def train(self, mode: bool = True) -> nn.Module:
        self.changes += mode != self.training
        return super().train(mode)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_activations_of_sequences_are_those_of_each_position(shape: tuple[int, ...]) -> None:
    dense, neurons = torch.randn(*shape, 50).relu(), torch.tensor([0, 7, 49])
    code = topk(dense, 9)
    flat = activations_of(topk(dense.reshape(-1, 50), 9), neurons)
    assert torch.equal(activations_of(code, neurons), flat.view(*shape, 3))
    assert torch.equal(activations_of(dense, neurons), dense[..., [0, 7, 49]])


@pytest.mark.parametrize("layer", [TopK(4), TopKLinear(20, 20, 4)])
def test_counts_of_sequences_are_of_all_positions(layer: nn.Module) -> None:
    x = torch.randn(6, 5, 20)
    counts = count_activations(nn.Sequential(layer), ["0"], x)["0"]
    assert torch.equal(counts, count_activations(nn.Sequential(layer), ["0"], x.flatten(0, 1))["0"])
    assert counts.sum() > 0


def test_counting_refuses_a_layer_that_runs_twice_or_not_at_all() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never = TopK(2), TopK(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(x) + 1)

    with pytest.raises(ValueError, match="'twice' ran 2 times"):
        count_activations(Odd(), ["twice"], torch.rand(3, 8))
    with pytest.raises(ValueError, match="'never' did not run"):
        count_activations(Odd(), ["never"], torch.rand(3, 8))
    pair = nn.LSTM(8, 4)
    with pytest.raises(ValueError, match="returns a tuple"):
        count_activations(nn.Sequential(pair), ["0"], torch.rand(3, 8))


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_gives_each_submodule_its_own_mode_back(fails: bool) -> None:
    model = network().train()
    model[1].eval()
    model[4].eval()
    model[4].encoder.train()
    before = {name: module.training for name, module in model.named_modules()}
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled()


def test_evaluating_tells_modules_that_listen() -> None:
    model = nn.Sequential(Merging(3, 3), nn.Sequential(Merging(3, 3))).train()
    model[1][0].eval()
    listened = [model[0].changes, model[1][0].changes]
    with evaluating(model):
        pass
    assert [model[0].changes - listened[0], model[1][0].changes - listened[1]] == [2, 0]
    assert model[0].training
    assert not model[1][0].training


def test_evaluating_leaves_the_callers_inference_mode_and_gives_it_back() -> None:
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        with evaluating(model):
            output = model(torch.ones(1, 3))
        assert torch.is_inference_mode_enabled()
    assert not output.is_inference()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_hooks_do_nothing_in_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    recorder = Recorder(model, ["2"])
    other = copied(model)
    with recorder.record() as calls:
        other(torch.randn(4, 12))
        assert not calls
        model(torch.randn(5, 12))
    assert len(single(calls, "2").output) == 5
    (hook,) = other[2]._forward_hooks.values()
    assert isinstance(hook, Hook)
    assert hook.function is None
    recorder.remove()
    assert not model[2]._forward_hooks


def test_threads_record_apart() -> None:
    layer = nn.Identity()
    recorder, meet, sizes = Recorder(nn.Sequential(layer), ["0"]), threading.Barrier(2), {}

    def run(size: int) -> None:
        with recorder.record() as calls:
            meet.wait()
            layer(torch.ones(size))
            meet.wait()
        sizes[size] = len(single(calls, "0").output), calls["0"].number

    threads = [threading.Thread(target=run, args=(size,)) for size in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == {2: (2, 1), 3: (3, 1)}
