"""The network: constraints, schedules, and the sparse code of an almost k-sparse layer."""

import copy
import pickle
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap

from ssd import models
from ssd.config import Config
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.models import RETRY, SDMLP, AnnealedTopKLinear, ReLUMLP, TopKMLP
from ssd.trainer import Trainer
from ssd_kernels import TopKOutput
from ssd_kernels._graded_code import ActiveNeurons, Shadow


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


def almost_sparse_layer(neurons: int = 400) -> AnnealedTopKLinear:
    layer = AnnealedTopKLinear(16, neurons, 3, anneal_samples=100)
    with torch.no_grad():
        layer.weight.copy_(torch.nn.functional.normalize(torch.rand(neurons, 16) ** 6, dim=1))
    layer.counts.copy_(torch.randint(98, 101, (neurons,)))
    return layer


def test_code_of_stragglers_equals_the_dense_layer() -> None:
    """Neurons on their way to full inhibition fire beyond the k; the code is wider and exact."""
    layer, x = almost_sparse_layer(), torch.nn.functional.normalize(torch.rand(12, 16), dim=1)
    layer._computes_all = lambda: False  # as with more neurons
    twin = AnnealedTopKLinear(16, 400, 3, anneal_samples=100)
    twin.load_state_dict(layer.state_dict())
    code, hidden = layer.encode(x), twin(x)
    assert isinstance(code, TopKOutput)
    assert 3 < (code.values > 0).sum(1).max() <= 12
    dense = torch.zeros_like(hidden).scatter(1, code.indices, code.values)
    assert torch.equal(dense, hidden)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])


def test_a_code_too_narrow_is_refused_and_not_tried_at_once_again() -> None:
    layer = almost_sparse_layer()
    layer._computes_all = lambda: False
    layer.counts.fill_(60)
    twin = AnnealedTopKLinear(16, 400, 3, anneal_samples=100)
    twin.load_state_dict(layer.state_dict())
    x = torch.rand(12, 16)
    active, expected = layer.encode(x), twin(x)
    assert isinstance(active, ActiveNeurons)
    assert (active.values > 0).sum() == (expected > 0).sum()
    assert torch.equal(layer.counts, twin.counts)
    assert layer.dense_until == RETRY * 12
    layer.counts.fill_(100)
    assert isinstance(layer.encode(x), ActiveNeurons)
    layer.samples += RETRY * 12
    assert isinstance(layer.encode(x), TopKOutput)


def test_active_equals_forward_and_stands_in_for_a_code_that_would_cost_as_much() -> None:
    layer, x = almost_sparse_layer(), torch.nn.functional.normalize(torch.rand(12, 16), dim=1)
    twin = AnnealedTopKLinear(16, 400, 3, anneal_samples=100)
    twin.load_state_dict(layer.state_dict())
    values, neurons, _ = layer.encode(x)
    assert not values.requires_grad
    expected = twin(x)
    torch.testing.assert_close(values, expected[:, neurons])
    assert torch.equal(neurons, (expected > 0).any(0).nonzero().squeeze(1))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])


def test_an_excited_layer_has_no_code() -> None:
    """All its neurons may fire, also where the gradient does not pass."""
    layer = almost_sparse_layer()
    layer.counts[7] = 49
    x = torch.rand(4, 16)
    x[:, :8] = 0
    with torch.no_grad():
        layer.weight[7] = 0
        layer.weight[7, 0] = 1
    active = layer.encode(x)
    assert isinstance(active, ActiveNeurons)
    own = 7 if active.neurons is None else active.neurons.tolist().index(7)
    assert (active.values[:, own] > 0).all()
    assert (active.gate[:, own] <= 0).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("method", ["ssd", "ssd+ewc"])
def test_estimating_scores_changes_no_bit(
    method: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training with and without it, through the switch: the same codes, counts and weights."""
    y = torch.arange(60) % 2
    x = torch.rand(60, 16) + 2 * torch.nn.functional.one_hot(y * 5, 16)
    config = Config(
        neurons=2000,
        k=3,
        epochs=12,
        batch_size=20,
        anneal_samples=300,
        lr=0.3,
        eval_every=12,
        method=method,
    )
    monkeypatch.setattr(AnnealedTopKLinear, "_computes_all", lambda *_: False)
    # The package's attribute of this name is the function.
    module = import_module("ssd_kernels._graded_code")
    monkeypatch.setattr(module, "fast_bfloat16", lambda: fast)
    ends = []
    for smallest in (1, 10**9):
        monkeypatch.setattr(models, "SHADOW_MIN", smallest)
        tasks = [Task((0, 1), x, y, x, y), Task((0, 1), x.roll(3, 1), y, x, y)]
        learner = Learner(config, tasks, build_model(config, 16, 2))
        trainer = Trainer([learner])
        for _ in trainer.run():
            pass
        assert (learner.model.encoder._shadow is not None) == (smallest == 1)
        ends.append(trainer.state()[0])
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        AnnealedTopKLinear(3, 4, 2, schedule="sometimes")


def test_the_response_is_renewed_though_a_kernel_counts_unseen() -> None:
    """As Triton's do: memory changes, the tensor's version does not."""
    layer = AnnealedTopKLinear(3, 4, 2, anneal_samples=10)
    assert layer.response()[1]
    version = layer.counts._version
    layer.counts.numpy()[:] = 10
    layer.samples += 1
    assert layer.counts._version == version
    assert layer.response() == (None, False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_forgets_what_was_derived_from_the_tensors_of_the_first(
    copied: Callable[[AnnealedTopKLinear], AnnealedTopKLinear],
) -> None:
    """Its tensors count their versions from 0 and may reach those of the first."""
    layer = AnnealedTopKLinear(3, 4, 2, anneal_samples=10)
    for _ in range(3):
        layer.counts += 1
        layer.samples += 1
    assert layer.response()[1]
    layer._shadow, versions = Shadow(layer.weight.detach().abs()), layer._responded[1:]
    other = copied(layer)
    assert other._shadow is None
    while other.samples._version < versions[1]:
        other.samples += 1
    while other.counts._version < versions[0]:
        other.counts += 10
    assert other.response() == (None, False)


def test_the_response_is_renewed_with_other_counters() -> None:
    layer = AnnealedTopKLinear(3, 4, 2, anneal_samples=10)
    assert layer.response()[1]
    layer.load_state_dict(layer.state_dict() | {"counts": torch.full((4,), 10)}, assign=True)
    assert layer.response() == (None, False)


def tied_model(schedule: str, inhibition: str, reached: int) -> SDMLP:
    """With neurons of one address, and counters that have reached so much of 1,000 samples."""
    model = SDMLP(16, 64, 5, 4, inhibition, schedule, anneal_samples=1000)
    with torch.no_grad():
        model.encoder.weight[3:9] = model.encoder.weight[3]
    model.encoder.counts.fill_(reached)
    model.encoder.samples.fill_(reached)
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inhibition", ["subtract", "mask"])
@pytest.mark.parametrize("schedule", ["gaba", "linear", "flat"])
def test_shapes_need_no_values(schedule: str, inhibition: str, training: bool) -> None:
    for without_values in (torch.device("meta"), FakeTensorMode()):
        with without_values:
            model, x = SDMLP(16, 64, 5, 4, inhibition, schedule).train(training), torch.rand(3, 16)
            assert model(x).shape == (3, 5)
            with pytest.raises(TypeError, match="depends on values"):
                model.encoder.encode(x)


@pytest.mark.parametrize("reached", [0, 400, 998, 1000])
@pytest.mark.parametrize("inhibition", ["subtract", "mask"])
@pytest.mark.parametrize("schedule", ["gaba", "linear"])
def test_every_stage_can_be_exported_and_stacked(
    schedule: str, inhibition: str, reached: int
) -> None:
    model, x = tied_model(schedule, inhibition, reached).eval(), torch.rand(8, 16)
    expected = model(x)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("b")},)
    ).module()
    for rows in (8, 3):
        torch.testing.assert_close(exported(x[:rows]), expected[:rows])
    other = tied_model(schedule, inhibition, 700).eval()
    stacked = stack_module_state([model, other])  # type: ignore[list-item]
    logits = vmap(lambda state: functional_call(model, state, (x,)))(stacked)
    torch.testing.assert_close(logits[0], expected)
    torch.testing.assert_close(logits[1], other(x))


@pytest.mark.parametrize("reached", [400, 1000])
@pytest.mark.parametrize("inhibition", ["subtract", "mask"])
@pytest.mark.parametrize("schedule", ["gaba", "linear"])
def test_a_compiled_step_is_the_step(schedule: str, inhibition: str, reached: int) -> None:
    torch._dynamo.reset()
    model, x = tied_model(schedule, inhibition, reached), torch.rand(8, 16)
    twin = copy.deepcopy(model)
    logits = torch.compile(twin, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(logits, model(x))
    for one, other in ((model(x), model), (torch.compile(twin, backend="aot_eager")(x), twin)):
        one.square().sum().backward()
        assert other.encoder.weight.grad is not None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    for name, tensor in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name


def test_float16_answers_inhibition_by_counts_beyond_its_range() -> None:
    layer = AnnealedTopKLinear(3, 4, 2, dtype=torch.float16)
    layer.counts.fill_(50_000)
    assert layer.gaba().tolist() == [0.0] * 4


@pytest.mark.parametrize("samples", [True, 0, -1, 2.5, float("nan"), "4", None, [4]])
def test_a_number_of_samples_is_checked_at_construction(samples: object) -> None:
    with pytest.raises((TypeError, ValueError), match="anneal_samples"):
        SDMLP(4, 8, 3, 2, anneal_samples=samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(True, 8, 3), (4, -1, 3), (4, 8, 2.5), (4, 0, 3)])
def test_sizes_are_checked_at_construction(sizes: tuple[int, int, int]) -> None:
    draw = torch.Generator()
    with pytest.raises((TypeError, ValueError), match="must be"):
        ReLUMLP(*sizes, draw)
    with pytest.raises((TypeError, ValueError), match="must be"):
        TopKMLP(*sizes, 1, draw)
    with pytest.raises((TypeError, ValueError), match="must be"):
        SDMLP(*sizes, 1)


def test_the_first_weights_do_not_depend_on_the_default_device() -> None:
    def weights() -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        return list(SDMLP(4, 8, 3, 2, generator=draw, device="cpu").parameters())

    with torch.device("meta"):
        elsewhere = weights()
    for p, q in zip(weights(), elsewhere, strict=True):
        assert torch.equal(p, q)
