"""A Distiller whose task is a loader: its teacher is a copy of the model, run on each batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssd.distillation import Distiller
from ssd_kernels.nn import KSparseMLP, TopK


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 30), TopK(5), nn.Dropout(0.5), nn.Linear(30, 20), TopK(4), nn.Linear(20, 3)
    ).double()


def loader(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=7)


def task(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (40,), generator=draw)


def pair(**settings: Any) -> tuple[Distiller, Distiller]:
    """Two equal ones in their second task: of a tensor, and of a loader."""
    (x, y), (new, _) = task(1), task(2)
    stored, online = (Distiller(network(), **settings) for _ in range(2))
    for distiller, first, second in (
        (stored, x, new),
        (online, loader(x, y), loader(*task(2))),
    ):
        distiller.begin_task(first)
        distiller.end_task(first, y)
        distiller.begin_task(second)
    return stored, online


def gradients(distiller: Distiller, inputs: Tensor, labels: Tensor, **how: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # of dropout
    losses = distiller.losses(distiller.model(inputs), labels, **how)
    assert set(losses) == {"cross_entropy", "logits", "hidden"}
    total = torch.stack([*losses.values()]).sum()
    return [total, *torch.autograd.grad(total, list(distiller.model.parameters()))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden": "before", "kl": "forward", "frequency": "accumulated"},
        {"hidden_loss": "mse", "selection": "all", "logits": "seen"},
        {"hidden_loss": "mse", "selection": "activation", "subnetwork": 1.5},
    ],
)
def test_equals_the_stored_teacher(settings: dict[str, Any]) -> None:
    stored, online = pair(**settings)
    for name, chosen in stored.neurons.items():
        assert torch.equal(online.neurons[name], chosen)
    assert online.teacher is not None
    assert stored.teaches
    assert online.teaches
    x, y = task(2)
    batch = torch.tensor([3, 0, 22, 39])
    for _ in range(2):  # the student moves, the teacher stays
        expected = gradients(stored, x[batch], y[batch], samples=batch)
        got = gradients(online, x[batch], y[batch], x=x[batch])
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            for distiller in (stored, online):
                for parameter in distiller.model.parameters():
                    parameter += 0.1


def test_augmented_inputs() -> None:
    """The teacher sees what the student sees."""
    _, online = pair()
    teacher = copy.deepcopy(online.model).eval()
    x, y = task(5)
    x = x.flip(1)
    logits = online.model.eval()(x)
    terms = online.losses(logits, y, x=x)
    assert terms["logits"].item() == pytest.approx(0, abs=1e-12)
    with torch.no_grad():
        online.model[-1].bias.copy_(torch.tensor([5.0, 0, -5]))
    moved = online.losses(online.model(x), y, x=x)["logits"]
    student, taught = online.model(x).div(8).log_softmax(1), teacher(x).div(8).log_softmax(1)
    formula = 64 * (student.exp() * (student - taught)).sum(1).mean()
    torch.testing.assert_close(moved, 0.3 * 0.9 * formula)


def test_end_task_takes_a_loader() -> None:
    stored, online = pair()
    x, y = task(2)
    stored.end_task(x)
    online.end_task(loader(x, y))
    assert online.teacher is None
    assert not online.teaches
    for name, counts in stored.counts.items():
        assert torch.equal(online.counts[name], counts)


def test_loaders_of_inputs_alone() -> None:
    x, _ = task(1)
    one, two = Distiller(network()), Distiller(network())
    one.end_task(x)
    two.end_task(iter(x.split(9)))  # read once
    assert all(torch.equal(two.counts[name], hits) for name, hits in one.counts.items())


@pytest.mark.parametrize("settings", [{}, {"hidden_loss": "mse", "selection": "all"}])
def test_state_resumes(settings: dict[str, Any]) -> None:
    _, online = pair(**settings)
    x, y = task(2)
    with torch.no_grad():
        online.model[0].weight += 0.3  # apart from the teacher
    state = online.state_dict()
    twin = Distiller(copy.deepcopy(online.model), **settings)
    twin.load_state_dict(state)
    torch.testing.assert_close(gradients(twin, x, y, x=x), gradients(online, x, y, x=x))
    assert not any(p.requires_grad for p in twin.teacher.parameters())
    del state["teacher/0.weight"]
    with pytest.raises(ValueError, match="teacher is another model"):
        twin.load_state_dict(state)
    twin.end_task(x)
    assert not any(name.startswith("teacher/") for name in twin.state_dict())


def test_copies() -> None:
    _, online = pair()
    x, y = task(2)
    expected = gradients(online, x, y, x=x)
    for twin in (copy.deepcopy(online), pickle.loads(pickle.dumps(online))):
        torch.testing.assert_close(gradients(twin, x, y, x=x), expected)


def test_errors() -> None:
    stored, online = pair()
    x, y = task(2)
    with pytest.raises(ValueError, match="needs x="):
        online.loss(online.model(x), y, torch.arange(40))
    with pytest.raises(ValueError, match="x has 39 inputs for 40 logits"):
        online.loss(online.model(x), y, x=x[:39])
    with pytest.raises(ValueError, match="needs samples"):
        stored.loss(stored.model(x), y, x=x)
    with pytest.raises(ValueError, match="batch 0 is a dict"):
        online.end_task([{"x": x}])
    with pytest.raises(ValueError, match="no batch"):
        online.end_task([])
    seen = Distiller(network(), logits="seen")
    seen.end_task(x, torch.full((40,), 7))
    seen.begin_task(loader(x, y))
    with pytest.raises(ValueError, match="seen, but the model has 3 classes"):
        seen.loss(seen.model(x), y, x=x)


def test_is_not_fused() -> None:
    """The op of the trainer reads stored outputs."""
    distiller = Distiller(KSparseMLP(8, 30, 3, 5).double())
    x, y = task(1)
    distiller.end_task(x)
    assert distiller.fused
    distiller.begin_task(loader(x, y))
    assert not distiller.fused
    with pytest.raises(ValueError, match="stored outputs"):
        distiller.terms(torch.arange(4))
