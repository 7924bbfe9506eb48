"""Measures the training step beside plain PyTorch, and how its parts grow with the problem.

    python benchmarks/train_bench.py [--quick] [--out FILE.csv]

Providers of a step: ours; plain (benchmarks/plain.py: dense eager autograd, a DataLoader, an
optimiser, the teacher at every step); compiled, the same under torch.compile; and the float32
product x W1^T alone, the floor of every method that computes all scores in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import record
from benchmarks.plain import PlainSDMLP, PlainStep, batches
from benchmarks.timing import Run, alternate
from ssd.config import Config
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.trainer import Trainer

CLASSES = 10
SAMPLES = 10  # batches in the synthetic task


@dataclass(frozen=True)
class Problem:
    """The size of a step; B, d, R, k as everywhere."""

    B: int = 128
    d: int = 256
    R: int = 10_000
    k: int = 10

    def shape(self, **more: int) -> dict[str, int]:
        return {"B": self.B, "d": self.d, "R": self.R, "k": self.k, "C": CLASSES, **more}


def features(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rectified clusters, as the features of a network are; [N, d] and labels [N]."""
    count = problem.B * SAMPLES
    y = torch.arange(count, device=device) % CLASSES
    centres = 1.5 * torch.randn(CLASSES, problem.d, device=device)
    return (centres[y] + torch.randn(count, problem.d, device=device)).relu(), y


def make_trainer(
    problem: Problem, method: str, device: torch.device, ewc_tasks: int = 1, seeds: int = 1
) -> Trainer:
    """A trainer in its second task: the GABA switch is over and there is a teacher."""
    torch.manual_seed(0)
    x, y = features(problem, device)
    task = Task(tuple(range(CLASSES)), x, y, x[:10], y[:10])
    learners = []
    for seed in range(seeds):
        config = Config(
            method=method, neurons=problem.R, k=problem.k, batch_size=problem.B, schedule="flat",
            tasks=2, seed=seed,
        )  # fmt: skip
        learners.append(
            Learner(config, [task, task], build_model(config, problem.d, CLASSES).to(device))
        )
    trainer = Trainer(learners)
    for step in range(20):
        step_of(trainer, step % SAMPLES)()
    for learner in learners:
        for regularizer in learner.regularizers * ewc_tasks:
            regularizer.end_task(x, torch.arange(len(x), device=device))
        if learner.distiller is not None:
            learner.distiller.end_task(x)
            learner.distiller.begin_task(x)
    trainer.task = 1
    return trainer


def step_of(trainer: Trainer, batch: int) -> Run:
    size = trainer.config.batch_size
    samples = torch.arange(batch * size, (batch + 1) * size, device=trainer.device)
    return lambda: trainer.step([samples] * len(trainer.learners))


def repeated(trainer: Trainer) -> Run:
    """A step as training takes it: on CUDA a replay of the graph."""
    if trainer.resident is None:
        return step_of(trainer, 0)
    trainer.load_task()
    return trainer.resident.first_step()


def endless(x: Tensor, y: Tensor, size: int) -> Iterator[list[Tensor]]:
    while True:
        yield from batches(x, y, size)


def step_runs(
    problem: Problem, method: str, device: torch.device, compiled: bool
) -> dict[str, Run]:
    """A step of every provider, from the same weights."""
    trainer = make_trainer(problem, method, device)
    (learner,) = trainer.learners
    encoder, decoder = (p.detach() for p in learner.parameters)
    task = learner.tasks[0]
    neurons = torch.zeros(0, dtype=torch.int64)
    if learner.distiller is not None:
        neurons = learner.distiller.neurons["encoder"]

    def plain() -> PlainStep:
        model = PlainSDMLP(encoder, decoder, problem.k).to(device)
        teacher = PlainSDMLP(encoder, decoder, problem.k).to(device) if len(neurons) else None
        return PlainStep(model, teacher, neurons, trainer.config.lr)

    expected = plain().loss(task.x_train, task.y_train).item()
    stepper, stream = plain(), endless(task.x_train, task.y_train, problem.B)
    eager = [step_of(trainer, batch) for batch in range(SAMPLES)]
    ours = cycle(eager if trainer.resident is None else [repeated(trainer)])
    address = F.normalize(task.x_train[: problem.B], dim=1)
    runs: dict[str, Run] = {
        "ours": lambda: next(ours)(),
        "plain": lambda: stepper(*next(stream)),
        "float32 product alone": lambda: address @ encoder.T,
    }
    if compiled:
        fast = plain().compiled()
        runs["compiled"] = lambda: fast(*next(stream))
    check(trainer, expected)
    return runs


def check(trainer: Trainer, expected: float) -> None:
    """The providers must compute the same loss, or their times mean nothing."""
    (learner,) = trainer.learners
    task = learner.tasks[0]
    with torch.no_grad():
        logits = learner.model(task.x_train)
        samples = torch.arange(len(task.y_train), device=logits.device)
        if learner.distiller is None:
            loss = F.cross_entropy(logits, task.y_train).item()
        else:
            loss = learner.distiller.loss(logits, task.y_train, samples).item()
    if abs(loss - expected) > 1e-4 * max(1.0, abs(expected)):
        raise SystemExit(f"train_bench: our loss {loss} is not the plain one {expected}")


def parts(problem: Problem, device: torch.device) -> dict[str, Run]:
    """The two halves of our SSD step: what depends on all neurons, and what does not."""
    trainer = make_trainer(problem, "ssd", device)
    (learner,) = trainer.learners
    encoder = learner.model.encoder
    samples = torch.arange(problem.B, device=device)
    step_of(trainer, 0)()  # loads the task
    address = learner.inputs[samples]
    code = encoder.code(address)
    assert code is not None

    def backward() -> None:
        trainer._sparse_step({0: (address, code._replace(values=code.values.detach()))}, [samples])

    return {"encode": lambda: encoder.code(address), "backward + update": backward}


class Bench:
    """Times runs in turns and writes a row for each."""

    def __init__(self, writer: record.Writer, device: torch.device, seconds: float) -> None:
        self.writer, self.device, self.seconds = writer, device, seconds

    def measure(self, op: str, runs: dict[str, Run], shape: dict[str, int]) -> dict[str, float]:
        """Medians in milliseconds by provider."""
        for run in runs.values():
            run()  # compiles and fills caches
        times, errors = alternate(runs, self.seconds, self.device)
        for name, error in errors.items():
            print(f"{op} {name}: {error}", file=sys.stderr)
        for name, t in times.items():
            self.writer.write(
                record.Row(
                    op,
                    name,
                    "step",
                    "float32",
                    shape,
                    "time",
                    t.p20,
                    t.p50,
                    t.p80,
                    "ms",
                    None,
                    True,
                )
            )
        return {name: t.p50 for name, t in times.items()}


def growth(bench: Bench, quick: bool) -> dict[str, dict[str, dict[int, float]]]:
    """{axis: {part: {size: ms}}}; R reaches a million neurons."""
    sizes = {
        "R": [1000, 10_000, 100_000, 1_000_000],
        "B": [32, 128, 512],
        "k": [2, 10, 50],
        "d": [64, 256, 1024],
    }
    grown: dict[str, dict[str, dict[int, float]]] = {}
    for axis, values in sizes.items():
        for value in track(values[:2] if quick else values, f"growth in {axis}"):
            problem = Problem(**{axis: value})
            runs = parts(problem, bench.device)
            for part, ms in bench.measure(f"growth {axis}", runs, problem.shape()).items():
                grown.setdefault(axis, {}).setdefault(part, {})[value] = ms
    for axis, method, values, part in (
        ("tasks", "ssd+ewc", [1, 2] if quick else [1, 10, 50], "step with EWC"),
        ("S", "ssd", [1, 2] if quick else [1, 2, 5, 10], "step of S learners"),
    ):
        # In turns, or a drift of the machine would pass for growth.
        runs = {}
        for value in track(values, f"growth in {axis}"):
            chosen = {"ewc_tasks": value} if axis == "tasks" else {"seeds": value}
            runs[str(value)] = repeated(make_trainer(Problem(), method, bench.device, **chosen))
        times = bench.measure(f"growth {axis}", runs, Problem().shape())
        grown[axis] = {part: {value: times[str(value)] for value in values}}
    return grown


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log size, least squares."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def draw(grown: dict[str, dict[str, dict[int, float]]], path: Path, title: str) -> None:
    figure, axes = plt.subplots(
        1, len(grown), figsize=(3.2 * len(grown), 3.4), layout="constrained"
    )
    for ax, (axis, curves) in zip(axes, grown.items(), strict=True):
        for part, times in curves.items():
            label = f"{part}, exponent {exponent(times):.2f}"
            ax.loglog(list(times), list(times.values()), "o-", label=label)
        ax.set(xlabel=axis, ylabel="ms")
        ax.legend(frameon=False, fontsize="x-small")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def targets(
    steps: dict[tuple[str, int], dict[str, float]],
    grown: dict[str, dict[str, dict[int, float]]],
) -> list[tuple[str, str, str]]:
    """What the step is meant to reach, what it reached, and whether that is enough."""
    rows = []
    for (method, neurons), ms in steps.items():
        least = 5.0 if method == "ssd" else 3.0
        ratio = ms["plain"] / ms["ours"]
        name = f"{method} step against plain, R = {neurons:,}"
        rows.append((name, f"{ratio:.1f}x of >= {least:.0f}x", verdict(ratio >= least)))
        if "compiled" in ms:
            rows.append((f"{name} compiled", f"{ms['compiled'] / ms['ours']:.1f}x", ""))
        floor = ms["float32 product alone"]
        rows.append(
            (f"{method} step against the float32 product alone, R = {neurons:,}",
             f"{ms['ours'] / floor:.2f} of <= 1", verdict(ms["ours"] <= floor))
        )  # fmt: skip
    update = grown["R"]["backward + update"]
    if 1_000_000 in update:
        ratio = update[1_000_000] / update[10_000]
        rows.append(
            ("backward + update, R from 10,000 to 1,000,000", f"{ratio:.2f} of < 1.3",
             verdict(ratio < 1.3))
        )  # fmt: skip
    seeds = grown["S"]["step of S learners"]
    if 10 in seeds:
        rows.append(("step of 10 learners at once against 1", f"{seeds[10] / seeds[1]:.1f}x", ""))
    tasks = grown["tasks"]["step with EWC"]
    if 50 in tasks:
        ratio = tasks[50] / tasks[1]
        rows.append(
            ("step with 50 EWC tasks against 1", f"{ratio:.2f} of <= 1.05", verdict(ratio <= 1.05))
        )
    return rows


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/<device>)")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, console = record.device_name(device), Console()
    path = options.out or record.results_folder(device) / "train_bench.csv"
    title = f"{name}; torch {torch.__version__}"
    console.print(title if device.type == "cuda" else f"CPU FIGURES, no GPU was used: {title}")
    sizes = [2000] if options.quick else [10_000, 100_000]
    steps: dict[tuple[str, int], dict[str, float]] = {}
    with record.Writer(path, name) as writer:
        bench = Bench(writer, device, 0.2 if options.quick else 4.0)
        for neurons in sizes:
            for method in ("ssd", "sdmlp"):
                problem = Problem(R=neurons)
                runs = step_runs(problem, method, device, compiled=not options.quick)
                steps[method, neurons] = bench.measure(method, runs, problem.shape())
        grown = growth(bench, options.quick)
    draw(grown, path.with_suffix(".png"), title)
    measured = [
        (f"{method}, R = {neurons:,}", provider, f"{ms:.2f}")
        for (method, neurons), times in steps.items()
        for provider, ms in times.items()
    ]
    console.print(table("step", ("problem", "provider", "median ms"), measured))
    curves = [
        (axis, part, ", ".join(f"{size:,}: {ms:.2f}" for size, ms in times.items()),
         f"{exponent(times):.2f}")
        for axis, by_part in grown.items()
        for part, times in by_part.items()
    ]  # fmt: skip
    console.print(table("growth", ("axis", "part", "ms by size", "exponent"), curves))
    console.print(table("targets", ("target", "measured", ""), targets(steps, grown)))
    console.print(f"rows: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
