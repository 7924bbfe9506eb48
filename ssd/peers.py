"""Learners without gradients that see each task once, in order: what any user would try first.

No replay and no task labels. A learner has two methods, see Learner; scores of classes that it has
not seen are -inf. Sums are taken in float64, so the order of the samples of a task does not matter
beyond its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.data import Task
from ssd_kernels import code_gram, row_gradient, topk

# Samples whose hidden layer is held at a time.
CHUNK = 4096


class Learner(Protocol):
    """A class-incremental learner."""

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Learns a task's training data x [N, d] with labels y [N] int64 in 0..C-1, once."""

    def predict(self, x: Tensor) -> Tensor:
        """Scores [N, C] of x [N, d]; the label is that of the largest."""


def evaluate_stream(learner: Learner, tasks: Sequence[Task]) -> Tensor:
    """Trains on each task in turn; the accuracy matrix [T, T] float64 on the test sets.

    Row t is what the learner knows after task t; classes that no task has shown yet score 0.
    """
    accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for t, task in enumerate(tasks):
        learner.fit_task(task.x_train, task.y_train)
        seen = tasks[: t + 1]
        labels = learner.predict(torch.cat([s.x_test for s in seen])).argmax(1)
        right = labels == torch.cat([s.y_test for s in seen])
        parts = right.double().split([len(s.y_test) for s in seen])
        accuracy[t, : t + 1] = torch.stack([part.mean() for part in parts]).cpu()
    return accuracy


class NearestClassMean:
    """The class whose mean of the training data is nearest.

    Args:
        features: d. classes: C.
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self.sums.index_add_(0, y, x.double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        means = self.sums / self.counts.clamp(min=1).unsqueeze(1)
        # The squared length of x is the same for every class.
        scores = 2 * x.double() @ means.T - means.square().sum(1)
        return only_seen(scores, self.counts)


class StreamingLDA:
    """Linear discriminant analysis with one covariance for all classes, equal priors.

    The covariance within classes comes from running sums of x, x x^T and counts alone; shrunk to
    (1 - s) S + s (tr S / d) I, as in Hayes & Kanan (2020) and scikit-learn.

    Args:
        features: d. classes: C. shrinkage: s in 0..1.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        shrinkage: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shrinkage = shrinkage
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        wide = x.double()
        self.gram.addmm_(wide.T, wide)
        self.cross.index_add_(1, y, wide.T)
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight, bias = discriminant(self.gram, self.cross, self.counts, self.shrinkage)
        return only_seen(x.double() @ weight + bias, self.counts)


class FlyModel:
    """Sparse binary random projection, its largest responses, one Hebbian pass.

    The input is centred per sample; the k largest responses, scaled to 0..1 by the largest, are
    added to the weights of the label, which stop at 1 (Shen, Dasgupta & Navlakha 2023; the
    variant compared in Bricken et al. 2023).

    Args:
        features: d. classes: C. neurons: R.
        share: k / R. connections: inputs a neuron sums, over d. lr: learning rate.
        generator: source of the projection.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        share: float = 0.01,
        connections: float = 0.1,
        lr: float = 0.005,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.k, self.lr = max(1, round(share * neurons)), lr
        picked = torch.rand(neurons, features, generator=generator).argsort(1)
        inputs = picked[:, : max(1, round(connections * features))]
        projection = torch.zeros(neurons, features).scatter_(1, inputs, 1.0)
        self.projection = projection.to(device)
        self.weight = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x.float() - x.float().mean(1, keepdim=True)
        values, indices, *_ = topk(centred @ self.projection.T, self.k)
        values = values.relu()
        return values / values[:, :1].clamp(min=1e-12), indices

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        neurons, classes = self.weight.shape
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            values, indices = self._code(part)
            targets = F.one_hot(labels, classes).double()
            self.weight += self.lr * row_gradient(values.double(), targets, indices, neurons)
        # Steps only ever add, so clipping once at the end is clipping after each.
        self.weight.clamp_(max=1.0)
        self.counts += y.bincount(minlength=classes)

    def predict(self, x: Tensor) -> Tensor:
        scores = [
            sparse_linear(values.double(), indices, self.weight)
            for values, indices in map(self._code, x.split(CHUNK))
        ]
        return only_seen(torch.cat(scores), self.counts)


class RandomReLU:
    """relu(x P^T) with a Gaussian P, and ridge regression on the one-hot labels.

    Updated task by task through the Gram matrix, which gives what recursive least squares gives.

    Args:
        features: d. classes: C. neurons: R.
        ridge: in units of the Gram matrix's mean diagonal entry.
        dtype: of the Gram matrix; its solution is float64.
        generator: source of P.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        ridge: float = 1e-4,
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.ridge = ridge
        self.projection = torch.randn(neurons, features, generator=generator).to(device)
        self.gram = torch.zeros(neurons, neurons, dtype=dtype, device=device)
        self.cross = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _hidden(self, x: Tensor) -> Tensor:
        return (x.float() @ self.projection.T).relu()

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            hidden = self._hidden(part).to(self.gram.dtype)
            self.gram.addmm_(hidden.T, hidden)
            self.cross.index_add_(1, labels, hidden.T.double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight = ridge_solution(self.gram, self.cross, self.ridge).float()
        scores = [self._hidden(part) @ weight for part in x.split(CHUNK)]
        return only_seen(torch.cat(scores), self.counts)
