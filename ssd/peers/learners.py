"""Learners without gradients that see each task once, in order: no replay, no task labels.

A learner has two methods, see Learner; classes that it has not seen score -inf. Sums are float64,
so the order of a task's samples matters only within rounding. A new learner is a class and a row of
entries(). Sizes: d features, C classes, R neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.data import Task
from ssd.metrics import predicted
from ssd.peers.penalties import candidates, cross_validated_choice, held_out_choice
from ssd.peers.readout import (
    CodeReadout,
    RandomCode,
    discriminant,
    gram_dtype,
    local_addresses,
    only_seen,
    ridge_solution,
)
from ssd_kernels import TopKOutput, sparse_linear, topk
from ssd_kernels._checks import in_range
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.reference import power_of_two

# Raise it when a change moves the numbers of peers: rows of another number are not shown.
ALGORITHM = 1

# Samples whose hidden layer is held at a time.
CHUNK = 4096
# Inputs that a neuron of FlyModel sums, over all inputs.
CONNECTIONS = 0.1
# RanPAC chooses its penalty on the samples left over by this share of a task.
FITTED = 0.8


class Learner(Protocol):
    """A class-incremental learner."""

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Learns a task's training data x [N, d] with labels y [N] int64 in 0..C-1, once."""

    def predict(self, x: Tensor) -> Tensor:
        """Scores [N, C] of x [N, d]; the label is that of the largest."""


def accuracies(scores: Tensor, tasks: Sequence[Task]) -> Tensor:
    """The accuracy on each task, [T] float64, of the scores [N, C] of all their test sets.

    Raises:
        Diverged: a score is not finite.
    """
    right = predicted(scores) == torch.cat([task.y_test for task in tasks])
    parts = right.double().split([len(task.y_test) for task in tasks])
    return torch.stack([part.mean() for part in parts]).cpu()


def evaluate_stream(
    learner: Learner, tasks: Sequence[Task], fit: Callable[[Tensor, Tensor], None] | None = None
) -> Tensor:
    """Trains on each task in turn and tests on all tasks so far.

    Args:
        learner: one that has seen no task.
        tasks: T tasks.
        fit: is called in place of learner.fit_task, for example to measure its time.

    Returns:
        The accuracy matrix [T, T] float64: row t after task t; tasks not yet shown score 0.

    Raises:
        Diverged: a score is not finite.
    """
    accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
    codes: list[TopKOutput] = []
    for t, task in enumerate(tasks):
        (fit or learner.fit_task)(task.x_train, task.y_train)
        seen = tasks[: t + 1]
        if isinstance(learner, CodeReadout) and learner.fixed:
            codes += learner.encode(task.x_test)
            scores = learner.read(codes)
        else:
            scores = learner.predict(torch.cat([task.x_test for task in seen]))
        accuracy[t, : t + 1] = accuracies(scores, seen)
    return accuracy


def _zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _connections(
    neurons: int, features: int, share: float, generator: torch.Generator | None
) -> Tensor:
    """[R, d] float32: 1 at this share of each neuron's inputs, drawn at random, else 0."""
    picked = torch.rand(neurons, features, generator=generator, device="cpu").argsort(1)
    inputs = picked[:, : max(1, round(share * features))]
    return _zeros(neurons, features, dtype=torch.float32).scatter_(1, inputs, 1.0)


class _OnePass:
    """Counts classes and scales inputs by the first task's largest entry.

    The scale is a power of two, so nothing is rounded, and no square leaves the range of floats.
    """

    def __init__(self, classes: int) -> None:
        self.counts = _zeros(classes, dtype=torch.int64)
        self._unit: float | None = None

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        in_range(type(self).__name__, "labels", y, len(self.counts))
        if self._unit is None:
            self._unit = power_of_two(x.abs().amax()).item()
        self._add(x / self._unit, y)
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        assert self._unit is not None, "no task was learned yet"
        return only_seen(self._scores(x / self._unit), self.counts)

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Adds a task's scaled data."""
        raise NotImplementedError

    def _scores(self, x: Tensor) -> Tensor:
        """Scores of all classes for scaled data; those of classes not seen are ignored."""
        raise NotImplementedError


class NearestClassMean(_OnePass):
    """The class whose mean of the training data is nearest."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(classes)
        self.sums = _zeros(classes, features)

    def _add(self, x: Tensor, y: Tensor) -> None:
        self.sums.index_add_(0, y, x.double())

    def _scores(self, x: Tensor) -> Tensor:
        means = self.sums / self.counts.clamp(min=1).unsqueeze(1)
        # The squared length of x is the same for every class.
        return 2 * x.double() @ means.T - means.square().sum(1)


class StreamingLDA(_OnePass):
    """Linear discriminant analysis with one covariance for all classes, equal priors.

    The covariance within classes comes from running sums of x, x x^T and counts alone; shrunk to
    (1 - s) S + s (tr S / d) I, as in Hayes & Kanan (2020) and scikit-learn.

    Args:
        shrinkage: s, above 0 and at most 1.
    """

    def __init__(self, features: int, classes: int, shrinkage: float = 1e-3) -> None:
        super().__init__(classes)
        self.shrinkage = shrinkage
        self.gram = _zeros(features, features)
        self.cross = _zeros(features, classes)

    def _add(self, x: Tensor, y: Tensor) -> None:
        wide = x.double()
        self.gram.addmm_(wide.T, wide)
        self.cross.index_add_(1, y, wide.T)

    def _scores(self, x: Tensor) -> Tensor:
        weight, bias = discriminant(self.gram, self.cross, self.counts, self.shrinkage)
        return x.double() @ weight + bias


class FlyModel(_OnePass):
    """Sparse binary random projection, its largest responses, one Hebbian pass.

    The input is centred per sample; the k largest responses, scaled to 0..1 by the largest, are
    added to the weights of the label, which stop at 1 (Shen, Dasgupta & Navlakha 2023; the
    variant compared in Bricken et al. 2023).

    Args:
        generator: source of the projection.
        share: k / R.
        lr: learning rate.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        generator: torch.Generator | None = None,
        share: float = 0.05,
        lr: float = 0.005,
    ) -> None:
        super().__init__(classes)
        self.k, self.lr = max(1, round(share * neurons)), lr
        self.projection = _connections(neurons, features, CONNECTIONS, generator)
        self.weight = _zeros(neurons, classes)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        centred = x - x.mean(1, keepdim=True)
        values, indices, *_ = topk(centred @ self.projection.T, self.k)
        values = values.relu()
        largest = values[:, :1]
        return (values / torch.where(largest > 0, largest, 1.0)).double(), indices

    def _add(self, x: Tensor, y: Tensor) -> None:
        neurons, classes = self.weight.shape
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            values, indices = self._code(part)
            targets = F.one_hot(labels, classes).double()
            self.weight += self.lr * row_gradient(values, targets, indices, neurons)
        # Steps only ever add, so clipping once at the end is clipping after each.
        self.weight.clamp_(max=1.0)

    def _scores(self, x: Tensor) -> Tensor:
        codes = map(self._code, x.split(CHUNK))
        return torch.cat([sparse_linear(*code, self.weight) for code in codes])


class _Ridge(_OnePass):
    """Ridge regression of the one-hot labels on a hidden layer."""

    def __init__(self, classes: int, neurons: int, ridge: float) -> None:
        super().__init__(classes)
        self.ridge = ridge
        self.gram = _zeros(neurons, neurons, dtype=gram_dtype(neurons))
        self.cross = _zeros(neurons, classes)

    def _hidden(self, x: Tensor) -> Tensor:
        """x [N, d] -> [N, R] float32."""
        raise NotImplementedError

    def _accumulate(self, x: Tensor, y: Tensor, gram: Tensor, cross: Tensor) -> None:
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            hidden = self._hidden(part).to(gram.dtype)
            gram.addmm_(hidden.T, hidden)
            cross.index_add_(1, labels, hidden.T.double())

    def _own(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gram matrix and class sums of these data, which are added to those of all data too."""
        own = torch.zeros_like(self.gram), torch.zeros_like(self.cross)
        self._accumulate(x, y, *own)
        self.gram += own[0]
        self.cross += own[1]
        return own

    def _penalize(self, penalty: float) -> None:
        """Makes this the number that is added to the diagonal of the present Gram matrix."""
        self.ridge = penalty / self.gram.diagonal().mean().item()

    def _scores(self, x: Tensor) -> Tensor:
        weight = ridge_solution(self.gram, self.cross, self.ridge).float()
        return torch.cat([self._hidden(part) @ weight for part in x.split(CHUNK)])


class RidgeProbe(_Ridge):
    """Ridge regression of the one-hot labels on the input itself and a constant.

    Args:
        ridge: in units of the Gram matrix's mean diagonal entry.
    """

    def __init__(self, features: int, classes: int, ridge: float = 1e-4) -> None:
        super().__init__(classes, features + 1, ridge)

    def _hidden(self, x: Tensor) -> Tensor:
        return F.pad(x.float(), (0, 1), value=1.0)

    def _add(self, x: Tensor, y: Tensor) -> None:
        self._accumulate(x, y, self.gram, self.cross)


class _RandomRidge(_Ridge):
    """Ridge regression on a hidden layer with a Gaussian projection P."""

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        generator: torch.Generator | None,
        ridge: float,
    ) -> None:
        super().__init__(classes, neurons, ridge)
        self.projection = torch.randn(neurons, features, generator=generator, device="cpu")


class RandomReLU(_RandomRidge):
    """relu(x P^T) with a Gaussian P, and ridge regression on the one-hot labels.

    This is the classifier of ACIL (Zhuang et al. 2022), whose recursive least squares gives the
    same weight: the Gram matrix is updated task by task.

    Args:
        generator: source of P.
        ridge: in units of the Gram matrix's mean diagonal entry.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        generator: torch.Generator | None = None,
        ridge: float = 1e-4,
    ) -> None:
        super().__init__(features, classes, neurons, generator, ridge)

    def _hidden(self, x: Tensor) -> Tensor:
        return (x.float() @ self.projection.T).relu()

    def _add(self, x: Tensor, y: Tensor) -> None:
        self._accumulate(x, y, self.gram, self.cross)


class RanPAC(RandomReLU):
    """RandomReLU that chooses its own penalty at each task (McDonnell et al. 2023).

    Class sums X of the hidden layer are the prototypes, decorrelated by (G + r I)^-1. Of the
    candidates, r has the least squared error on a random fifth of the newest task, after a fit to
    the rest of that task (public code, RanPAC.py). r is absolute, in the units of scaled inputs.

    Args:
        generator: source of P.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(features, classes, neurons, generator)

    def _add(self, x: Tensor, y: Tensor) -> None:
        # Files may be sorted by class.
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu")
        fitted, held = order.tensor_split([int(FITTED * len(x))])
        moments = self._own(x[fitted], y[fitted]), self._own(x[held], y[held])
        self._penalize(held_out_choice(candidates(self.gram), *moments[0], *moments[1]))


class FlyCL(_RandomRidge):
    """Sparse projection, its k largest responses, streaming ridge (Zou et al. 2026).

    Each neuron has Gaussian weights on some inputs and none on the others. Of the candidates, the
    penalty r has the least score of generalised cross-validation on the newest task (public code,
    main.py). r is absolute, in the units of scaled inputs.

    Args:
        generator: source of the projection.
        share: k / R.
        connections: share of the inputs that a neuron takes.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        generator: torch.Generator | None = None,
        share: float = 0.3,
        connections: float = 0.4,
    ) -> None:
        super().__init__(features, classes, neurons, generator, ridge=1.0)
        self.k = max(1, round(share * neurons))
        self.projection *= _connections(neurons, features, connections, generator)

    def _hidden(self, x: Tensor) -> Tensor:
        scores = x.float() @ self.projection.T
        values, indices, *_ = topk(scores, self.k)
        return torch.zeros_like(scores).scatter_(1, indices, values)

    def _add(self, x: Tensor, y: Tensor) -> None:
        gram, cross = self._own(x, y)
        self._penalize(cross_validated_choice(candidates(self.gram), gram, cross, len(x)))


Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A learner of the table, and the settings that are tried for it.

    Args:
        build: (d, C, R, generator, **settings) -> the learner.
        early: settings that the fit depends on.
        late: settings that predict alone depends on. They are attributes of the learner too, so
            all of them are tried on one fit.
    """

    name: str
    build: Callable[..., Learner]
    early: Sequence[Settings] = ({},)
    late: Sequence[Settings] = ({},)

    def make(
        self, features: int, classes: int, neurons: int, seed: int, settings: Settings
    ) -> Learner:
        """The learner with these settings, early or late; a seed decides its random numbers."""
        generator = torch.Generator().manual_seed(seed)
        return self.build(features, classes, neurons, generator, **settings)


def entries(features: int, neurons: int) -> list[Entry]:
    """The learners to compare on d inputs with R neurons; some ignore R, some need R >= 2 d."""
    strengths = (1e-4, 1e-3, 1e-2, 1e-1)
    shares = (0.1, 0.2, 0.3, 0.4)
    fly = [
        {"share": s, "lr": lr} for s in (0.01, 0.05, 0.1) for lr in (1e-4, 1e-3, 5e-3, 2e-2, 1e-1)
    ]
    flycl = [{"share": s, "connections": c} for c in (0.1, 0.4) for s in shares]
    codes = [{"share": s, "power": p} for p in (1.0, 0.5) for s in shares]
    readouts = [{"readout": r, "strength": s} for r in ("lda", "ridge") for s in strengths[:3]]
    found = [
        Entry("nearest class mean", lambda d, c, r, g: NearestClassMean(d, c)),
        Entry(
            "streaming LDA",
            lambda d, c, r, g, **settings: StreamingLDA(d, c, **settings),
            late=[{"shrinkage": s} for s in strengths],
        ),
        Entry(
            "ridge probe",
            lambda d, c, r, g, **settings: RidgeProbe(d, c, **settings),
            late=[{"ridge": s} for s in (1e-6, 1e-5, *strengths)],
        ),
        Entry("FlyModel", FlyModel, fly),
        Entry("random ReLU + ridge", RandomReLU, late=[{"ridge": s} for s in (1e-5, *strengths)]),
        Entry("RanPAC", RanPAC),
        Entry("Fly-CL", FlyCL, flycl),
        Entry("sparse code, Gaussian addresses", _sparse_code, codes, readouts),
    ]
    side = math.isqrt(features)
    if side * side == features and features >= 784:  # a square image, not 256 features
        local = [{"share": s, "width": w} for w in (3.0, 6.0) for s in shares]
        found.append(Entry("sparse code, local addresses", _sparse_code, local, readouts))
    if neurons >= 2 * features:
        build = partial(_sparse_code, beside=True)
        # A code of share 1 is a plain ReLU: it shows what sparseness gains.
        for name, tried in (
            ("sparse code beside the input", (0.1, 0.2, 0.4)),
            ("control: ReLU beside the input", (1.0,)),
        ):
            early = [{"share": s, "power": p} for p in (1.0, 0.5) for s in tried]
            found.append(Entry(name, build, early, readouts[:3]))
    return found


def _sparse_code(
    features: int,
    classes: int,
    neurons: int,
    generator: torch.Generator,
    share: float,
    power: float = 1.0,
    width: float | None = None,
    beside: bool = False,
    **readout: Any,
) -> Learner:
    """A random code of this share of active neurons; width: of local addresses, else Gaussian."""
    count = neurons - features * beside
    if width is None:
        addresses = torch.randn(count, features, generator=generator, device="cpu")
    else:
        addresses = local_addresses(count, math.isqrt(features), generator, width)
    code = RandomCode(addresses, max(1, round(share * count)), power, beside)
    return CodeReadout(code, classes, **readout)
