"""The penalties and their gradients against paper.md's formulas, written as loops, in fp64."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.activations import evaluating
from ssd.errors import UserError
from ssd.models import SDMLP, Network, ReLUMLP
from ssd.regularizers import (
    EWC,
    IMPORTANCE_BATCH_SIZE,
    IMPORTANCE_BATCHES,
    L2,
    MAS,
    SI,
    Gradient,
    Metaplasticity,
    Quadratic,
    beta_loss,
)

FEATURES, CLASSES, SAMPLES, BATCH = 6, 4, 600, 100  # importance: a batch of 512 and one of 88
COEFFICIENT, BETA = 7.0, 0.3
FREQUENCY = torch.rand(40, dtype=torch.float64)  # of activations, which no penalty reads

MODELS: dict[str, Callable[[], nn.Module]] = {
    "gaba": lambda: SDMLP(FEATURES, 40, CLASSES, 3, anneal_samples=200, dtype=torch.float64),
    "flat": lambda: SDMLP(FEATURES, 150, CLASSES, 2, "mask", "flat", dtype=torch.float64),
    "mlp": lambda: nn.Sequential(
        nn.Linear(FEATURES, 10), nn.ReLU(), nn.Linear(10, CLASSES)
    ).double(),
}
REGULARIZERS: dict[str, Callable[[nn.Module], Quadratic]] = {
    "ewc": lambda model: EWC(model, COEFFICIENT, BETA),
    "mas": lambda model: MAS(model, COEFFICIENT),
    "si": lambda model: SI(model, COEFFICIENT, BETA),
    "l2": lambda model: L2(model, COEFFICIENT),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def task(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels of two classes, and an order to sample them in."""
    draw = torch.Generator().manual_seed(number)
    y = 2 * (number % 2) + torch.arange(SAMPLES) % 2
    noise = torch.randn(SAMPLES, FEATURES, generator=draw, dtype=torch.float64)
    x = 2 * F.one_hot(y, FEATURES) + 0.4 * noise
    return x, y, torch.randperm(SAMPLES, generator=draw)


def detached(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gradient_of(regularizer: Quadratic) -> list[Tensor]:
    gradients = [torch.zeros_like(p) for p in regularizer.parameters]
    regularizer.add_gradient(gradients)
    return gradients


def gradient_on(model: nn.Module, x: Tensor) -> Gradient:
    """In evaluation, as the trainer gives it to a regulariser."""

    def gradient(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with evaluating(model), torch.enable_grad():
            return torch.autograd.grad(loss(model(x)), list(model.parameters()))

    return gradient


def step(model: nn.Module, regularizer: Quadratic, x: Tensor, y: Tensor) -> None:
    """SGD on cross entropy and penalty with the gradient clipped, as the trainer does it."""
    regularizer.before_step(gradient_on(model, x), y)
    parameters = list(model.parameters())
    gradients = list(torch.autograd.grad(F.cross_entropy(model(x), y), parameters))
    regularizer.add_gradient(gradients)
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    with torch.no_grad():
        for p, gradient in zip(parameters, gradients, strict=True):
            p -= 0.3 / max(1.0, norm.item()) * gradient
    if isinstance(model, SDMLP):
        model.constrain()
    regularizer.after_step()


class Naive:
    """The table "Penalties" of paper.md: a list of (importance, p*), one for each term."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.terms: list[tuple[list[Tensor], list[Tensor]]] = []
        self.start = detached(model)
        self.w = [torch.zeros_like(p) for p in self.start]

    def gradient(self, loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
        twin = deepcopy(self.model).eval()
        return torch.autograd.grad(loss(twin(x)), list(twin.parameters()))

    def beta_softmax_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        rows = zip(logits, labels, strict=True)
        return -sum((BETA * row).log_softmax(0)[label] for row, label in rows)

    def before_step(self, x: Tensor, y: Tensor) -> None:
        self.unregularised = self.gradient(lambda z: self.beta_softmax_loss(z, y), x)
        self.before = detached(self.model)

    def after_step(self) -> None:
        moved = [new - old for new, old in zip(detached(self.model), self.before, strict=True)]
        steps = zip(self.w, self.unregularised, moved, strict=True)
        self.w = [w - g * dtheta for w, g, dtheta in steps]

    def end_task(self, x: Tensor, order: Tensor) -> None:
        now = detached(self.model)
        new = [torch.zeros_like(p) for p in now]
        for first in range(0, min(len(order), 6 * 512), 512):
            batch = x[order[first : min(first + 512, 6 * 512)]]
            if self.name == "ewc":
                g = self.gradient(lambda z: self.beta_softmax_loss(z, z.argmax(1)), batch)
                new = [f + g**2 / (5 * 512) for f, g in zip(new, g, strict=True)]
            elif self.name == "mas":
                g = self.gradient(lambda z: (z**2).mean(), batch)
                batches_in_loader = -(-len(x) // 512)
                new = [o + g.abs() / batches_in_loader for o, g in zip(new, g, strict=True)]
        if self.name == "ewc":
            self.terms.append((new, now))
            return
        if self.name == "si":
            way = [p - start for p, start in zip(now, self.start, strict=True)]
            new = [w / (dtheta**2 + 0.1) for w, dtheta in zip(self.w, way, strict=True)]
            self.w = [torch.zeros_like(w) for w in self.w]
            self.start = now
        if self.name == "l2":
            total = [torch.ones_like(p) for p in now]
        elif self.terms:
            total = [old + o for old, o in zip(self.terms[0][0], new, strict=True)]
        else:
            total = new
        self.terms = [(total, now)]

    def penalty(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for importance, anchor in self.terms:
            for o, p, star in zip(importance, self.model.parameters(), anchor, strict=True):
                total = total + COEFFICIENT * (o * (p - star) ** 2).sum()
        return total


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", REGULARIZERS)
def test_penalty_and_gradient_equal_the_formula(name: str, kind: str) -> None:
    """At every one of 18 steps of SGD over three tasks."""
    model = MODELS[kind]()
    regularizer, naive = REGULARIZERS[name](model), Naive(name, model)
    parameters = list(model.parameters())
    largest = 0.0
    for number in range(3):
        x, y, order = task(number)
        for batch in torch.arange(SAMPLES).split(BATCH):
            naive.before_step(x[batch], y[batch])
            step(model, regularizer, x[batch], y[batch])
            naive.after_step()
            ours, theirs = regularizer.penalty(), naive.penalty()
            assert regularizer.active == (number > 0)
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-15)
            if number == 0:
                assert all(not g.any() for g in gradient_of(regularizer))
                continue
            expected = torch.autograd.grad(theirs, parameters)
            for g, e in zip(gradient_of(regularizer), expected, strict=True):
                torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-14)
                largest = max(largest, e.abs().max().item())
        regularizer.end_task(x, order, FREQUENCY)
        naive.end_task(x, order)
    assert largest > 1e-2  # the comparison had something to compare


@pytest.mark.parametrize("name", ["ewc", "mas"])
def test_importance_of_six_batches(name: str) -> None:
    """A task of 8 batches and a bit: 6 are sampled; MAS divides by 9."""
    model = MODELS["mlp"]()
    regularizer, naive = REGULARIZERS[name](model), Naive(name, model)
    x = torch.randn((IMPORTANCE_BATCHES + 2) * IMPORTANCE_BATCH_SIZE + 100, FEATURES).double()
    order = torch.randperm(len(x))
    regularizer.end_task(x, order, FREQUENCY)
    naive.end_task(x, order)
    for ours, theirs in zip(regularizer.curvature, naive.terms[0][0], strict=True):
        torch.testing.assert_close(ours, 2 * COEFFICIENT * theirs, rtol=1e-10, atol=1e-14)
        assert theirs.any()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_rows(name: str) -> None:
    """The rows named are all that the penalty pulls on, and can be had alone."""
    model = MODELS["flat"]()
    regularizer = REGULARIZERS[name](model)
    for number in range(2):
        x, y, order = task(number)
        for batch in torch.arange(SAMPLES).split(BATCH):
            step(model, regularizer, x[batch], y[batch])
        regularizer.end_task(x, order, FREQUENCY)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.rand_like(p)
    dense, rows = gradient_of(regularizer), regularizer.rows()
    if name == "l2":
        assert rows is None
        rows = torch.tensor([3, 17, 120])
    else:
        touched = torch.stack([g.any(1) for g in dense]).any(0)
        assert rows is not None
        assert torch.equal(rows, touched.nonzero().squeeze(1))
        assert 10 < len(rows) < 140
    noise = [torch.randn(len(rows), g.shape[1]).double() for g in dense]
    ours = [n.clone() for n in noise]
    regularizer.add_row_gradient(ours, rows)
    for gradient, n, g in zip(ours, noise, dense, strict=True):
        torch.testing.assert_close(gradient, n + g[rows], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("number", [0, 1])
def test_rows_of_a_single_parameter(number: int) -> None:
    """A neuron is named where any one of its parameters is pulled on."""
    regularizer = REGULARIZERS["ewc"](MODELS["flat"]())
    state = deepcopy(regularizer.state_dict())
    state[f"curvature/{number}"][[7, 30], 1] = 0.5
    regularizer.load_state_dict(state)
    assert regularizer.rows().tolist() == [7, 30]


def test_rows_need_a_neuron_for_each_row() -> None:
    """An MLP's parameters have no rows in common: all of it is named."""
    regularizer = REGULARIZERS["ewc"](MODELS["mlp"]())
    assert regularizer.rows() is None
    assert REGULARIZERS["ewc"](MODELS["flat"]()).rows().tolist() == []


@pytest.mark.parametrize("name", REGULARIZERS)
def test_resumed_in_the_middle_of_a_task(name: str) -> None:
    """The rest of the run and the next task come out to the bit, from a fresh start's objects."""
    model = MODELS["flat"]()
    regularizer = REGULARIZERS[name](model)
    other = MODELS["flat"]()
    resumed = REGULARIZERS[name](other)
    for number in range(3):
        x, y, order = task(number)
        for position, batch in enumerate(torch.arange(SAMPLES).split(BATCH)):
            if (number, position) == (2, 3):
                other.load_state_dict(model.state_dict())
                resumed.load_state_dict(deepcopy(regularizer.state_dict()))
                assert resumed.active
                assert_same(regularizer, resumed)
            step(model, regularizer, x[batch], y[batch])
            if (number, position) >= (2, 3):
                step(other, resumed, x[batch], y[batch])
        regularizer.end_task(x, order, FREQUENCY)
    resumed.end_task(x, order, FREQUENCY)
    step(model, regularizer, x, y)
    step(other, resumed, x, y)
    assert all(torch.equal(a, b) for a, b in zip(detached(model), detached(other), strict=True))
    assert_same(regularizer, resumed)


def assert_same(one: Quadratic, two: Quadratic) -> None:
    assert one.penalty() != 0
    assert torch.equal(one.penalty(), two.penalty())
    for a, b in zip(gradient_of(one), gradient_of(two), strict=True):
        assert torch.equal(a, b)
    assert str(one.rows()) == str(two.rows())


@pytest.mark.parametrize("name", REGULARIZERS)
def test_measuring_changes_nothing_in_the_model(name: str) -> None:
    """The public code's Fisher pass advances the GABA counters; ours must not."""
    model = MODELS["gaba"]().train()
    regularizer = REGULARIZERS[name](model)
    x, y, order = task(0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    regularizer.before_step(gradient_on(model, x), y)
    regularizer.after_step()
    regularizer.end_task(x, order, FREQUENCY)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", REGULARIZERS)
def test_at_the_anchor_there_is_no_pull(name: str) -> None:
    """In float32 too: rounding must not move what no task has moved."""
    model = MODELS["mlp"]().float()
    regularizer = REGULARIZERS[name](model)
    x, y, order = task(0)
    for batch in torch.arange(SAMPLES).split(BATCH):
        step(model, regularizer, x[batch].float(), y[batch])
    regularizer.end_task(x.float(), order, FREQUENCY)
    assert all(c.any() for c in regularizer.curvature)
    assert all(not g.any() for g in gradient_of(regularizer))
    assert regularizer.penalty() == 0


def test_ewc_of_a_task_that_changes_nothing_twice_as_strong() -> None:
    """Two terms with one anchor: the importances add up and the anchor stays."""
    model = MODELS["mlp"]()
    regularizer = REGULARIZERS["ewc"](model)
    x, _, order = task(0)
    regularizer.end_task(x, order, FREQUENCY)
    once = [c.clone() for c in regularizer.curvature]
    regularizer.end_task(x, order, FREQUENCY)
    for c, twice in zip(once, regularizer.curvature, strict=True):
        assert torch.equal(2 * c, twice)
    assert regularizer.penalty() == 0


@pytest.mark.parametrize("label", [-100, -1, CLASSES])
def test_a_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(ValueError, match=f"beta_loss: labels run .*{label}"):
        beta_loss(torch.randn(3, CLASSES), torch.tensor([0, label, 1]), BETA)


def test_metaplasticity_slows_addresses_by_past_use() -> None:
    """1 / (1 + coefficient * sum over tasks of frequency / mean frequency); the decoder is free."""
    model = SDMLP(FEATURES, 4, CLASSES, 2, dtype=torch.float64)
    slow = Metaplasticity(model, 3.0)
    assert not slow.active
    x, _, order = task(0)
    slow.end_task(x, order, torch.tensor([0.0, 0.1, 0.1, 0.2]).double())
    slow.end_task(x, order, torch.tensor([0.4, 0.0, 0.0, 0.0]).double())
    assert slow.active
    assert slow.penalty() == 0
    assert slow.rows().tolist() == []
    expected = 1 / (1 + 3 * torch.tensor([4.0, 1.0, 1.0, 2.0]).double())
    gradients = [torch.rand_like(p) for p in model.parameters()]
    dense, some = ([g.clone() for g in gradients] for _ in range(2))
    slow.add_gradient(dense)
    torch.testing.assert_close(dense[0], gradients[0] * expected.unsqueeze(1))
    assert torch.equal(dense[1], gradients[1])
    rows = torch.tensor([3, 1])
    some = [g[rows] for g in some]
    slow.add_row_gradient(some, rows)
    assert all(torch.equal(ours, full[rows]) for ours, full in zip(some, dense, strict=True))
    resumed = Metaplasticity(model, 3.0)
    resumed.load_state_dict(deepcopy(slow.state_dict()))
    again = [g.clone() for g in gradients]
    resumed.add_gradient(again)
    assert resumed.active
    assert all(torch.equal(ours, full) for ours, full in zip(again, dense, strict=True))


def test_metaplasticity_of_other_networks() -> None:
    """Weights and biases of the layer are slowed; a layer without any is refused."""
    model = ReLUMLP(FEATURES, 4, CLASSES, torch.Generator())
    slow = Metaplasticity(model, 1.0)
    x, _, order = task(0)
    slow.end_task(x, order, torch.tensor([1.0, 1.0, 2.0, 0.0]).double())
    gradients = [torch.ones_like(p) for p in model.parameters()]
    slow.add_gradient(gradients)
    rates = torch.tensor([0.5, 0.5, 1 / 3, 1.0])
    torch.testing.assert_close(gradients[0], rates.unsqueeze(1).expand(4, FEATURES))
    torch.testing.assert_close(gradients[1], rates)
    assert all(bool((g == 1).all()) for g in gradients[2:])

    class Bare(Network):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.ReLU(), nn.Linear(FEATURES, CLASSES)

    with pytest.raises(UserError, match="metaplasticity needs a layer with weights"):
        Metaplasticity(Bare(), 1.0)


def test_metaplasticity_after_a_task_in_which_nothing_fires() -> None:
    model = SDMLP(FEATURES, 4, CLASSES, 2)
    slow = Metaplasticity(model, 3.0)
    x, _, order = task(0)
    slow.end_task(x, order, torch.zeros(4, dtype=torch.float64))
    assert bool((slow.rates == 1).all())
