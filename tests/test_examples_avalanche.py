"""The plugin for Avalanche: its strategies train on SSD's loss, and forget less."""

import copy
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from ssd.distillation import Distiller
from ssd_kernels.nn import TopK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    supervised = pytest.importorskip(
        "avalanche.training.supervised", reason="avalanche-lib is not installed"
    )
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin

example = runpy.run_path(str(Path(__file__).parents[1] / "examples/avalanche_ssd.py"))


class Watch(SupervisedPlugin):
    """Computes each batch's loss by itself, from a copy of the model before the experience."""

    def __init__(self, alpha: float, lam: float, temperature: float) -> None:
        super().__init__()
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.losses: list[list[tuple[float, float, float]]] = []  # used, expected, cross entropy
        self.neurons = torch.arange(8)

    def before_training_exp(self, strategy, **kwargs) -> None:
        self.teacher = copy.deepcopy(strategy.model)
        self.losses.append([])

    def before_backward(self, strategy, **kwargs) -> None:
        x, y = strategy.mb_x, strategy.mb_y
        with torch.no_grad():
            entropy = nn.functional.cross_entropy(strategy.model(x), y)
            hidden = self.divergence(strategy, lambda model: self.chosen(model[:2](x)))
            logits = self.divergence(strategy, lambda model: model(x))
        rest = (1 - self.alpha) * (self.lam * hidden + (1 - self.lam) * logits)
        loss = self.alpha * entropy + rest if len(self.losses) > 1 else entropy
        self.losses[-1].append((strategy.loss.item(), loss.item(), entropy.item()))

    def divergence(self, strategy, output) -> torch.Tensor:
        """T^2 KL(student || teacher), the mean of the batch."""
        student, teacher = (
            (output(model).double() / self.temperature).log_softmax(1)
            for model in (strategy.model, self.teacher)
        )
        return self.temperature**2 * (student.exp() * (student - teacher)).sum(1).mean()

    def chosen(self, z: torch.Tensor) -> torch.Tensor:
        return z[:, self.neurons]

    def after_training_exp(self, strategy, **kwargs) -> None:
        x = torch.stack([sample[0] for sample in strategy.experience.dataset])
        with torch.no_grad():
            counts = (strategy.model[:2](x) > 0).sum(0)
        order = counts.sort(descending=True, stable=True).indices
        self.neurons = order[:8].sort().values


def strategy(model: nn.Module, *plugins: SupervisedPlugin, epochs: int = 2):
    return supervised.Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_mb_size=16,
        train_epochs=epochs,
        plugins=list(plugins),
        evaluator=None,
    )


def stream():
    y = torch.arange(120) % 6
    x = torch.rand(120, 20) + 2 * torch.eye(20)[y]
    data = {"train": example["labelled"](x, y), "test": example["labelled"](x, y)}
    return class_incremental_benchmark(data, num_experiences=3, class_order=list(range(6)))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), TopK(8), nn.Linear(64, 6))


def test_loss_is_that_of_the_paper() -> None:
    settings = {"alpha": 0.3, "lam": 0.4, "temperature": 2.0}
    network, watch = model(), Watch(**settings)
    trained = strategy(network, example["SSDPlugin"](Distiller(network, **settings)), watch)
    for experience in stream().train_stream:
        trained.train(experience)
    assert [len(losses) for losses in watch.losses] == [6, 6, 6]
    for number, losses in enumerate(watch.losses):
        for used, expected, entropy in losses:
            assert used == pytest.approx(expected, rel=1e-5)
            assert (abs(used - entropy) > 0.01) == (number > 0)


def test_beside_replay() -> None:
    """Batches then hold samples of earlier experiences, and those of the loader are counted."""
    network = model()
    distiller = Distiller(network, logits="seen")
    replay = ReplayPlugin(mem_size=40)
    trained = strategy(network, example["SSDPlugin"](distiller), replay)
    for number, experience in enumerate(stream().train_stream):
        trained.train(experience)
        assert distiller.classes_seen.tolist() == list(range(2 * number + 2))


def test_digits_are_forgotten_less() -> None:
    found = []
    for distil in (False, True):
        matrix = example["train"](example["digits"](), distil)
        found.append((matrix[-1].mean(), (matrix.diag() - matrix[-1])[:-1].mean()))
    (naive, forgetting), (accuracy, less) = found
    assert accuracy > naive + 0.1
    assert less < forgetting - 0.3
