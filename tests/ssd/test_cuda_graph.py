"""Whole epochs without the host: equal to the trainer's steps, and free of host reads."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd import cuda_graph
from ssd.cuda_graph import DENSE, EXACT, GRADED, GraphedEpochs
from ssd.learner import Learner
from ssd.trainer import Trainer
from ssd_kernels import _dispatch
from tests.kernels.conftest import INTERPRETED
from tests.ssd.test_together import BASE, OWN, VARIANTS, make_learner, weights

SERVED = [v for v in VARIANTS if v != "topk-mlp"] + ["ewc momentum"]
SETTINGS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "ewc momentum": {"method": "ssd+ewc", "momentum": 0.5, "schedule": "flat"},
}


def make_trainer(
    variant: str, dtype: torch.dtype, count: int, epochs: int = 7, graphs: bool = False
) -> Trainer:
    configs = [
        replace(
            BASE,
            **{"method": "ssd", "epochs": epochs, "eval_every": epochs, **SETTINGS[variant], **own},
        )
        for own in OWN[:count]
    ]
    return Trainer([make_learner(config, dtype) for config in configs], graphs)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The forms that each learner's epochs take, epoch by epoch, also those that are taken back."""
    taken: list[list[str]] = []
    train = GraphedEpochs._train

    def trained(self: GraphedEpochs, forms: list[str]) -> None:
        taken.append(list(forms))
        train(self, forms)

    monkeypatch.setattr(GraphedEpochs, "_train", trained)
    return taken


@pytest.mark.parametrize("variant", SERVED)
@pytest.mark.parametrize("count", [1, 3])
def test_equal_to_the_trainers_steps(
    variant: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, to the end of every epoch, from all neurons excited to (almost) k-sparse."""
    plain = make_trainer(variant, torch.float64, count)
    trainer = make_trainer(variant, torch.float64, count, graphs=True)
    assert GraphedEpochs.serves(trainer.learners)
    taken = watch(monkeypatch)
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
            assert torch.equal(ours.model.encoder.samples, theirs.model.encoder.samples)
        epochs += event.kind == "epoch"
    assert epochs == 21
    assert trainer.steps == plain.steps
    forms = {form for epoch in taken for form in epoch}
    if SETTINGS[variant].get("schedule") == "flat":
        assert forms == {EXACT}
    else:
        assert DENSE in forms
        assert variant == "before" or GRADED in forms


def test_an_epoch_that_overflowed_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes of k slots an almost k-sparse layer overflows: dense steps give the same."""
    monkeypatch.setattr(cuda_graph, "WIDTH", 1)
    plain = make_trainer("sdmlp", torch.float64, 1)
    trainer = make_trainer("sdmlp", torch.float64, 1, graphs=True)
    taken = watch(monkeypatch)
    for run in (plain, trainer):
        for _ in run.run():
            pass
    assert ([GRADED], [DENSE]) in pairwise(taken)
    for one, other in zip(weights(trainer.learners[0]), weights(plain.learners[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    assert trainer.learners[0].model.encoder.samples == plain.learners[0].model.encoder.samples


@pytest.mark.parametrize("variant", SERVED)
def test_no_bit_depends_on_the_companions(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32: beside others whose layers have other forms or whose epoch is over.

    A library may round batched products by the size of the batch; here they are done one by one.
    What serves a CPU differs between one network and several, so a learner alone is no case.
    """
    one_by_one = lambda a, b: torch.stack([x @ y for x, y in zip(a, b, strict=True)])  # noqa: E731
    monkeypatch.setattr(torch, "bmm", one_by_one)
    ends = []
    for companions in ([0, 1, 2], [1, 0], [2, 1]):
        learners = make_trainer(variant, torch.float32, 3).learners
        trainer = Trainer([learners[number] for number in companions], graphs=True)
        for _ in trainer.run():
            pass
        ends.append(weights(trainer.learners[companions.index(1)]))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def begun(variant: str, count: int = 3) -> GraphedEpochs:
    trainer = make_trainer(variant, torch.float64, count, epochs=1, graphs=True)
    trainer.load_task()
    assert trainer.graphed is not None
    return trainer.graphed


def test_the_form_follows_counts_that_a_graph_wrote() -> None:
    """A replayed graph writes without PyTorch's version counter, and so does NumPy."""
    graphed = begun("ssd")
    assert graphed._begin(0, 0) == [DENSE] * 3
    counts = graphed.stack.counts.numpy().reshape(3, -1)
    counts[1], counts[2] = 150, 300  # of 200 and 300 samples
    assert graphed._begin(0, 0) == [DENSE, GRADED, EXACT]
    assert graphed.stack.encoders[2].inhibited()


def test_learners_of_one_form_share_the_launches_and_the_others_rest() -> None:
    """Whatever the forms are, a step is taken once for each of them, and for no learner twice."""
    graphed = begun("ssd")
    bodies: list[tuple[str, list[int]]] = []
    graphed.body = lambda form: bodies.append((form, graphed.taken.tolist()))
    sizes = graphed._sizes()
    for forms in ([EXACT] * 3, [DENSE] * 3, [DENSE, GRADED, EXACT], [GRADED, EXACT, GRADED]):
        bodies.clear()
        graphed._train(forms)
        assert {form for form, _ in bodies} == set(forms)
        for form, taken in bodies:
            assert taken == [n if f == form else 0 for n, f in zip(sizes, forms, strict=True)]
    assert len(graphed._steps) == 3  # graphs that CUDA would have captured


def test_ten_learners_cross_the_switch_with_three_graphs() -> None:
    """Each at its own time: what a graph is captured for is a form, not a set of learners."""
    configs = [
        replace(BASE, method="sdmlp", tasks=2, seed=seed, anneal_samples=10 + 40 * seed)
        for seed in range(10)
    ]
    learners = [make_learner(config, torch.float32) for config in configs]
    trainer = Trainer(learners, graphs=True)
    mixed = 0
    for event in trainer.run():
        if event.kind == "epoch":
            mixed = max(mixed, len(set(trainer.graphed._forms())))
    assert mixed == 3
    assert {form for form, *_ in trainer.graphed._steps} == {DENSE, GRADED, EXACT}
    assert len(trainer.graphed._steps) == 3


@pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed")
# linear_code on the CPU, which stands in here, reads the host where neurons are many.
@pytest.mark.parametrize("variant", [v for v in SERVED if v not in ("before", "ssd+mas, flat")])
def test_a_step_reads_nothing_back(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which have no values, every host read and every dynamic shape raises."""
    trainer = make_trainer(variant, torch.float32, 3, epochs=1, graphs=True)
    stream = trainer.run()
    while trainer.task < 2:  # with a teacher, and with penalties if there are any
        next(stream)
    for learner in trainer.learners:
        learner.begin_task(2)
    trainer.load_task()

    def kernels(op: str, *_: Any, served: bool = True, **__: Any) -> Any:
        table = _dispatch.TABLES[op]
        return table.get("triton", table["torch"]) if served else table["torch"]

    # What torch.compile would trace: the Triton launches as opaque operators.
    monkeypatch.setattr(_dispatch, "choose", kernels)
    monkeypatch.setattr(_dispatch, "tracing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for form in (DENSE, GRADED, EXACT):
            trainer.graphed.body(form)


# What the steps that CUDA captures are made of, launched in Triton's interpreter.
LAUNCHED: list[tuple[str, str, int, int]] = [  # variant, form, task, learners
    ("sdmlp", DENSE, 0, 1),
    ("ssd", GRADED, 1, 1),
    ("ssd", EXACT, 1, 1),
    ("ssd", EXACT, 1, 3),
    ("before", DENSE, 1, 3),
    ("seen, forward, mask", GRADED, 1, 3),
    ("momentum", GRADED, 0, 3),
    ("ewc momentum", EXACT, 1, 3),
    ("lwf+ewc", GRADED, 1, 3),
    ("lwf+ewc", DENSE, 1, 3),
]


def begun_task(variant: str, form: str, count: int, task: int, graphs: bool) -> Trainer:
    """A trainer at the start of a task, in batches of 5, its counters where the form is taken."""
    small = {"batch_size": 5, "neurons": 120, "k": 3, "epochs": 1, "eval_every": 1}
    given = {"method": "ssd", **SETTINGS[variant]}
    configs = [replace(BASE, **{**given, **own, **small}) for own in OWN[:count]]
    trainer = Trainer([make_learner(config, torch.float32) for config in configs], graphs)
    graphed, trainer.graphed = trainer.graphed, None
    stream = trainer.run()
    while trainer.task < task:
        next(stream)
    draw = torch.Generator().manual_seed(5)
    for learner in trainer.learners:
        learner.begin_task(task)
        encoder = learner.model.encoder
        least, most = {DENSE: (0.4, 0.7), GRADED: (0.98, 1.02), EXACT: (1.0, 1.3)}[form]
        share = least + (most - least) * torch.rand(120, generator=draw)
        encoder.counts.copy_((share * encoder.anneal_samples).ceil())
    trainer.graphed = graphed
    trainer.load_task()
    return trainer


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize(("variant", "form", "task", "count"), LAUNCHED)
def test_triton_steps_equal_the_trainers(
    variant: str, form: str, task: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 and within rounding, with a batch cut short, a learner done early and one at rest."""
    sizes = [13, 7, 0][:count]  # samples that the steps take: 5, 5 and 3; 5 and 2; none
    monkeypatch.setenv(_dispatch.ENVIRONMENT, "reference")
    plain = begun_task(variant, form, count, task, graphs=False)
    trainer = begun_task(variant, form, count, task, graphs=True)
    graphed = trainer.graphed
    assert graphed is not None
    assert graphed._forms() == [form] * count
    before = [weights(learner) for learner in trainer.learners]
    graphed._begin(task, 0)
    graphed.taken.copy_(torch.tensor(sizes))
    graphed.position.zero_()
    pairs = zip(plain.learners, sizes, strict=True)
    orders = [learner.order(task, 0)[:size] for learner, size in pairs]
    for step in range(3):
        monkeypatch.setenv(_dispatch.ENVIRONMENT, "triton")
        graphed.body(form)
        monkeypatch.setenv(_dispatch.ENVIRONMENT, "reference")
        plain.step([order[5 * step : 5 * step + 5] for order in orders])
    assert not graphed.overflow.any()
    assert graphed.position == 3
    for number, (ours, theirs) in enumerate(zip(trainer.learners, plain.learners, strict=True)):
        for one, other, old in zip(weights(ours), weights(theirs), before[number], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            moved = (other - old).norm()
            assert (moved > 0) == (sizes[number] > 0)
            assert (one - other).norm() <= 1e-3 * moved  # which the weights' tolerance might hide
        assert torch.equal(ours.model.encoder.counts, theirs.model.encoder.counts)
        assert torch.equal(ours.model.encoder.samples, theirs.model.encoder.samples)
        assert torch.equal(ours.correct, theirs.correct)
        torch.testing.assert_close(ours.loss_sum, theirs.loss_sum, rtol=1e-5, atol=1e-6)


def on_cuda(variant: str, count: int, epochs: int) -> Trainer:
    learners = []
    for learner in make_trainer(variant, torch.float32, count, epochs).learners:
        tasks = [task.to(torch.device("cuda")) for task in learner.tasks]
        learners.append(Learner(learner.config, tasks, learner.model.to("cuda")))
    trainer = Trainer(learners)
    assert trainer.graphed is not None
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
    taken = watch(monkeypatch)
    plain, trainer = make_trainer(variant, torch.float32, 2), on_cuda(variant, 2, epochs=7)
    for run in (plain, trainer):
        for _ in run.run():
            pass
    assert trainer.steps == plain.steps >= 50
    flat = SETTINGS[variant].get("schedule") == "flat"
    forms = {form for epoch in taken for form in epoch}
    assert EXACT in forms if flat else GRADED in forms or variant == "before"
    for ours, theirs in zip(trainer.learners, plain.learners, strict=True):
        assert (ours.accuracy - theirs.accuracy).abs().mean() <= 0.05
