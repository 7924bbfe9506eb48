"""Whole epochs without the host: equal to the trainer's steps, and free of host reads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd import resident
from ssd.resident import DENSE, EXACT, GRADED, IDLE, ResidentEpochs
from ssd.trainer import Trainer
from ssd_kernels import _dispatch
from tests.ssd.test_together import BASE, OWN, VARIANTS, make_learner, weights

SERVED = [v for v in VARIANTS if v not in ("topk-mlp", "ssd+si")] + ["ewc momentum"]
SETTINGS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "ewc momentum": {"method": "ssd+ewc", "momentum": 0.5, "schedule": "flat"},
}


def make_trainer(variant: str, dtype: torch.dtype, count: int, epochs: int = 7) -> Trainer:
    configs = [
        replace(BASE, **{"method": "ssd", "epochs": epochs, "eval_every": epochs,
                         **SETTINGS[variant], **own})
        for own in OWN[:count]
    ]  # fmt: skip
    return Trainer([make_learner(config, dtype) for config in configs])


@pytest.mark.parametrize("variant", SERVED)
@pytest.mark.parametrize("count", [1, 3])
def test_equal_to_the_trainers_steps(
    variant: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, to the end of every epoch, from all neurons excited to (almost) k-sparse."""
    taken = {DENSE: 0, GRADED: 0, EXACT: 0}
    original = ResidentEpochs._steps_of

    def steps_of(self: ResidentEpochs, paths: list[str]) -> None:
        for path in paths:
            taken[path] += 1
        original(self, paths)

    monkeypatch.setattr(ResidentEpochs, "_steps_of", steps_of)
    plain, trainer = (make_trainer(variant, torch.float64, count) for _ in range(2))
    assert ResidentEpochs.serves(trainer)
    trainer.resident = ResidentEpochs(trainer)
    stream = plain.run()
    epochs = 0
    for event in trainer.run():
        expected = next(e for e in stream if e.kind == event.kind)
        assert (event.task, event.epoch) == (expected.task, expected.epoch)
        for ours, theirs in zip(event.records, expected.records, strict=True):
            assert ours["train_accuracy"] == theirs["train_accuracy"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
        for ours, theirs in zip(trainer.learners, plain.learners, strict=True):
            for one, other in zip(weights(ours), weights(theirs), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
            assert torch.equal(ours.model.encoder.counts, theirs.model.encoder.counts)
        epochs += event.kind == "epoch"
    assert epochs == 21
    assert trainer.steps == plain.steps
    if SETTINGS[variant].get("schedule") == "flat":
        assert taken == {DENSE: 0, GRADED: 0, EXACT: 21 * count}
    else:
        assert taken[DENSE] > 0
        assert variant == "before" or taken[GRADED] > 0


def test_an_epoch_that_overflowed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes of k slots an almost k-sparse layer overflows: dense steps give the same."""
    plain, trainer = (make_trainer("sdmlp", torch.float64, 1) for _ in range(2))
    monkeypatch.setattr(resident, "WIDTH", 1)
    trainer.resident = ResidentEpochs(trainer)
    again = []
    original = ResidentEpochs._steps_of
    monkeypatch.setattr(
        ResidentEpochs, "_steps_of",
        lambda self, paths: (again.append(list(paths)), original(self, paths)),
    )  # fmt: skip
    for run in (plain, trainer):
        for _ in run.run():
            pass
    assert ([GRADED], [DENSE]) in pairwise(again)
    for one, other in zip(weights(trainer.learners[0]), weights(plain.learners[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert trainer.learners[0].model.encoder.samples == plain.learners[0].model.encoder.samples


@pytest.mark.parametrize("variant", SERVED)
def test_no_bit_depends_on_the_companions(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: alone, and beside others that are on other paths or done with their epoch.

    A library may round batched products by the size of the batch; here they are done one by one.
    """
    one_by_one = lambda a, b: torch.stack([x @ y for x, y in zip(a, b, strict=True)])  # noqa: E731
    monkeypatch.setattr(torch, "bmm", one_by_one)
    ends = []
    for companions in ([0, 1, 2], [1], [2, 1]):
        learners = make_trainer(variant, torch.float32, 3).learners
        trainer = Trainer([learners[number] for number in companions])
        trainer.resident = ResidentEpochs(trainer)
        for _ in trainer.run():
            pass
        ends.append(weights(trainer.learners[companions.index(1)]))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_the_path_follows_counts_that_a_graph_wrote() -> None:
    """A replayed graph writes without PyTorch's version counter, and so does NumPy."""
    trainer = make_trainer("ssd", torch.float64, 3, epochs=1)
    trainer.resident = ResidentEpochs(trainer)
    trainer.load_task()
    assert trainer.resident._begin() == [DENSE] * 3
    counts = trainer.resident.counts.numpy().reshape(3, -1)
    counts[1], counts[2] = 150, 300  # of 200 and 300 samples
    assert trainer.resident._begin() == [DENSE, GRADED, EXACT]
    assert trainer.learners[2].model.encoder.inhibited()


def test_learners_on_one_path_share_one_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are; those between which another learner stands take a call each."""
    trainer = make_trainer("ssd", torch.float64, 3, epochs=1)
    trainer.resident = ResidentEpochs(trainer)
    trainer.load_task()
    trainer.resident._begin()
    trainer.resident.counts.fill_(1000)  # no neuron is excited any more
    called: list[tuple[str, int]] = []

    def spy(name: str) -> None:
        original = getattr(resident, name)

        def call(*args: Any, blocks: int, **more: Any) -> Any:
            called.append((name, blocks))
            return original(*args, blocks=blocks, **more)

        monkeypatch.setattr(resident, name, call)

    spy("linear_code")
    spy("linear_inhibit")
    for paths, expected in (
        ([EXACT, EXACT, EXACT], [("linear_code", 3)]),
        ([GRADED, EXACT, GRADED], [("linear_code", 3)]),
        ([DENSE, DENSE, DENSE], [("linear_inhibit", 3)]),
        ([DENSE, GRADED, EXACT], [("linear_inhibit", 1), ("linear_code", 2)]),
        ([EXACT, IDLE, EXACT], [("linear_code", 1), ("linear_code", 1)]),
    ):
        called.clear()
        trainer.resident.body(paths)
        assert called == expected


@pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed")
# linear_code on the CPU, which stands in here, reads the host where neurons are many.
@pytest.mark.parametrize("variant", [v for v in SERVED if v not in ("before", "ssd+mas, flat")])
def test_a_step_reads_nothing_back(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which have no values, every host read and every dynamic shape raises."""
    trainer = make_trainer(variant, torch.float32, 3, epochs=1)
    trainer.resident = ResidentEpochs(trainer)
    stream = trainer.run()
    while trainer.task < 2:  # with a teacher, and with penalties if there are any
        next(stream)
    for each in trainer.learners:
        each.begin_task(2)
    trainer.load_task()
    trainer.resident._load_task()

    def kernels(op: str, *_: Any, served: bool = True, **__: Any) -> Any:
        table = _dispatch.TABLES[op]
        return table.get("triton", table["torch"]) if served else table["torch"]

    # What torch.compile would trace: the Triton launches as opaque operators.
    monkeypatch.setattr(_dispatch, "choose", kernels)
    monkeypatch.setattr(_dispatch, "tracing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for path in (DENSE, GRADED, EXACT):
            trainer.resident.body([path, path, path])
        trainer.resident.body([DENSE, GRADED, EXACT])
        trainer.resident.body([GRADED, IDLE, EXACT])


def on_cuda(variant: str, count: int, epochs: int) -> Trainer:
    learners = []
    for each in make_trainer(variant, torch.float32, count, epochs).learners:
        tasks = [task.to(torch.device("cuda")) for task in each.tasks]
        learners.append(type(each)(each.config, tasks, each.model.to("cuda")))
    trainer = Trainer(learners)
    assert trainer.resident is not None
    return trainer


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("variant", SERVED)
@pytest.mark.parametrize("count", [1, 3])
def test_graph_replay_equals_the_cpu(variant: str, count: int) -> None:
    """fp32: two epochs of the first task, captured and replayed, within rounding."""
    plain = make_trainer(variant, torch.float32, count, epochs=2)
    trainer = on_cuda(variant, count, epochs=2)
    for run in (plain, trainer):
        for event in run.run():
            if event.kind == "task":
                break
    for ours, theirs in zip(trainer.learners, plain.learners, strict=True):
        for one, two in zip(weights(ours), weights(theirs), strict=True):
            torch.testing.assert_close(one.cpu(), two, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:no CUDA graph")
@pytest.mark.parametrize("variant", SERVED)
def test_a_stream_of_graph_replays_ends_as_on_the_cpu(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32: all tasks, with teachers and penalties; rounding grows, accuracy hardly differs."""
    taken = set()
    original = ResidentEpochs._steps_of

    def steps_of(self: ResidentEpochs, paths: list[str]) -> None:
        taken.update(paths)
        original(self, paths)

    monkeypatch.setattr(ResidentEpochs, "_steps_of", steps_of)
    plain, trainer = make_trainer(variant, torch.float32, 2), on_cuda(variant, 2, epochs=7)
    for run in (plain, trainer):
        for _ in run.run():
            pass
    assert trainer.steps == plain.steps >= 50
    flat = SETTINGS[variant].get("schedule") == "flat"
    assert EXACT in taken if flat else GRADED in taken or variant == "before"
    for ours, theirs in zip(trainer.learners, plain.learners, strict=True):
        assert (ours.accuracy - theirs.accuracy).abs().mean() <= 0.05
