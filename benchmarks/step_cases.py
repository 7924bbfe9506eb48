"""What train_bench.py times: trainers and plain steps from the same weights on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.plain import PlainSDMLP, PlainStep, batches
from benchmarks.step_targets import APART, BACKWARD, PRODUCTS
from benchmarks.timing import Run
from ssd.activations import evaluating
from ssd.config import Config
from ssd.cuda_graph import DENSE
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.sdmlp import SDMLP
from ssd.step import Batch, sparse_step
from ssd.trainer import Trainer
from ssd_kernels import TopKOutput

CLASSES = 10
BATCHES = 10  # in a synthetic task, unless the problem says how many samples
STEPS = 10  # trained on every past task: each of its batches once
# Where the GABA switch stands: before it, in its middle, after it.
EXCITED, SWITCHING, INHIBITED = "excited", "mid-switch", "inhibited"
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


def make_task(problem: Problem, device: torch.device, number: int) -> Task:
    """Rectified clusters, as the features of a network are; other ones for every number."""
    draw = torch.Generator().manual_seed(number)
    y = torch.arange(problem.N or problem.B * BATCHES) % CLASSES
    centres = 1.5 * torch.randn(CLASSES, problem.d, generator=draw)
    x = (centres[y] + torch.randn(len(y), problem.d, generator=draw)).relu()
    x, y = x.to(device), y.to(device)
    return Task(tuple(range(CLASSES)), x, y, x[:10], y[:10])


def make_trainer(
    problem: Problem,
    method: str,
    device: torch.device,
    past: int = 1,
    seeds: int = 1,
    phase: str = INHIBITED,
) -> Trainer:
    """A trainer at the beginning of a task, with so many past ones: it has a teacher."""
    tasks = [make_task(problem, device, number) for number in range(past + 1)]
    config = Config(
        method=method, neurons=problem.R, k=problem.k, batch_size=problem.B, tasks=len(tasks),
        schedule="flat" if phase == INHIBITED else "gaba", epochs=10**6, eval_every=10**6,
        anneal_samples=QUICK_SWITCH if phase == SWITCHING else STILL,
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
        if phase == SWITCHING and trainer.task == 0:
            _switch_half(trainer)
        for learner in trainer.learners:
            learner.end_task(trainer.task)
    trainer.task = past
    for learner in trainer.learners:
        learner.begin_task(past)
    trainer.load_task()
    return trainer


def _switch_half(trainer: Trainer) -> None:
    """Trains until g is 1/2 on average, and stops the switch there."""
    for learner in trainer.learners:
        encoder = _sdmlp(learner).encoder
        step = 0
        while encoder.gaba().mean() < 0.5:
            step_of(trainer, step)()
            step += 1
        encoder.counts *= STILL // QUICK_SWITCH
        encoder.anneal_samples = STILL
    if trainer.graphed is not None:  # it took the number when it was made
        trainer.graphed.anneal_samples.fill_(STILL)


def graded_share(trainer: Trainer) -> float:
    """The share of neurons with 0 < g < 1."""
    gaba = _sdmlp(trainer.learners[0]).encoder.gaba()
    return ((gaba > 0) & (gaba < 1)).double().mean().item()


def step_of(trainer: Trainer, step: int) -> Run:
    size = trainer.config.batch_size
    first = step % BATCHES * size
    samples = torch.arange(first, first + size, device=trainer.device)
    return lambda: trainer.step([samples] * len(trainer.learners))


def repeated(trainer: Trainer) -> Run:
    """A step as training takes it: on CUDA a replay of the graph."""
    if trainer.graphed is None:
        return step_of(trainer, 0)
    trainer.load_task()
    return trainer.graphed.first_step(trainer.task, trainer.epoch)


def path_of(trainer: Trainer) -> str:
    """What the hidden layer mostly is: a "code", the "active" neurons, or "all"."""
    if trainer.graphed is not None:
        (form,) = set(trainer.graphed._begin(trainer.task, trainer.epoch))
        return "all" if form == DENSE else "code"
    (stack,) = trainer.stacks
    learner, size = stack.learners[0], trainer.config.batch_size
    taken = []
    for first in range(0, BATCHES * size, size):
        hidden = stack.encoders[0].encode(learner.inputs[first : first + size])
        coded = isinstance(hidden, TopKOutput)
        taken.append("code" if coded else "all" if hidden.neurons is None else "active")
    return max(taken, key=taken.count)


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
    plain = plain_step(trainer)
    runs: dict[str, Run] = {
        "ours": lambda: next(ours)(),
        "plain": lambda: plain(*next(stream)),
    }
    if compiled:
        fast = plain_step(trainer).compiled()
        runs["compiled"] = lambda: fast(*next(stream))
    return runs


def products(trainer: Trainer) -> dict[str, Run]:
    """All scores in float32, see PRODUCTS."""
    (learner,) = trainer.learners
    address = learner.inputs[: trainer.config.batch_size]
    weight = learner.parameters[0].detach().clone()
    kept = weight.new_empty(len(weight), len(address))
    written, fastest = PRODUCTS
    return {
        written: lambda: address @ weight.T,
        fastest: lambda: torch.mm(weight, address.T, out=kept),
    }


def epoch_runs(trainer: Trainer) -> dict[str, Run]:
    """An epoch of every provider: order, gathers, steps and the running sums."""
    (learner,) = trainer.learners
    task, size = learner.tasks[trainer.task], trainer.config.batch_size
    plain = plain_step(trainer)
    events = (event for event in trainer.run() if event.kind == "epoch")
    loader = batches(task.x_train, task.y_train, size)

    def plain_epoch() -> float:
        return sum(float(plain(x, y)) * len(y) for x, y in loader)

    return {"ours": lambda: next(events), "plain": plain_epoch}


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
