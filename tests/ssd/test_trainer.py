"""The task loop: events, order of data, evaluation, and going on from a saved state."""

import copy
from dataclasses import replace

import pytest
import torch

from ssd.config import Config
from ssd.data import Task
from ssd.errors import UserError
from ssd.learner import Learner, build_model
from ssd.trainer import Trainer

CONFIG = Config(
    dataset="features",
    features="none",
    method="ssd+ewc",
    tasks=2,
    epochs=3,
    batch_size=16,
    neurons=40,
    k=4,
    anneal_samples=100,
    lr=0.2,
    eval_every=2,
)


def make_trainer(config: Config = CONFIG) -> Trainer:
    draw = torch.Generator().manual_seed(1)
    centres = 3 * torch.randn(4, 10, generator=draw)
    tasks = []
    for first in (0, 2):
        y = torch.arange(50) % 2 + first
        x = centres[y] + torch.randn(50, 10, generator=draw)
        tasks.append(Task((first, first + 1), x[:40], y[:40], x[40:], y[40:]))
    return Trainer([Learner(config, tasks, build_model(config, 10, 4))])


def test_events_come_in_order_and_every_sample_is_seen_once_an_epoch() -> None:
    trainer = make_trainer()
    seen: list[torch.Tensor] = []
    original = trainer.step
    trainer.step = lambda samples: (seen.append(samples[0]), original(samples))
    kinds = [event.kind for event in trainer.run()]
    epoch = ["step"] * 3 + ["epoch"]
    assert kinds == (epoch * 3 + ["task"]) * 2
    for first in range(0, len(seen), 3):
        assert torch.cat(seen[first : first + 3]).sort().values.tolist() == list(range(40))
    assert [len(s) for s in seen[:3]] == [16, 16, 8]  # the ragged batch is not dropped
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:6]))


def test_evaluation_is_over_all_classes_and_counts_nothing() -> None:
    (learner,) = make_trainer().learners
    before = learner.model.encoder.counts.clone()
    accuracy = learner.evaluate()
    for task, value in zip(learner.tasks, accuracy, strict=True):
        predicted = learner.model.eval()(task.x_test).argmax(1)
        assert value == (predicted == task.y_test).double().mean()
    assert torch.equal(learner.model.encoder.counts, before)


def test_it_learns_and_records() -> None:
    trainer = make_trainer(replace(CONFIG, epochs=20, method="sdmlp"))
    for _ in trainer.run():
        pass
    (learner,) = trainer.learners
    assert learner.accuracy[0, 0] > 0.9
    assert learner.accuracy[1, 1] > 0.9
    assert 0 < learner.frequency.sum(1).min() <= learner.frequency.sum(1).max() <= 40


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("stop", [1, 9, 11, 13, 14, 24])
def test_a_saved_state_goes_on_to_the_same_bits(stop: int, momentum: float) -> None:
    config = replace(CONFIG, momentum=momentum)
    whole, first, second = (make_trainer(config) for _ in range(3))
    for _ in whole.run():
        pass
    for number, _ in enumerate(first.run()):
        if number == stop:
            break
    tensors, numbers = first.state()
    second.load_state({n: t.clone() for n, t in tensors.items()}, numbers)
    for _ in second.run():
        pass
    expected, actual = whole.state()[0], second.state()[0]
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert whole.steps == second.steps


def test_a_frozen_submodule_stays_in_evaluation_mode() -> None:
    trainer = make_trainer()
    (learner,) = trainer.learners
    learner.model.encoder.eval()
    for _ in trainer.run():
        assert learner.model.training
        assert not learner.model.encoder.training
    assert learner.model.encoder.samples == 0
    learner.model.eval()
    trainer.task = 0
    next(trainer.run())
    assert learner.model.encoder.training


@pytest.mark.parametrize("hidden", ["after", "before"])
def test_the_dense_steps_loss_is_of_its_own_pass(hidden: str) -> None:
    trainer = make_trainer(replace(CONFIG, method="topk-mlp+ssd", hidden=hidden))
    (learner,) = trainer.learners
    events = trainer.run()
    while next(events).kind != "task":
        pass
    learner.begin_task(1)
    twin = copy.deepcopy(learner.distiller)
    samples = torch.arange(16)
    x, y = learner.tasks[1].x_train[samples], learner.tasks[1].y_train[samples]
    expected = twin.loss(twin.model(x), y, samples)
    trainer.step([samples])
    torch.testing.assert_close(learner.loss_sum.item() / 16, expected.item())


@pytest.mark.parametrize("count", [1, 2])
def test_want_of_memory_is_one_line(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA reports it, in the middle of training."""
    trainer = make_trainer()
    trainer.learners *= count

    def starved(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee ..")

    monkeypatch.setattr(trainer, "step", starved)
    runs = " of 2 runs side by side" if count > 1 else ""
    with pytest.raises(UserError, match=f"--neurons [0-9]+{runs} does not fit into the memory"):
        next(trainer.run())
