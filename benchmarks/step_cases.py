"""What train_bench.py times: trainers and plain steps from the same weights on the same data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, repeat

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.plain import PlainSDMLP, PlainStep
from benchmarks.step_targets import APART, BACKWARD
from benchmarks.timing import Run
from ssd.activations import evaluating
from ssd.config import Config, resolve
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.step import Batch, sparse_step
from ssd.trainer import Trainer
from ssd_kernels import TopKOutput, _dispatch
from ssd_kernels._graded_code import ActiveNeurons

CLASSES = 10
BATCHES = 10  # in a synthetic task, unless the problem gives the number of samples
# Phases of the GABA switch: over; only LATE_ACTIVE k neurons fire for a sample; in its middle,
# where almost every neuron fires in a batch; not begun.
PHASES = INHIBITED, LATE, SWITCHING, EXCITED = "inhibited", "late switch", "mid-switch", "excited"
LATE_ACTIVE = 1.3
# Activations until a neuron is inhibited: STILL takes a million steps, so that the switch stands
# still while a step is timed.
STILL = 10**9
QUICK_SWITCH = 2560  # divides STILL


@dataclass(frozen=True)
class Problem:
    """The size of a step: B, d, R and k as everywhere, and N samples in a task."""

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
    """Rectified clusters, like the features of a network; each number gives other data."""
    draw = torch.Generator().manual_seed(number)
    y = torch.tensor(classes)[torch.arange(problem.N or problem.B * BATCHES) % len(classes)]
    centres = 1.5 * torch.randn(CLASSES, problem.d, generator=draw)
    x = (centres[y] + torch.randn(len(y), problem.d, generator=draw)).relu()
    x, y = x.to(device), y.to(device)
    tests = len(y) // 5
    return Task(tuple(classes), x, y, x[:tests], y[:tests])


def _learner(config: Config, tasks: list[Task], device: torch.device) -> Learner:
    d = tasks[0].x_train.shape[1]
    return Learner(config, tasks, build_model(config, d, CLASSES).to(device))


def make_trainer(
    problem: Problem,
    method: str,
    device: torch.device,
    past: int = 1,
    seeds: int = 1,
    phase: str = INHIBITED,
) -> Trainer:
    """A trainer at the beginning of a task, after `past` other tasks: it has a teacher.

    Args:
        seeds: how many learners. phase: one of PHASES.
    """
    # Data that the switch has not seen make many more neurons fire.
    numbers = [0 if phase == LATE else number for number in range(past + 1)]
    tasks = [make_task(problem, device, number) for number in numbers]
    config = Config(
        method=method,
        neurons=problem.R,
        k=problem.k,
        batch_size=problem.B,
        tasks=len(tasks),
        schedule="flat" if phase == INHIBITED else "gaba",
        epochs=10**6,
        eval_every=10**6,
        anneal_samples=QUICK_SWITCH if phase in (SWITCHING, LATE) else STILL,
    )
    trainer = Trainer([_learner(replace(config, seed=n), tasks, device) for n in range(seeds)])
    for trainer.task in range(past):
        for learner in trainer.learners:
            learner.begin_task(trainer.task)
        for step in range(BATCHES):
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

    def reached(learner: Learner) -> bool:
        encoder = learner.model.encoder
        if phase == SWITCHING:
            return bool(encoder.gaba().mean() >= 0.5)
        fires = _hidden(trainer, learner).values > 0
        return fires.sum(1).double().mean().item() <= LATE_ACTIVE * encoder.k

    for learner in trainer.learners:
        step = 0
        while not reached(learner):
            step_of(trainer, step)()
            step += 1
        learner.model.encoder.counts *= STILL // QUICK_SWITCH
        learner.model.encoder.anneal_samples = STILL
    if trainer.graphed is not None:  # it took the number when it was made
        trainer.graphed.anneal_samples.fill_(STILL)


def _hidden(trainer: Trainer, learner: Learner) -> TopKOutput | ActiveNeurons:
    """The hidden layer of the first batch, not counted."""
    with evaluating(learner.model):
        return learner.model.encoder.encode(learner.inputs[: trainer.config.batch_size])


def step_of(trainer: Trainer, step: int) -> Run:
    """A step on the task's batch of that number, counted round and round."""
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
    for learner in trainer.learners:  # more neurons fire than a code holds
        learner.model.encoder.dense_until.fill_(STILL)
    return trainer.graphed.first_step(trainer.task, trainer.epoch)


def important_rows(trainer: Trainer) -> int:
    """How many neurons a penalty pulls."""
    (learner,) = trainer.learners
    (regularizer,) = learner.regularizers
    rows = regularizer.rows()
    return trainer.config.neurons if rows is None else len(rows)


def plain_step(trainer: Trainer) -> PlainStep:
    """The mathematics of a trainer's next step in plain PyTorch, from copies of its weights."""
    (learner,) = trainer.learners
    encoder, decoder = (p.detach() for p in learner.parameters)
    layer = learner.model.encoder
    counts = layer.counts if layer.schedule == "gaba" else None

    def model() -> PlainSDMLP:
        made = PlainSDMLP(encoder, decoder, trainer.config.k, counts, layer.anneal_samples)
        return made.to(trainer.device)

    neurons = torch.zeros(0, dtype=torch.int64)
    if learner.distiller is not None:
        neurons = learner.distiller.neurons["encoder"]
    return PlainStep(model(), model().eval() if len(neurons) else None, neurons, trainer.config.lr)


def check(trainer: Trainer, plain: PlainStep) -> None:
    """SystemExit unless both compute the same loss and step, as times mean nothing otherwise."""
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
    steps = cycle([repeated(trainer)])
    if trainer.graphed is None:
        steps = cycle([step_of(trainer, step) for step in range(BATCHES)])
    stream = chain.from_iterable(repeat(_loader(trainer)))  # shuffled anew in each round
    runs: dict[str, Run] = {"ours": lambda: next(steps)()}
    for name, plain in _plain_steps(trainer, compiled).items():
        runs[name] = lambda plain=plain: plain(*next(stream))
    return runs


def epoch_runs(trainer: Trainer, compiled: bool = False) -> dict[str, Run]:
    """An epoch of every provider: order, gathers, steps and the running sums."""
    check(trainer, plain_step(trainer))
    events = (event for event in trainer.run() if event.kind == "epoch")
    loader = _loader(trainer)

    def plain_epoch(plain: PlainStep) -> float:
        return sum(float(plain(x, y)) * len(y) for x, y in loader)

    runs: dict[str, Run] = {"ours": lambda: next(events)}
    for name, plain in _plain_steps(trainer, compiled).items():
        runs[name] = partial(plain_epoch, plain)
    return runs


def _loader(trainer: Trainer) -> DataLoader:
    task = trainer.learners[0].tasks[trainer.task]
    samples = TensorDataset(task.x_train, task.y_train)
    return DataLoader(samples, batch_size=trainer.config.batch_size, shuffle=True)


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
        The run; the form of the hidden layer: "code", "active" or "all", on CUDA that of the graph;
        how many neurons fire in the batch.
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
        # The gradient of a touched address is a weighted sum of samples.
        samples = fires.nonzero()[:, 0][slots]
        weights, offsets = hidden.values[fires][slots], counts.cumsum(0) - counts

        def code() -> None:
            torch.mm(encoder, address.T, out=scores)
            F.embedding_bag(samples, address, offsets, mode="sum", per_sample_weights=weights)

        return code, path, len(neurons)
    rows = decoder if hidden.neurons is None else decoder[hidden.neurons]
    # Any numbers can stand for the gradients of logits and values.
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
    problem, count = Problem(R=neurons, N=10_000), CLASSES // config.tasks
    tasks = [
        make_task(problem, device, number, range(number * count, (number + 1) * count))
        for number in range(config.tasks)
    ]
    return Trainer([_learner(config, tasks, device)])


def halves(trainer: Trainer) -> tuple[dict[str, Run], dict[str, int]]:
    """The half of our SSD step whose time depends on all neurons, and the rest.

    The rest is also run on a code in which every slot is another neuron, so that it touches B k
    rows whatever R.

    Returns:
        The runs; how many rows each code touches.
    """
    (stack,), (learner,) = trainer.stacks, trainer.learners
    encoder = learner.model.encoder
    samples = torch.arange(trainer.config.batch_size, device=trainer.device)
    address = learner.inputs[samples]
    code = encoder.encode(address)
    weight = torch.full_like(address[:, 0], 1 / len(samples))
    batch = Batch(address, learner.labels[samples], weight, learner.distiller.terms(samples))
    slots, neurons = code.indices.numel(), trainer.config.neurons
    codes = {BACKWARD: code}
    if slots <= neurons:
        spread = torch.arange(slots, device=trainer.device) * (neurons // slots)
        # Neighbours in a sample would make the gather easier than a code does.
        codes[APART] = code._replace(indices=spread.view(code.indices.shape[::-1]).T.contiguous())
    runs: dict[str, Run] = {"encode": partial(encoder.encode, address)}
    runs |= {name: partial(sparse_step, stack, batch, code) for name, code in codes.items()}
    rows = {name: len(code.indices[code.values > 0].unique()) for name, code in codes.items()}
    return runs, rows


def as_one_task(trainer: Trainer) -> Run:
    """The trainer's step with the importance of all past tasks given as one task's."""
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
