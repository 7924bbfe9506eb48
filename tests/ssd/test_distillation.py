"""The distiller: its terms, its selection, and that it attaches to any module with Top-K layers."""

import copy
import gc
import io
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from ssd.activations import count_activations, evaluating
from ssd.cuda_graph import GraphedEpochs
from ssd.distillation import Distiller, select_subnetwork
from ssd.losses import HIDDEN_LOSSES, HiddenLoss, distillation_loss
from ssd.ops.distill import distill
from ssd.trainer import Trainer
from ssd_kernels.nn import KSparseMLP, TopK, TopKLinear
from tests.ssd.test_together import BASE as TOGETHER
from tests.ssd.test_together import make_learner


class KWinnersMLP(nn.Module):
    """Three linear layers, two k-winners layers of different k."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.winners1 = nn.Linear(12, 40), TopK(6)
        self.second, self.winners2 = nn.Linear(40, 30), TopK(4)
        self.head = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.winners1(self.first(x))
        return self.head(self.winners2(self.second(hidden)))


class Foreign(nn.Module):
    """A Top-K layer that knows nothing of ours, and has no k."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * (x >= x.topk(3, dim=-1).values[:, -1:])


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_distillation_loss_is_the_formula(kl: str) -> None:
    student, teacher = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    pair = (q.log(), p) if kl == "reverse" else (p.log(), q)
    expected = 9 * F.kl_div(*pair, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0, kl), expected)
    assert distillation_loss(student, student, 3.0, kl) == 0


def test_short_dtypes_are_distilled_in_float32() -> None:
    student, teacher = torch.randn(2, 7, 5).bfloat16()
    loss = distillation_loss(student, teacher, 8.0)
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), 8.0))
    task = second_task()
    with torch.autocast("cpu", torch.bfloat16):
        logits = task.model(task.x[:4])
    assert logits.dtype == torch.bfloat16
    loss = task.loss(logits, 0)
    wide = task.loss(logits.float(), 0, hidden=task.distiller.activations(logits))
    assert torch.equal(loss, wide)


def test_one_neuron_has_nothing_to_distil() -> None:
    assert distillation_loss(torch.randn(4, 1), torch.randn(4, 1), 8.0) == 0


def test_selection_takes_the_most_frequent_and_the_lower_of_equals() -> None:
    frequency = torch.tensor([3, 9, 3, 0, 9, 3])
    assert select_subnetwork(frequency, 2).tolist() == [1, 4]
    assert select_subnetwork(frequency, 4).tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("hidden", ["after", "before"])
def test_attaches_to_a_three_layer_mlp_with_two_k_winners_layers(hidden: str) -> None:
    model = KWinnersMLP().double()
    distiller = Distiller(model, 0.6, 0.3, 4.0, subnetwork=1.5, hidden=hidden)
    assert distiller.layers == {"winners1": 6, "winners2": 4}
    x, y = torch.randn(50, 12).double(), torch.randint(0, 5, (50,))
    distiller.begin_task(x)
    assert not distiller.teaches
    first = distiller.loss(model(x), y, torch.arange(50))
    torch.testing.assert_close(first, F.cross_entropy(model(x), y))
    distiller.end_task(x)

    teacher = copy.deepcopy(model)
    inner = model.winners1(model.first(x))
    frequency = (inner > 0).sum(0)
    chosen = frequency.sort(descending=True, stable=True).indices[:9].sort().values
    assert torch.equal(distiller.neurons["winners1"], chosen)
    assert len(distiller.neurons["winners2"]) == 6

    new, labels = torch.randn(30, 12).double(), torch.randint(0, 5, (30,))
    distiller.begin_task(new)
    assert distiller.teaches
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batch = torch.tensor([4, 8, 15, 16])

    def hidden_of(network: KWinnersMLP) -> list[Tensor]:
        a1 = network.first(new[batch])
        h1 = network.winners1(a1)
        a2 = network.second(h1)
        if hidden == "before":
            return [a1.relu(), a2.relu()]
        return [h1, network.winners2(a2)]

    terms = [
        distillation_loss(s[:, n], t.detach()[:, n], 4.0)
        for s, t, n in zip(
            hidden_of(model), hidden_of(teacher), distiller.neurons.values(), strict=True
        )
    ]
    logit_term = distillation_loss(model(new[batch]), teacher(new[batch]).detach(), 4.0)
    cross_entropy = F.cross_entropy(model(new[batch]), labels[batch])
    expected = 0.6 * cross_entropy + 0.4 * (0.3 * (terms[0] + terms[1]) / 2 + 0.7 * logit_term)
    actual = distiller.loss(model(new[batch]), labels[batch], batch)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_attaches_to_sparse_and_foreign_layers() -> None:
    x, y = torch.randn(20, 12), torch.randint(0, 4, (20,))
    mixed = nn.Sequential(nn.Linear(12, 25), Foreign(), KSparseMLP(25, 30, 4, 5))
    distiller = Distiller(mixed, layers={"1": 3, "2.encoder": 5})
    distiller.end_task(x)
    distiller.begin_task(x)
    assert {n: len(i) for n, i in distiller.neurons.items()} == {"1": 3, "2.encoder": 5}
    distiller.loss(mixed(x), y, torch.arange(20)).backward()
    assert all(p.grad is not None for p in mixed.parameters())
    distiller.remove()
    assert not mixed[1]._forward_hooks


def test_the_teacher_is_frozen_and_run_once_a_task() -> None:
    model = KSparseMLP(6, 20, 3, 4)
    x = torch.randn(10, 6)
    distiller = Distiller(model)
    distiller.end_task(x)
    distiller.begin_task(x)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = distiller.teacher_logits.clone()
    for _ in range(3):
        loss = distiller.loss(model(x), torch.zeros(10, dtype=torch.long), torch.arange(10))
        with torch.no_grad():
            for p, g in zip(
                model.parameters(),
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            ):
                p.sub_(g)
    assert len(calls) == 3
    assert torch.equal(before, distiller.teacher_logits)
    assert not distiller.teacher_logits.requires_grad


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("logits", ["all", "seen"])
@pytest.mark.parametrize("lam", [0.0, 0.4])
@pytest.mark.parametrize("hidden_loss", ["kl", "mse"])
def test_terms_are_what_the_loss_is_made_of(
    hidden_loss: str, lam: float, logits: str, kl: str
) -> None:
    model = nn.Sequential(nn.Linear(12, 40), TopK(6), nn.Linear(40, 5))
    options = {"lam": lam, "logits": logits, "kl": kl, "hidden_loss": hidden_loss}
    task = second_task(model, classes=4, hidden_weight=3.0, **options)
    samples = torch.tensor([7, 3, 50])
    terms = task.distiller.terms(samples)
    optional = {"columns": logits == "seen", "target_hidden": lam > 0}
    expected = {"target_logits", "alpha", "lam", "temperature", "kl"}
    expected |= {"hidden_loss", "hidden_weight"}
    assert terms.keys() == expected | {name for name, given in optional.items() if given}
    if logits == "seen":
        assert terms["columns"].tolist() == [[True] * 4 + [False]] * 3
    output = model(task.x[samples])
    if lam > 0:
        terms["hidden"] = task.distiller.activations(output)["1"]
    got = distill(output, task.y[samples], **terms)
    loss = task.distiller.loss(output, task.y[samples], samples)
    torch.testing.assert_close(got.loss.mean(), loss.detach())
    losses = task.distiller.losses(output, task.y[samples], samples)
    names = ["cross_entropy", "logits", *(["hidden"] if lam > 0 else [])]
    assert list(losses) == names
    torch.testing.assert_close(sum(losses.values()), loss)
    (slope,) = torch.autograd.grad(loss, output)
    torch.testing.assert_close(got.grad_logits / 3, slope)


def test_terms_without_a_teacher_or_of_several_layers() -> None:
    model = nn.Sequential(nn.Linear(12, 40), TopK(6), nn.Linear(40, 5))
    assert Distiller(model).terms(torch.arange(3)) == {}
    with pytest.raises(ValueError, match=r"one layer, not \['winners1', 'winners2'\]"):
        second_task().distiller.terms(torch.arange(3))


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> str:
    """A new hidden loss, for the time of a test."""

    def mean_square(student: Tensor, teacher: Tensor, *_: Any) -> Tensor:
        return (student - teacher).square().mean(-1)

    monkeypatch.setitem(HIDDEN_LOSSES, "mean square", HiddenLoss(mean_square))
    return "mean square"


def test_a_new_hidden_loss_takes_the_place_of_the_kl(squares: str) -> None:
    task = second_task(hidden_loss=squares)
    samples = torch.tensor([7, 3, 50])
    logits = task.model(task.x[samples])
    hidden = task.distiller.activations(logits)
    of_layers = [
        F.mse_loss(z, task.distiller.teacher_hidden[name][samples]) for name, z in hidden.items()
    ]
    of_logits = distillation_loss(logits, task.distiller.teacher_logits[samples], 2.0)
    cross_entropy = F.cross_entropy(logits, task.y[samples])
    expected = 0.5 * cross_entropy + 0.25 * sum(of_layers) / 2 + 0.25 * of_logits
    torch.testing.assert_close(task.distiller.loss(logits, task.y[samples], samples), expected)
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(torch.randn(4, 5), torch.randn(5), 2.0, hidden_loss=squares)


def test_no_other_loss_is_fused(squares: str) -> None:
    model = nn.Sequential(nn.Linear(12, 40), TopK(6), nn.Linear(40, 5))
    assert Distiller(model).fused
    assert Distiller(model, lam=0.0, hidden_loss=squares).fused
    assert not Distiller(KWinnersMLP()).fused
    other = second_task(model, hidden_loss=squares).distiller
    assert not other.fused
    with pytest.raises(ValueError, match=r"kl or mse of one layer, not \['1'\] with .*='mean sq"):
        other.terms(torch.arange(3))


def test_a_trainer_takes_the_plain_step_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KL under another name trains as the fused one does."""
    monkeypatch.setitem(HIDDEN_LOSSES, "other", HIDDEN_LOSSES["kl"])
    config = replace(TOGETHER, method="ssd", tasks=2, epochs=2, lam=0.5)
    trained = []
    for hidden_loss in ("kl", "other"):
        learner = make_learner(config, torch.float64)
        names = ("alpha", "lam", "temperature", "subnetwork")
        settings = {name: getattr(config, name) for name in names}
        learner.distiller = Distiller(learner.model, **settings, hidden_loss=hidden_loss)
        trainer = Trainer([learner])
        assert bool(trainer.stacks) == learner.sparse == (hidden_loss == "kl")
        assert GraphedEpochs.serves([learner]) == learner.sparse
        for _ in trainer.run():
            pass
        trained.append([p.detach() for p in learner.parameters])
    torch.testing.assert_close(*trained, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("logits", ["all", "seen"])
def test_state_dict_round_trip(logits: str) -> None:
    model, x, y = KWinnersMLP(), torch.randn(25, 12), torch.arange(25) % 3
    one = Distiller(model, logits=logits, frequency="accumulated")
    one.end_task(x, y)
    one.begin_task(x)
    two = Distiller(model, logits=logits, frequency="accumulated")
    two.load_state_dict(one.state_dict())
    batch = torch.arange(5)
    assert torch.equal(
        one.loss(model(x[batch]), y[batch], batch), two.loss(model(x[batch]), y[batch], batch)
    )
    one.end_task(x + 1, y + 2)
    two.end_task(x + 1, y + 2)
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])


class Task(NamedTuple):
    """A model that has moved away from its teacher, in the middle of a task."""

    model: nn.Module
    distiller: Distiller
    x: Tensor
    y: Tensor

    def loss(self, logits: Tensor, first: int, **options: Any) -> Tensor:
        samples = torch.arange(first, first + len(logits))
        return self.distiller.loss(logits, self.y[samples], samples, **options)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def second_task(model: nn.Module | None = None, classes: int = 5, **options: Any) -> Task:
    model = KWinnersMLP() if model is None else model
    distiller = Distiller(model, **{"alpha": 0.5, "lam": 0.5, "temperature": 2.0} | options)
    x, y = torch.randn(60, 12), torch.arange(60) % classes
    distiller.end_task(x, y)
    distiller.begin_task(x)
    moved(model)
    return Task(model, distiller, x, y)


def alone(task: Task, first: int, last: int) -> Tensor:
    """The loss of a batch with nothing else computed in between."""
    return task.loss(task.model(task.x[first:last]), first).detach()


class Wrapped(nn.Module):
    """Calls a function on a model's inputs in place of the model."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.model, x)


@pytest.mark.parametrize("hidden", ["after", "before"])
@pytest.mark.parametrize(
    "between",
    [
        lambda model, x: copy.deepcopy(model)(x),
        lambda model, x: AveragedModel(model)(x),
        lambda model, x: pickle.loads(pickle.dumps(model))(x),
        lambda model, x: model(x),
        lambda model, x: model.winners1(model.first(x)),
        lambda model, x: count_activations(model, ["winners1"], x),
        lambda model, x: moved(model),
    ],
    ids=["deepcopy", "average", "pickle", "itself", "a layer", "counting", "an update"],
)
def test_the_loss_is_of_the_pass_that_gave_the_logits(
    hidden: str, between: Callable[[nn.Module, Tensor], object]
) -> None:
    task = second_task(hidden=hidden)
    expected = alone(task, 0, 4)
    logits = task.model(task.x[:4])
    with evaluating(task.model):
        task.model(task.x[30:50])
    between(task.model, task.x[20:24])
    assert torch.equal(task.loss(logits, 0).detach(), expected)


def test_two_passes_before_their_losses() -> None:
    task = second_task()
    expected = [alone(task, 0, 4), alone(task, 4, 10)]
    first, second = task.model(task.x[:4]), task.model(task.x[4:10])
    for logits, start, loss in ((second, 4, expected[1]), (first, 0, expected[0])):
        actual = task.loss(logits, start)
        assert torch.equal(actual.detach(), loss)
        actual.backward()  # of a graph of its own


def test_activations_die_with_their_logits() -> None:
    for model in (KWinnersMLP(), nn.Sequential(nn.Linear(12, 40), TopK(6))):
        task = second_task(model)
        logits = model(task.x[:4])
        task.loss(logits, 0).backward()
        watched = [weakref.ref(z) for z in task.distiller.activations(logits).values()]
        model(task.x)
        del logits
        gc.collect()
        assert [z() for z in watched] == [None] * len(watched)
        assert len(task.distiller._recorder._passes) == 0


def test_a_failed_pass_leaves_nothing_behind() -> None:
    task = second_task()
    expected = alone(task, 0, 4)
    handle = task.model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.model(task.x[8:12])
    handle.remove()
    task.model.winners1(torch.randn(2, 40))
    assert torch.equal(alone(task, 0, 4), expected)


def test_threads_do_not_see_each_other() -> None:
    meet = threading.Barrier(2)

    def meeting(model: nn.Module, x: Tensor) -> Tensor:
        inner = model.winners1(model.first(x))
        if together:
            meet.wait()
        return model.head(model.winners2(model.second(inner)))

    together = False
    task = second_task(Wrapped(KWinnersMLP(), meeting))
    expected, actual = [alone(task, 0, 4), alone(task, 4, 8)], {}
    together = True

    def run(first: int) -> None:
        actual[first] = task.loss(task.model(task.x[first : first + 4]), first).detach()

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [actual[0], actual[4]] == expected


def saved(thing: Any) -> Any:
    stream = io.BytesIO()
    torch.save(thing, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, saved, lambda thing: pickle.loads(pickle.dumps(thing))]
)
def test_a_copy_of_the_distiller_has_a_model_of_its_own(copied: Callable[[Any], Any]) -> None:
    task = second_task()
    expected = alone(task, 0, 4)
    other = task._replace(distiller=copied(task.distiller))
    other = other._replace(model=other.distiller.model)
    assert other.model is not task.model
    logits = task.model(task.x[:4])
    assert torch.equal(alone(other, 0, 4), expected)
    assert torch.equal(task.loss(logits, 0), task.loss(task.model(task.x[:4]), 0))
    with pytest.raises(ValueError, match="not what the model returned"):
        other.loss(logits, 0)
    moved(other.model)
    assert torch.equal(alone(task, 0, 4), expected)
    task.distiller.remove()
    with pytest.raises(RuntimeError, match="removed"):
        copied(task.distiller).begin_task(task.x)
    other.distiller.begin_task(other.x)


def test_remove_leaves_the_users_hooks_and_later_use_is_refused() -> None:
    task = second_task()
    calls = []
    task.model.winners1.register_forward_hook(lambda *_: calls.append(1))
    expected = alone(task, 0, 4)
    logits = task.model(task.x[:4])
    task.distiller.remove()
    task.distiller.remove()
    assert torch.equal(task.loss(logits, 0).detach(), expected)
    logits = task.model(task.x[:4])
    assert len(calls) == 3
    for use in (
        lambda: task.loss(logits, 0),
        lambda: task.distiller.activations(logits),
        lambda: task.distiller.recording().__enter__(),
        lambda: task.distiller.begin_task(task.x),
        lambda: task.distiller.end_task(task.x),
    ):
        with pytest.raises(RuntimeError, match="removed"):
            use()
    assert [len(m._forward_hooks) for m in task.model.modules() if m._forward_hooks] == [1]


def test_a_distiller_that_is_dropped_takes_its_hooks_along() -> None:
    model = KWinnersMLP()
    Distiller(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "changed",
    [
        lambda logits: logits / 2,
        lambda logits: logits[:, torch.arange(5)],
        lambda logits: logits.double().float(),
        lambda logits: logits.masked_fill(logits < 0, -1e4),
        lambda logits: logits.detach(),
        lambda logits: logits.clone(),
    ],
)
def test_changed_logits_need_the_activations_of_the_models_own(
    changed: Callable[[Tensor], Tensor],
) -> None:
    task = second_task()
    logits = task.model(task.x[:4])
    with pytest.raises(ValueError, match="not what the model returned"):
        task.loss(changed(logits), 0)
    hidden = task.distiller.activations(logits)
    actual = task.loss(changed(logits), 0, hidden=hidden)
    without = second_task(copy.deepcopy(task.model), lam=0.0)
    without.distiller.load_state_dict(task.distiller.state_dict())
    terms = [
        distillation_loss(z, task.distiller.teacher_hidden[n][:4], 2.0) for n, z in hidden.items()
    ]
    teacher = task.distiller.teacher_logits[:4]
    expected = 0.5 * F.cross_entropy(changed(logits), task.y[:4]) + 0.5 * (
        0.5 * distillation_loss(changed(logits), teacher, 2.0) + 0.5 * torch.stack(terms).mean()
    )
    torch.testing.assert_close(actual, expected)


def test_logits_of_no_known_pass_are_refused() -> None:
    task, other = second_task(), second_task()
    logits = task.model(task.x[:4])
    for foreign in (
        other.model(task.x[:4]),
        copy.deepcopy(task.model)(task.x[:4]),
        task.model.forward(task.x[:4]),
        torch.randn(4, 5),
    ):
        with pytest.raises(ValueError, match="not what the model returned"):
            task.loss(foreign, 0)
    task.distiller.end_task(task.x)
    task.distiller.begin_task(task.x)  # with another subnetwork
    with pytest.raises(ValueError, match="not what the model returned"):
        task.loss(logits, 0)


def test_lwf_takes_any_logits() -> None:
    task = second_task(lam=0.0)
    logits = task.model(task.x[:4])
    expected = task.loss(logits, 0)
    torch.testing.assert_close(task.loss(logits / 2 * 2, 0), expected)
    assert len(task.distiller._recorder._passes) == 0


def test_a_pass_without_gradients_has_the_same_loss() -> None:
    task = second_task()
    expected = alone(task, 0, 4)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            logits = task.model(task.x[:4])
        actual = task.loss(logits, 0)
        assert torch.equal(actual, expected)
        assert not actual.requires_grad


def test_functional_call_is_a_pass_too() -> None:
    task = second_task()
    weights = {name: p.detach() + 0.1 for name, p in task.model.named_parameters()}
    logits = torch.func.functional_call(task.model, weights, (task.x[:4],))
    actual = task.loss(logits, 0).detach()
    task.model.load_state_dict(weights)
    torch.testing.assert_close(actual, alone(task, 0, 4))


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_passes(whole: bool) -> None:
    reentrant = False

    def run(model: nn.Module, x: Tensor) -> Tensor:
        inner = model.winners1(model.first(x))

        def rest(inner: Tensor) -> Tensor:
            return model.head(model.winners2(model.second(inner)))

        return checkpoint(rest, inner, use_reentrant=reentrant) if not whole else rest(inner)

    task = second_task(Wrapped(KWinnersMLP(), run))
    plain = second_task(copy.deepcopy(task.model.model))
    state = {n.replace("model.", ""): t for n, t in task.distiller.state_dict().items()}
    plain.distiller.load_state_dict(state)
    plain.model.load_state_dict(task.model.model.state_dict())
    expected = plain.distiller.loss(plain.model(task.x[:4]), task.y[:4], torch.arange(4))
    expected.backward()

    def logits() -> Tensor:
        x = task.x[:4].clone().requires_grad_()
        return checkpoint(task.model, x, use_reentrant=reentrant) if whole else task.model(x)

    loss = task.loss(logits(), 0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(task.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    reentrant = True
    with pytest.raises(ValueError, match="use_reentrant=False"):
        task.loss(logits(), 0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.head(m.winners1(m.winners1(m.second(m.first(x))))), "'model.winners1' ran"),
        (lambda m, x: m.head(m.second(m.winners1(m.first(x)))), "'model.winners2' did not run"),
    ],
)
def test_a_layer_that_runs_twice_or_not_at_all_is_named(
    function: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    odd = Wrapped(KWinnersMLP(), function)
    with pytest.raises(ValueError, match=message):
        Distiller(odd).end_task(torch.randn(9, 12))
    task = second_task(Wrapped(KWinnersMLP(), lambda m, x: m(x)))
    task.model.function = function  # as a layer that is dropped at random
    logits = task.model(task.x[:4])
    with pytest.raises(ValueError, match=message):
        task.loss(logits, 0)
    with (
        pytest.raises(ValueError, match=message),
        task.distiller.recording() as hidden,
    ):
        task.model(task.x[:4])
    assert not hidden


def test_one_layer_at_two_places_is_named() -> None:
    winners = TopK(3)
    model = nn.Sequential(nn.Linear(12, 20), winners, nn.Linear(20, 20), winners)
    with pytest.raises(ValueError, match="'1' ran 2 times"):
        Distiller(model).end_task(torch.randn(4, 12))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: (m(x), x), "returns a tuple"),
        (lambda m, x: {"logits": m(x)}, "returns a dict"),
        (lambda m, x: m(x).mean(), "not logits"),
        (lambda m, x: m(x).unsqueeze(1), "not logits"),
    ],
)
def test_a_model_that_returns_no_logits_is_named(
    function: Callable[[nn.Module, Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        second_task(Wrapped(KWinnersMLP(), function))


@pytest.mark.parametrize("hidden", ["after", "before"])
@pytest.mark.parametrize(
    "layer", [nn.Sequential(nn.Linear(12, 20), TopK(4)), TopKLinear(12, 20, 4)]
)
def test_sequences_are_distilled_position_by_position(layer: nn.Module, hidden: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(dense(self.layer(x)).mean(1))

    def dense(output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        zeros = torch.zeros(*output.values.shape[:-1], 20)
        return zeros.scatter(-1, output.indices, output.values)

    def z(x: Tensor) -> Tensor:
        if hidden == "after":
            return dense(layer(x))[..., neurons]
        linear = layer if isinstance(layer, TopKLinear) else layer[0]
        return F.linear(x, linear.weight, linear.bias).relu()[..., neurons]

    model, x, y = Pooled(), torch.randn(10, 7, 12), torch.arange(10) % 5
    distiller = Distiller(model, 0.5, 1.0, 2.0, subnetwork=1.5, hidden=hidden)
    distiller.end_task(x)
    (neurons,) = distiller.neurons.values()
    hits = (dense(layer(x)) > 0).sum((0, 1))
    assert torch.equal(neurons, select_subnetwork(hits, 6))
    distiller.begin_task(x)
    teacher = z(x).detach()
    moved(model)
    samples = torch.tensor([3, 1, 8])
    logits = model(x[samples])
    expected = 0.5 * F.cross_entropy(logits, y[samples]) + 0.5 * distillation_loss(
        z(x[samples]), teacher[samples], 2.0
    )
    torch.testing.assert_close(distiller.loss(logits, y[samples], samples), expected)


def test_a_layer_whose_first_dimension_is_not_the_batch_is_named() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = TopK(2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x.flatten(0, 1)).view(x.shape).mean(1))

    distiller = Distiller(Flat())
    distiller.end_task(torch.randn(4, 5, 6))
    with pytest.raises(ValueError, match=r"'layer' has activations \[20, 2\] for 4 inputs"):
        distiller.begin_task(torch.randn(4, 5, 6))


def test_before_needs_the_layers_input() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TopKLinear(12, 20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x=x).values

    for model, layers in ((Keyword(), None), (nn.Sequential(nn.Linear(12, 20)), {"0": 3})):
        distiller = Distiller(model, hidden="before", layers=layers)
        distiller.end_task(torch.randn(8, 12))
        with pytest.raises(ValueError, match=r'hidden="before" needs a tensor \[B, \.\., '):
            distiller.begin_task(torch.randn(8, 12))


@pytest.mark.parametrize(
    ("order", "fullgraph"),
    [
        ("distiller outside", False),
        ("distiller outside", True),
        ("distiller inside", False),
        ("in place", False),
    ],
)
def test_compiled_models(order: str, fullgraph: bool) -> None:
    torch._dynamo.reset()
    plain = second_task()
    model = copy.deepcopy(plain.model)
    if order == "in place":
        model.compile(backend="eager", fullgraph=fullgraph)
        run = inside = model
    else:
        run = torch.compile(model, backend="eager", fullgraph=fullgraph)
        inside = run if order == "distiller outside" else model
    distiller = Distiller(inside, 0.5, 0.5, 2.0)
    assert distiller.layers == plain.distiller.layers
    distiller.load_state_dict(plain.distiller.state_dict())
    distiller.begin_task(plain.x)
    distiller.load_state_dict(plain.distiller.state_dict())
    for size in (4, 6):
        logits = run(plain.x[:size])
        run(plain.x[20:30])
        samples = torch.arange(size)
        loss = distiller.loss(logits, plain.y[:size], samples)
        torch.testing.assert_close(loss.detach(), alone(plain, 0, size))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_wrappers_leave_names_alone() -> None:
    plain = second_task()
    model = nn.DataParallel(copy.deepcopy(plain.model))
    for names in (None, ["winners1", "winners2"], ["module.winners1", "module.winners2"]):
        distiller = Distiller(model, 0.5, 0.5, 2.0, layers=names)
        distiller.load_state_dict(plain.distiller.state_dict())
        actual = distiller.loss(model(plain.x[:4]), plain.y[:4], torch.arange(4))
        assert torch.equal(actual.detach(), alone(plain, 0, 4))


def _rank(rank: int, folder: Path, x: Tensor, y: Tensor) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), TopK(6), nn.Linear(40, 6))
    parallel = nn.parallel.DistributedDataParallel(model)
    distiller = Distiller(parallel, logits="seen", frequency="accumulated")
    own = slice(0, 4000) if rank == 0 else slice(4000, None)  # of unequal numbers of chunks
    labels = y[own]
    for _ in range(2):
        distiller.begin_task(x[own])
        distiller.end_task(x[own], labels)
    distiller.begin_task(x[own])
    before = len(distiller.teacher_logits)
    loss = distiller.loss(parallel(x[own][:8]), labels[:8], torch.arange(8))
    loss.backward()
    gradient = model[0].weight.grad
    torch.save((distiller.counts, distiller.classes_seen, before, gradient), folder / str(rank))
    distributed.destroy_process_group()


def test_ranks_choose_one_subnetwork(tmp_path: Path) -> None:
    x, y = torch.randn(5000, 12), torch.arange(5000) // 1000
    x[4000:] += 2
    torch.multiprocessing.spawn(_rank, (tmp_path, x, y), nprocs=2)
    (counts, seen, size, gradient), other = (torch.load(tmp_path / str(n)) for n in range(2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), TopK(6), nn.Linear(40, 6))
    assert torch.equal(counts["2"], 2 * count_activations(model, ["2"], x)["2"])
    assert torch.equal(counts["2"], other[0]["2"])
    assert seen.tolist() == other[1].tolist() == [0, 1, 2, 3, 4]
    assert (size, other[2]) == (4000, 1000)
    assert torch.equal(gradient, other[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.randn(4, 5, 2)}, r"logits \[4, 5, 2\]"),
        ({"logits": torch.randn(0, 5)}, r"logits \[0, 5\]"),
        ({"logits": (torch.randn(4, 5),)}, "not a tuple"),
        ({"logits": torch.randn(4, 7)}, r"logits \[4, 7\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels \[3\]"),
        ({"labels": torch.zeros(4, 5)}, r"labels \[4, 5\]"),
        ({"labels": torch.zeros(4)}, "labels are torch.float32"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, r"labels hold 5; they must lie in 0\.\.4"),
        ({"labels": torch.tensor([0, 1, 2, -100])}, "labels hold -100"),
        ({"samples": torch.arange(3)}, r"samples \[3\]"),
        ({"samples": torch.ones(4, dtype=torch.bool)}, "samples .*bool"),
        ({"samples": torch.tensor([0, 1, 2, -1])}, "samples hold -1"),
        ({"samples": torch.tensor([0, 1, 2, 60])}, r"samples hold 60; they must lie in 0\.\.59"),
        ({"hidden": {}}, "hidden activations are of layers"),
        ({"hidden": {"winners1": torch.randn(4, 6), "winners2": torch.randn(4, 1)}}, "shape"),
    ],
)
def test_arguments_of_loss_are_checked(arguments: dict[str, Any], message: str) -> None:
    task = second_task()
    logits = task.model(task.x[:4])
    given = {"logits": logits, "labels": task.y[:4], "samples": torch.arange(4), "hidden": None}
    with pytest.raises(ValueError, match=message):
        task.distiller.loss(**given | arguments)
    task.distiller.loss(**given | {"labels": task.y[:4].int(), "samples": [0, 1, 2, 3]}).backward()


def test_a_task_that_has_not_begun_has_no_teacher() -> None:
    task = second_task()
    task.distiller.end_task(task.x)
    assert not task.distiller.teaches
    with pytest.raises(RuntimeError, match="begin_task"):
        task.loss(task.model(task.x[:4]), 0)
    task.distiller.begin_task(task.x[:10])
    with pytest.raises(ValueError, match="samples hold 13"):
        task.loss(task.model(task.x[10:14]), 10)


def test_tasks_leave_the_model_as_it_is() -> None:
    model = nn.Sequential(
        nn.Linear(12, 40), nn.BatchNorm1d(40), nn.Dropout(0.5), TopK(6), nn.Linear(40, 5)
    )
    model[1].eval()
    model[4].weight.requires_grad_(False)
    calls = []
    model[3].register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(8, 12)).sum().backward()
    x, random = torch.randn(30, 12), torch.get_rng_state()
    before = copy.deepcopy([*model.state_dict().items()])
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    distiller = Distiller(model)
    distiller.end_task(x)
    distiller.begin_task(x)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert all(
        torch.equal(a, b) for (_, a), b in zip(before, model.state_dict().values(), strict=True)
    )
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(calls) == 3
    distiller.remove()
    assert len(model[3]._forward_hooks) == 1


def test_state_is_copied_both_ways_and_goes_to_the_models_device() -> None:
    task = second_task(logits="seen")
    state = task.distiller.state_dict()
    expected = copy.deepcopy(state)
    other = Distiller(KWinnersMLP(), logits="seen")
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.fill_(-1)
    for distiller in (task.distiller, other):
        assert all(torch.equal(t, expected[n]) for n, t in distiller.state_dict().items())
    far = Distiller(KWinnersMLP().to("meta"), logits="seen")
    far.load_state_dict(expected)
    assert {t.device.type for t in far.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("counts/winners1"), "counts are of layers"),
        (lambda s: s.pop("neurons/winners2"), "neurons are of layers"),
        (lambda s: s.pop("teacher_hidden/winners2"), "teacher_hidden are of layers"),
        (lambda s: s.pop("teacher_logits"), "no teacher_logits"),
        (lambda s: s.update({"neurons/other": torch.arange(6)}), "neurons are of layers"),
        (lambda s: s.update({"something": torch.arange(6)}), "'something' is no part"),
        (lambda s: s.update({"neurons/winners1": torch.arange(5)}), r"\[5\] must be \[6\]"),
        (lambda s: s.update({"neurons/winners1": torch.arange(35, 41)}), "hold 40"),
        (lambda s: s.update({"neurons/winners1": torch.arange(-1, 5)}), "hold -1"),
        (lambda s: s.update({"counts/winners1": torch.arange(5)}), "has 5 neurons, k=6"),
        (lambda s: s.update({"counts/winners1": torch.ones(4, 10)}), r"\[4, 10\]"),
        (lambda s: s.update({"teacher_hidden/winners1": torch.ones(60, 5)}), r"\[60, \.\., 6\]"),
        (lambda s: s.update({"teacher_logits": torch.ones(50, 5)}), r"\[50, \.\., "),
        (lambda s: s.update({"classes_seen": torch.arange(3)}), "classes_seen"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    task = second_task()
    before, state = task.distiller.state_dict(), task.distiller.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        task.distiller.load_state_dict(state)
    after = task.distiller.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_state_without_the_seen_classes_is_named() -> None:
    task = second_task()
    with pytest.raises(ValueError, match="classes_seen"):
        Distiller(task.model, logits="seen").load_state_dict(task.distiller.state_dict())


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ({"counts": {"winners1": torch.ones(40)}}, "counts are of layers"),
        (
            {"counts": {"winners1": torch.ones(40), "winners2": torch.ones(3)}},
            "layer 'winners2' has 3 neurons, k=4",
        ),
        ({"labels": None}, "labels"),
        ({"labels": torch.tensor([0, -1])}, "labels hold -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels are torch.float32"),
    ],
)
def test_arguments_of_end_task_are_checked(end: dict[str, Any], message: str) -> None:
    task = second_task(logits="seen")
    before = task.distiller.state_dict()
    with pytest.raises(ValueError, match=message):
        task.distiller.end_task(task.x, **{"labels": task.y} | end)
    assert before.keys() == task.distiller.state_dict().keys()


def test_a_layer_with_fewer_neurons_than_k_is_named() -> None:
    with pytest.raises(ValueError, match="layer 'first' has 40 neurons, k=41"):
        Distiller(KWinnersMLP(), layers={"first": 41}).end_task(torch.randn(3, 12))


def test_a_seen_class_that_the_model_has_not_is_named() -> None:
    distiller = Distiller(KWinnersMLP(), logits="seen")
    distiller.end_task(torch.randn(3, 12), torch.tensor([0, 7, 1]))
    with pytest.raises(ValueError, match="label 7 was seen, but the model has 5 classes"):
        distiller.begin_task(torch.randn(3, 12))


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_entries_masked_in_both_are_left_out(kl: str) -> None:
    student, teacher = torch.randn(2, 7, 5).double()
    masked = torch.tensor([False, True, False, True, False])
    whole = student.masked_fill(masked, -torch.inf).requires_grad_()
    part = student[:, ~masked].clone().requires_grad_()
    loss = distillation_loss(whole, teacher.masked_fill(masked, -torch.inf), 3.0, kl)
    expected = distillation_loss(part, teacher[:, ~masked], 3.0, kl)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(whole.grad[:, ~masked], part.grad)
    assert not whole.grad[:, masked].any()


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-2, 1.0, 30.0, 1e6, 1e12])
def test_any_temperature_gives_a_finite_loss(temperature: float, kl: str) -> None:
    student, teacher = 20 * torch.randn(6, 5), 20 * torch.randn(6, 5)
    student.requires_grad_()
    loss = distillation_loss(student, teacher, temperature, kl)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    if 1e-3 < temperature < 100:
        exact = distillation_loss(student.double(), teacher.double(), temperature, kl)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        *(
            (shape, 2.0, r"student \[4, 5\] and teacher")
            for shape in [(5,), (4, 1), (4, 4), (1, 5)]
        ),
        *(((4, 5), number, f"temperature={number}") for number in (0.0, -1.0, float("nan"))),
    ],
)
def test_arguments_of_distillation_loss_are_checked(
    shape: tuple[int, ...], temperature: float, message: str
) -> None:
    """Shapes are not broadcast."""
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.randn(4, 5), torch.randn(shape), temperature)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl": "sideways"}, "sideways"),
        ({"hidden_loss": "sideways"}, "hidden_loss='sideways' is not one of kl, mse"),
        ({"selection": "some"}, "selection='some' is not one of frequency, activation, all"),
        ({"hidden_weight": -1.0}, r"hidden_weight=-1\.0 must be a finite number, 0 or above"),
        ({"hidden_weight": math.inf}, "hidden_weight=inf must be a finite number"),
        ({"alpha": 1.5}, r"alpha=1\.5"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"lam": -0.1}, r"lam=-0\.1"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"subnetwork": 0.0}, r"subnetwork=0\.0"),
        *(
            ({name: value}, f"{name}=.* must be a .*number")
            for name in ("alpha", "lam", "temperature", "subnetwork")
            for value in (True, "0.5", None, [0.5], float("nan"), torch.tensor(0.5))
        ),
        *(
            ({"layers": layers}, "layers=.* must be a list of names")
            for layers in ({}, "first", [0], {0: 3}, 5, "winners1", [], [None])
        ),
        ({"layers": ["nowhere"]}, "nowhere"),
        ({"layers": ["first"]}, "first"),
        ({"layers": {"first": 0}}, "'first' has k=0"),
        ({"layers": {"first": 2.0}}, r"'first' has k=2\.0"),
        ({"layers": {"first": True}}, "'first' has k=True"),
        ({"layers": {"second.encoder": 31}}, r"k=31; k must be an integer in 1\.\.30"),
        ({"model": nn.Linear(3, 2)}, "no TopK"),
    ],
)
def test_arguments_of_a_distiller_are_checked(arguments: dict[str, Any], message: str) -> None:
    model = KWinnersMLP()
    model.second = KSparseMLP(40, 30, 30, 4)
    with pytest.raises(ValueError, match=message):
        Distiller(**{"model": model} | arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    assert Distiller(KWinnersMLP(), alpha=np.float32(0.5), temperature=np.int64(2)).alpha == 0.5


@pytest.mark.parametrize("model", [KWinnersMLP, lambda: KSparseMLP(12, 40, 5, 4)])
@pytest.mark.parametrize("logits", ["all", "seen"])
def test_tasks_may_begin_and_end_in_inference_mode(
    model: Callable[[], nn.Module], logits: str
) -> None:
    x, y, student = torch.randn(9, 12), torch.arange(9) % 5, model()
    twin = copy.deepcopy(student)
    gradients = []
    for network, inference in ((student, True), (twin, False)):
        distiller = Distiller(network, alpha=0.5, lam=0.5, logits=logits)
        with torch.inference_mode(inference):
            distiller.end_task(x, y)
            distiller.begin_task(x)
            distiller.load_state_dict(distiller.state_dict())
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.5)
        distiller.loss(network(x[:4]), y[:4], torch.arange(4)).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*gradients, strict=True))


def test_the_default_device_does_not_matter() -> None:
    x, y = torch.randn(9, 12), torch.arange(9) % 5
    distiller = Distiller(KWinnersMLP(), lam=0.5, logits="seen")
    with torch.device("meta"):
        distiller.end_task(x, y)
        distiller.begin_task(x)
        distiller.load_state_dict(distiller.state_dict())
        loss = distiller.loss(distiller.model(x[:4]), y[:4], torch.arange(4, device="cpu"))
    assert loss.isfinite()
