"""python -m ssd.peers: learners without gradients that see each task once, in order.

No replay and no task labels. A learner has two methods, see Learner; scores of classes that it has
not seen are -inf. Sums are taken in float64, so the order of the samples of a task does not matter
beyond its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.data import Task
from ssd.metrics import predicted
from ssd.peers.readout import (
    CodeReadout,
    RandomCode,
    discriminant,
    gaussian_addresses,
    local_addresses,
    only_seen,
    ridge_solution,
)
from ssd_kernels import TopKOutput, sparse_linear, topk
from ssd_kernels._checks import in_range
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.reference import power_of_two

# Raise it when a change moves the numbers of peers: those of another are not shown.
ALGORITHM = 1

# Samples whose hidden layer is held at a time.
CHUNK = 4096


class Learner(Protocol):
    """A class-incremental learner."""

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Learns a task's training data x [N, d] with labels y [N] int64 in 0..C-1, once."""

    def predict(self, x: Tensor) -> Tensor:
        """Scores [N, C] of x [N, d]; the label is that of the largest."""


@runtime_checkable
class CodedLearner(Learner, Protocol):
    """A learner whose scores are read from a code of the input."""

    @property
    def fixed(self) -> bool:
        """Whether the code of an input stays what it is after the first task."""

    def encode(self, x: Tensor) -> list[TopKOutput]:
        """Codes of x [N, d], part by part."""

    def read(self, codes: Sequence[TopKOutput]) -> Tensor:
        """predict(x), from what encode(x) returned."""


def evaluate_stream(learner: Learner, tasks: Sequence[Task]) -> Tensor:
    """Trains on each task in turn; the accuracy matrix [T, T] float64 on the test sets.

    Row t is what the learner knows after task t; classes that no task has shown yet score 0.

    Raises:
        Diverged: a score is not finite.
    """
    accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
    codes: list[TopKOutput] = []
    for t, task in enumerate(tasks):
        learner.fit_task(task.x_train, task.y_train)
        seen = tasks[: t + 1]
        if isinstance(learner, CodedLearner) and learner.fixed:
            codes += learner.encode(task.x_test)
            scores = learner.read(codes)
        else:
            scores = learner.predict(torch.cat([s.x_test for s in seen]))
        labels = predicted(scores)
        right = labels == torch.cat([s.y_test for s in seen])
        parts = right.double().split([len(s.y_test) for s in seen])
        accuracy[t, : t + 1] = torch.stack([part.mean() for part in parts]).cpu()
    return accuracy


class _AnyScale:
    """Takes inputs in units of the first ones' largest entry: then no square leaves the range.

    The unit is a power of two, so nothing is rounded.
    """

    _unit: float | None = None
    counts: Tensor  # [C] samples of each class

    def _require_labels(self, y: Tensor) -> None:
        """ValueError for a label outside 0..C-1; looked for on a CPU."""
        in_range(type(self).__name__, "labels", y, len(self.counts))

    def _in_units(self, x: Tensor) -> Tensor:
        if self._unit is None:
            self._unit = power_of_two(x.abs().amax()).item()
        return x / self._unit


class NearestClassMean(_AnyScale):
    """The class whose mean of the training data is nearest.

    Args:
        features: d. classes: C.
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        self.sums.index_add_(0, y, self._in_units(x).double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        means = self.sums / self.counts.clamp(min=1).unsqueeze(1)
        # The squared length of x is the same for every class.
        scores = 2 * self._in_units(x).double() @ means.T - means.square().sum(1)
        return only_seen(scores, self.counts)


class StreamingLDA(_AnyScale):
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
        self._require_labels(y)
        wide = self._in_units(x).double()
        self.gram.addmm_(wide.T, wide)
        self.cross.index_add_(1, y, wide.T)
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight, bias = discriminant(self.gram, self.cross, self.counts, self.shrinkage)
        return only_seen(self._in_units(x).double() @ weight + bias, self.counts)


class FlyModel(_AnyScale):
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
        share: float = 0.05,
        connections: float = 0.1,
        lr: float = 0.005,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.k, self.lr = max(1, round(share * neurons)), lr
        picked = torch.rand(neurons, features, generator=generator, device="cpu").argsort(1)
        inputs = picked[:, : max(1, round(connections * features))]
        projection = torch.zeros(neurons, features, device="cpu").scatter_(1, inputs, 1.0)
        self.projection = projection.to(device)
        self.weight = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._in_units(x).float()
        centred = x - x.mean(1, keepdim=True)
        values, indices, *_ = topk(centred @ self.projection.T, self.k)
        values = values.relu()
        largest = values[:, :1]
        return values / torch.where(largest > 0, largest, 1.0), indices

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
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


class RandomReLU(_AnyScale):
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
        self.projection = gaussian_addresses(neurons, features, generator).to(device)
        self.gram = torch.zeros(neurons, neurons, dtype=dtype, device=device)
        self.cross = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _hidden(self, x: Tensor) -> Tensor:
        return (self._in_units(x).float() @ self.projection.T).relu()

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            hidden = self._hidden(part).to(self.gram.dtype)
            self.gram.addmm_(hidden.T, hidden)
            self.cross.index_add_(1, labels, hidden.T.double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight = ridge_solution(self.gram, self.cross, self.ridge).float()
        scores = [self._hidden(part) @ weight for part in x.split(CHUNK)]
        return only_seen(torch.cat(scores), self.counts)


# A wider Gram matrix is kept in float32: 10,000 neurons take 400 MB.
WIDE = 4096

Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A learner of the table, and what is tried for it.

    build(d, C, R, generator, **settings); early settings are given to build, late ones are
    attributes that matter to predict alone, so all of them are tried on one fit.
    """

    name: str
    build: Callable[..., Learner]
    early: Sequence[Settings] = ({},)
    late: Sequence[Settings] = ({},)


def entries(features: int, neurons: int) -> list[Entry]:
    """The learners compared on d inputs with R neurons, all of a width where they have one."""
    strengths = (1e-4, 1e-3, 1e-2, 1e-1)
    shares = (0.1, 0.2, 0.3, 0.4)
    late = [{"readout": r, "strength": s} for r in ("lda", "ridge") for s in strengths[:3]]
    codes = [{"share": s, "power": p} for p in (1.0, 0.5) for s in shares]
    found = [
        Entry("nearest class mean", lambda d, c, r, g: NearestClassMean(d, c)),
        Entry(
            "streaming LDA",
            lambda d, c, r, g: StreamingLDA(d, c),
            late=[{"shrinkage": s} for s in strengths],
        ),
        Entry(
            "FlyModel",
            lambda d, c, r, g, **s: FlyModel(d, c, r, generator=g, **s),
            [{"share": s, "lr": lr} for s in (0.01, 0.05, 0.1) for lr in (1e-4, 1e-3, 5e-3, 2e-2)],
        ),
        Entry(
            "random ReLU + ridge",
            lambda d, c, r, g: RandomReLU(d, c, r, dtype=_dtype(r), generator=g),
            late=[{"ridge": s} for s in (1e-5, *strengths)],
        ),
        Entry("sparse code, Gaussian addresses", _gaussian_readout, codes, late),
    ]
    side = math.isqrt(features)
    if side * side == features and features >= 784:  # a square image, not 256 features
        local = [{"share": s, "width": w} for w in (3.0, 6.0) for s in shares]
        found.append(Entry("sparse code, local addresses", _local_readout, local, late))
    if neurons >= 2 * features:
        beside = [{"share": s, "power": p} for p in (1.0, 0.5) for s in (0.1, 0.2, 0.4)]
        found.append(Entry("sparse code beside the input", _beside_readout, beside, late[:3]))
        # What the same readout makes of units that are not sparse: share 1 is a plain ReLU.
        dense = [{"share": 1.0, "power": p} for p in (1.0, 0.5)]
        found.append(Entry("control: ReLU beside the input", _beside_readout, dense, late[:3]))
    return found


def _dtype(neurons: int) -> torch.dtype:
    return torch.float32 if neurons > WIDE else torch.float64


def _gaussian_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, power: float
) -> Learner:
    addresses = gaussian_addresses(neurons, d, generator)
    code = RandomCode(addresses, max(1, round(share * neurons)), power)
    return CodeReadout(code, classes, dtype=_dtype(neurons))


def _beside_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, power: float
) -> Learner:
    addresses = gaussian_addresses(neurons - d, d, generator)
    code = RandomCode(addresses, max(1, round(share * len(addresses))), power, beside=True)
    return CodeReadout(code, classes, dtype=_dtype(neurons))


def _local_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, width: float
) -> Learner:
    addresses = local_addresses(neurons, math.isqrt(d), generator, width)
    code = RandomCode(addresses, max(1, round(share * neurons)))
    return CodeReadout(code, classes, dtype=_dtype(neurons))
