"""What train_bench.py times: trainers and plain steps from the same weights on the same data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain import PlainSDMLP, PlainStep, batches
from benchmarks.step_targets import APART, BACKWARD
from benchmarks.timing import Run
from ssd.activations import evaluating
from ssd.config import Config, resolve
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.models import SDMLP
from ssd.step import Batch, sparse_step
from ssd.trainer import Trainer
from ssd_kernels import TopKOutput, _dispatch
from ssd_kernels._graded_code import ActiveNeurons

CLASSES = 10
BATCHES = 10  # in a synthetic task, unless the problem says how many samples
STEPS = 10  # trained on every past task: each of its batches once
# Where the GABA switch stands: before it, in its middle, where almost every neuron fires in a
# batch, when only LATE_ACTIVE k fire for a sample, after it.
EXCITED, SWITCHING, LATE, INHIBITED = "excited", "mid-switch", "late switch", "inhibited"
LATE_ACTIVE = 1.3
# Activations until a neuron is inhibited. A switch of so many takes a million steps: it stands
# still while a step is timed.
STILL = 10**9
QUICK_SWITCH = 2560  # divides STILL


@dataclass(frozen=True)
class Problem:
    """The size of a step; B, d, R, k as everywhere, N samples in a task."""

    B: int = 128
    d: int = 256
    R: int = 10_000
    k: int = 10
    N: int | None = None

    def shape(self, **more: int) -> dict[str, int]:
        samples = {} if self.N is None else {"N": self.N}
        return {"B": self.B, "d": self.d, "R": self.R, "k": self.k, "C": CLASSES, **samples, **more}


def make_task(
    problem: Problem, device: torch.device, number: int, classes: Sequence[int] = range(CLASSES)
) -> Task:
    """Rectified clusters, as the features of a network are; other ones for every number."""
    draw = torch.Generator().manual_seed(number)
    y = torch.tensor(classes)[torch.arange(problem.N or problem.B * BATCHES) % len(classes)]
    centres = 1.5 * torch.randn(CLASSES, problem.d, generator=draw)
    x = (centres[y] + torch.randn(len(y), problem.d, generator=draw)).relu()
    x, y = x.to(device), y.to(device)
    tests = len(y) // 5
    return Task(tuple(classes), x, y, x[:tests], y[:tests])


def make_trainer(
    problem: Problem,
    method: str,
    device: torch.device,
    past: int = 1,
    seeds: int = 1,
    phase: str = INHIBITED,
) -> Trainer:
    """A trainer at the beginning of a task, with so many past ones: it has a teacher."""
    # Data that the switch has not seen make many more neurons fire.
    numbers = [0 if phase == LATE else number for number in range(past + 1)]
    tasks = [make_task(problem, device, number) for number in numbers]
    config = Config(
        method=method, neurons=problem.R, k=problem.k, batch_size=problem.B, tasks=len(tasks),
        schedule="flat" if phase == INHIBITED else "gaba", epochs=10**6, eval_every=10**6,
        anneal_samples=QUICK_SWITCH if phase in (SWITCHING, LATE) else STILL,
    )  # fmt: skip
    configs = [replace(config, seed=seed) for seed in range(seeds)]
    trainer = Trainer(
        [Learner(c, tasks, build_model(c, problem.d, CLASSES).to(device)) for c in configs]
    )
    for trainer.task in range(past):
        for learner in trainer.learners:
            learner.begin_task(trainer.task)
        for step in range(STEPS):
            step_of(trainer, step)()
        if phase in (SWITCHING, LATE) and trainer.task == 0:
            _switch(trainer, phase)
        for learner in trainer.learners:
            learner.end_task(trainer.task)
    trainer.task = past
    for learner in trainer.learners:
        learner.begin_task(past)
    trainer.load_task()
    return trainer


def _switch(trainer: Trainer, phase: str) -> None:
    """Trains until the switch is at the phase, and stops it there."""
    for learner in trainer.learners:
        encoder = _sdmlp(learner).encoder
        step = 0
        while (
            encoder.gaba().mean() < 0.5
            if phase == SWITCHING
            else _active(trainer, learner) > LATE_ACTIVE * encoder.k
        ):
            step_of(trainer, step)()
            step += 1
        encoder.counts *= STILL // QUICK_SWITCH
        encoder.anneal_samples = STILL
    if trainer.graphed is not None:  # it took the number when it was made
        trainer.graphed.anneal_samples.fill_(STILL)


def _active(trainer: Trainer, learner: Learner) -> float:
    """How many neurons fire for a sample, on average over a batch."""
    hidden = _hidden(trainer, learner)
    return (hidden.values > 0).sum(1).double().mean().item()


def _hidden(trainer: Trainer, learner: Learner) -> TopKOutput | ActiveNeurons:
    """The hidden layer of the first batch, not counted."""
    with evaluating(learner.model):
        return _sdmlp(learner).encoder.encode(learner.inputs[: trainer.config.batch_size])


def step_of(trainer: Trainer, step: int) -> Run:
    size = trainer.config.batch_size
    whole = len(trainer.learners[0].tasks[trainer.task].y_train) // size
    first = step % whole * size
    samples = torch.arange(first, first + size, device=trainer.device)
    return lambda: trainer.step([samples] * len(trainer.learners))


def repeated(trainer: Trainer) -> Run:
    """A step as training takes it: on CUDA a replay of the graph."""
    if trainer.graphed is None:
        return step_of(trainer, 0)
    trainer.load_task()
    run = trainer.graphed.first_step(trainer.task, trainer.epoch)
    run()
    if not trainer.graphed.overflow.any():
        return run
    for learner in trainer.learners:  # a code does not hold what fires
        _sdmlp(learner).encoder.dense_until.fill_(STILL)
    return trainer.graphed.first_step(trainer.task, trainer.epoch)


def important_rows(trainer: Trainer) -> int:
    """Neurons that a penalty pulls."""
    (learner,) = trainer.learners
    (regularizer,) = learner.regularizers
    rows = regularizer.rows()
    return trainer.config.neurons if rows is None else len(rows)


def plain_step(trainer: Trainer) -> PlainStep:
    """The mathematics of a trainer's next step in plain PyTorch, from copies of its weights."""
    (learner,) = trainer.learners
    encoder, decoder = (p.detach() for p in learner.parameters)
    layer = _sdmlp(learner).encoder
    counts = layer.counts if layer.schedule == "gaba" else None

    def model() -> PlainSDMLP:
        made = PlainSDMLP(encoder, decoder, trainer.config.k, counts, layer.anneal_samples)
        return made.to(trainer.device)

    neurons = torch.zeros(0, dtype=torch.int64)
    if learner.distiller is not None:
        neurons = learner.distiller.neurons["encoder"]
    return PlainStep(model(), model().eval() if len(neurons) else None, neurons, trainer.config.lr)


def check(trainer: Trainer, plain: PlainStep) -> None:
    """Both must compute the same loss and make the same step, or their times mean nothing."""
    (learner,) = trainer.learners
    task = learner.tasks[trainer.task]
    x, y = task.x_train[: trainer.config.batch_size], task.y_train[: trainer.config.batch_size]
    samples = torch.arange(len(y), device=trainer.device)
    with torch.no_grad(), evaluating(learner.model):
        logits = learner.model(x)
        if learner.distiller is None:
            loss = F.cross_entropy(logits, y).item()
        else:
            loss = learner.distiller.loss(logits, y, samples).item()
    expected = plain(x, y).item()
    if abs(loss - expected) > 1e-4 * max(1.0, abs(expected)):
        raise SystemExit(f"train_bench: our loss {loss} is not the plain one {expected}")
    before = [p.detach().clone() for p in learner.parameters]
    trainer.step([samples])
    weights = [plain.model.encoder.weight, plain.model.decoder.weight.T]
    for ours, theirs, old in zip(learner.parameters, weights, before, strict=True):
        off, moved = ((ours - other).abs().max().item() for other in (theirs, old))
        if off > 2e-7 + 1e-2 * moved:  # the rounding of a weight, and of its gradient
            raise SystemExit(f"train_bench: after a step our weights are off by {off}")


def step_runs(trainer: Trainer, compiled: bool) -> dict[str, Run]:
    """A step of every provider, from the same weights."""
    check(trainer, plain_step(trainer))
    (learner,) = trainer.learners
    task, size = learner.tasks[trainer.task], trainer.config.batch_size
    steps = [step_of(trainer, step) for step in range(BATCHES)]
    if trainer.graphed is not None:
        steps = [repeated(trainer)]
    ours, stream = _cycle(steps), _endless(task.x_train, task.y_train, size)
    runs: dict[str, Run] = {"ours": lambda: next(ours)()}
    for name, plain in _plain_steps(trainer, compiled).items():
        runs[name] = lambda plain=plain: plain(*next(stream))
    return runs


def epoch_runs(trainer: Trainer, compiled: bool = False) -> dict[str, Run]:
    """An epoch of every provider: order, gathers, steps and the running sums."""
    check(trainer, plain_step(trainer))
    (learner,) = trainer.learners
    task, size = learner.tasks[trainer.task], trainer.config.batch_size
    events = (event for event in trainer.run() if event.kind == "epoch")
    loader = batches(task.x_train, task.y_train, size)

    def plain_epoch(plain: PlainStep) -> float:
        return sum(float(plain(x, y)) * len(y) for x, y in loader)

    runs: dict[str, Run] = {"ours": lambda: next(events)}
    for name, plain in _plain_steps(trainer, compiled).items():
        runs[name] = lambda plain=plain: plain_epoch(plain)
    return runs


def _plain_steps(trainer: Trainer, compiled: bool) -> dict[str, PlainStep]:
    steps = {"plain": plain_step(trainer)}
    return steps | {"compiled": plain_step(trainer).compiled()} if compiled else steps


def without_numba(run: Run) -> Run:
    """The run with PyTorch in place of numba's loops."""

    def forced() -> object:
        before = os.environ.get(_dispatch.ENVIRONMENT)
        os.environ[_dispatch.ENVIRONMENT] = "torch"
        try:
            return run()
        finally:
            del os.environ[_dispatch.ENVIRONMENT]
            if before is not None:
                os.environ[_dispatch.ENVIRONMENT] = before

    return forced


def products(trainer: Trainer) -> tuple[Run, str, int]:
    """The products that the trainer's next step cannot do without, in the fastest order of a CPU.

    Returns:
        The run; what the hidden layer is: a "code", the "active" neurons or "all", on CUDA the form
        of the graph; how many neurons fire in the batch.
    """
    (learner,) = trainer.learners
    address = learner.inputs[: trainer.config.batch_size]
    encoder, decoder = (p.detach().clone() for p in learner.parameters)
    hidden = _hidden(trainer, learner)
    path = "code" if isinstance(hidden, TopKOutput) else "all"
    if isinstance(hidden, ActiveNeurons) and hidden.neurons is not None:
        path = "active"
    if trainer.graphed is not None:
        (path,) = trainer.graphed._forms()
    scores = encoder.new_empty(len(encoder), len(address))
    if isinstance(hidden, TopKOutput):
        fires = hidden.values > 0
        slots = hidden.indices[fires].argsort(stable=True)
        neurons, counts = hidden.indices[fires].unique(return_counts=True)
        # The gradient of a touched address: the sum of its samples, each times a number.
        samples = fires.nonzero()[:, 0][slots]
        weights, offsets = hidden.values[fires][slots], counts.cumsum(0) - counts

        def code() -> None:
            torch.mm(encoder, address.T, out=scores)
            F.embedding_bag(samples, address, offsets, mode="sum", per_sample_weights=weights)

        return code, path, len(neurons)
    rows = decoder if hidden.neurons is None else decoder[hidden.neurons]
    # Any numbers do for what the gradients of logits and values are multiplied with.
    values, slopes = hidden.values.T.contiguous(), address[:, :CLASSES].contiguous()
    back, gradient = torch.empty_like(values), values.new_empty(len(rows), address.shape[1])

    def active() -> None:
        torch.mm(encoder, address.T, out=scores)
        rows.T @ values
        torch.mm(rows, slopes.T, out=back)
        torch.mm(values, address, out=gradient)
        slopes.T @ values.T

    return active, path, len(rows)


def protocol(neurons: int, device: torch.device) -> Trainer:
    """SSD on Split CIFAR-10 as in the paper, on synthetic features."""
    config = resolve({"dataset": "cifar10", "preset": f"paper-{neurons // 1000}k"})
    problem = Problem(R=neurons, N=10_000)
    count = CLASSES // config.tasks
    tasks = [
        make_task(problem, device, number, range(number * count, (number + 1) * count))
        for number in range(config.tasks)
    ]
    return Trainer([Learner(config, tasks, build_model(config, problem.d, CLASSES).to(device))])


def halves(trainer: Trainer) -> tuple[dict[str, Run], dict[str, int]]:
    """The two halves of our SSD step: what depends on all neurons, and what does not.

    The second one also for a code in which every slot is another neuron, so that it touches B k
    rows whatever R; and how many rows each touches.
    """
    (stack,), (learner,) = trainer.stacks, trainer.learners
    encoder = _sdmlp(learner).encoder
    samples = torch.arange(trainer.config.batch_size, device=trainer.device)
    address = learner.inputs[samples]
    code = encoder.encode(address)
    assert isinstance(code, TopKOutput)
    assert learner.distiller is not None
    terms = learner.distiller.terms(samples)
    batch = Batch(
        address, learner.labels[samples], torch.full_like(address[:, 0], 1 / len(samples)), terms
    )
    slots, neurons = code.indices.numel(), trainer.config.neurons
    codes = {BACKWARD: code}
    if slots <= neurons:
        spread = torch.arange(slots, device=trainer.device) * (neurons // slots)
        # Neighbours in a sample would make the gather easier than a code does.
        codes[APART] = code._replace(indices=spread.view(code.indices.shape[::-1]).T.contiguous())

    def backward(code: TopKOutput) -> Run:
        return lambda: sparse_step(stack, batch, code)

    runs: dict[str, Run] = {"encode": lambda: encoder.encode(address)}
    runs |= {name: backward(code) for name, code in codes.items()}
    rows = {name: len(code.indices[code.values > 0].unique()) for name, code in codes.items()}
    return runs, rows


def as_one_task(trainer: Trainer) -> Run:
    """The trainer's step with the importance of all past tasks as that of one, on the same rows."""
    (learner,) = trainer.learners
    (regularizer,) = learner.regularizers
    one = deepcopy(regularizer)
    one.load_state_dict(regularizer.state_dict() | {"tasks": torch.tensor(1)})
    one.parameters = learner.parameters
    step = step_of(trainer, 0)

    def run() -> None:
        learner.regularizers = [one]
        step()
        learner.regularizers = [regularizer]

    return run


def _sdmlp(learner: Learner) -> SDMLP:
    assert isinstance(learner.model, SDMLP)
    return learner.model


def _cycle(runs: list[Run]) -> Iterator[Run]:
    while True:
        yield from runs


def _endless(x: Tensor, y: Tensor, size: int) -> Iterator[list[Tensor]]:
    while True:
        yield from batches(x, y, size)
