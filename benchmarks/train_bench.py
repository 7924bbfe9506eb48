"""Measures the training step beside plain PyTorch, and how its parts grow with the problem.

    python benchmarks/train_bench.py [--quick] [--previous CHECKOUT] [--protocol SECONDS]

Providers of a step and an epoch: ours; ours without numba, where it is installed; plain
(benchmarks/plain.py: dense eager autograd, a DataLoader, an optimiser, the teacher at every step);
compiled, the same under torch.compile; previous, the step of another checkout in a process of its
own; and of a step its products alone, see step_cases.products.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import record, step_cases, step_targets
from benchmarks.previous import Previous
from benchmarks.record import Row
from benchmarks.step_cases import (
    EXCITED,
    INHIBITED,
    LATE,
    SWITCHING,
    Problem,
    make_trainer,
    step_of,
)
from benchmarks.timing import Run, SelfTimed, alternate
from ssd.cli import ArgumentParser, exit_status
from ssd.trainer import Trainer
from ssd_kernels import _dispatch

Shape = dict[str, int]
PHASES = (INHIBITED, LATE, SWITCHING, EXCITED)
LINE = 4  # points that a line takes
Curves = dict[str, dict[str, dict[int, Row]]]


class Bench:
    """Times runs in turns and writes a row for each."""

    def __init__(
        self,
        writer: record.Writer,
        device: torch.device,
        options: argparse.Namespace,
        previous: Previous | None,
    ) -> None:
        self.writer, self.device, self.previous = writer, device, previous
        self.quick, self.compiles = options.quick, not (options.quick or options.no_compile)
        self.before = "" if previous is None else record.commit(options.previous)

    def measure(
        self, op: str, runs: dict[str, Run], shape: Shape, seconds: float = 1.5, mode: str = "step"
    ) -> None:
        """Each is timed for so long and at least five times."""
        ready = {}
        for name, run in runs.items():
            try:
                run()  # compiles and fills caches
                ready[name] = run
            except Exception as error:
                print(f"{op} {name}: {error}", file=sys.stderr)
        times, errors = alternate(ready, 0.1 if self.quick else seconds, self.device)
        for name, error in errors.items():
            print(f"{op} {name}: {error}", file=sys.stderr)
        for name, t in times.items():
            self.write(op, name, shape, "time", t.p20, t.p50, t.p80, mode=mode)

    def note(
        self, op: str, provider: str, shape: Shape, metric: str, value: float, mode: str = "step"
    ) -> None:
        """Something counted that the time goes with."""
        self.write(op, provider, shape, metric, value, value, value, "", mode)

    def write(
        self, op: str, provider: str, shape: Shape, metric: str, p20: float, p50: float, p80: float,
        unit: str = "ms", mode: str = "step",
    ) -> None:  # fmt: skip
        commit = self.before if provider == "previous" else ""
        self.writer.write(
            Row(
                op, provider, mode, "float32", shape, metric, p20, p50, p80, unit, None, True,
                commit=commit,
            )
        )  # fmt: skip


def compare(bench: Bench, mode: str, problem: Problem, phase: str) -> None:
    """A step or an epoch of every provider in a phase of the GABA switch."""
    op, shape = f"ssd {phase}", problem.shape()
    make = step_cases.step_runs if mode == "step" else step_cases.epoch_runs

    def trainer() -> Trainer:
        return make_trainer(problem, "ssd", bench.device, phase=phase)

    timed = trainer()
    runs = make(timed, bench.compiles)
    if _dispatch.NUMBA and bench.device.type == "cpu":
        ours = step_cases.without_numba(lambda: make(trainer(), False)["ours"])()
        runs["without numba"] = step_cases.without_numba(ours)
    if bench.previous is not None:
        try:
            bench.previous.prepare(mode, asdict(problem), phase)
            runs["previous"] = SelfTimed(bench.previous.sample)
        except RuntimeError as error:
            print(f"{op} previous: {error}", file=sys.stderr)
    if mode == "step":
        runs[step_targets.PRODUCTS], path, firing = step_cases.products(timed)
        bench.note(op, step_targets.PRODUCTS, shape, "neurons that fire", firing)
        bench.note(op, "ours", shape, path, 1)
    bench.measure(op, runs, shape, mode=mode)


def steps(bench: Bench) -> None:
    sizes = [1000] if bench.quick else [1000, 10_000]
    cases = [(neurons, phase) for neurons in sizes for phase in PHASES]
    for neurons, phase in track([*cases, (2000 if bench.quick else 100_000, INHIBITED)], "steps"):
        compare(bench, "step", Problem(R=neurons), phase)


def epochs(bench: Bench) -> None:
    sizes, samples = ([1000], 1500) if bench.quick else ([1000, 10_000], 10_000)
    for neurons, phase in track([(n, phase) for n in sizes for phase in PHASES], "epochs"):
        compare(bench, "epoch", Problem(R=neurons, N=samples), phase)


def protocol(bench: Bench, seconds: float) -> None:
    """Split CIFAR-10 from the first step to the end, cut to fewer epochs if it takes longer."""
    for neurons in track([1000] if bench.quick else [1000, 10_000], "whole protocol"):
        trainer = step_cases.protocol(neurons, bench.device)
        tasks, taken, fewest = trainer.config.tasks, [], trainer.config.epochs
        start = last = time.perf_counter()
        for event in trainer.run():
            if event.kind == "step":
                continue
            now = time.perf_counter()
            if event.kind == "epoch":
                taken.append(1e3 * (now - last))
                if now - start > seconds * (event.task + 1) / tasks:
                    trainer.epoch = trainer.config.epochs  # which ends the task
                    fewest = min(fewest, event.epoch + 1)
            last = now
        shape = Problem(R=neurons, N=len(trainer.learners[0].labels)).shape(tasks=tasks)
        bench.write("ssd", "ours", shape, "time", *[1e3 * (last - start)] * 3, mode="protocol")
        bench.note("ssd", "ours", shape, "epochs", fewest, mode="protocol")
        quantiles = map(float, np.percentile(taken, [20, 50, 80]))
        bench.write("ssd", "ours", shape, "an epoch", *quantiles, mode="protocol")


def growth(bench: Bench) -> None:
    """R reaches a million neurons."""
    sizes = {
        "R": [1000, 10_000, 100_000, 1_000_000],
        "B": [32, 128, 512],
        "k": [2, 10, 50],
        "d": [64, 256, 1024],
    }
    for axis, values in sizes.items():
        for value in track(values[:2] if bench.quick else values, f"growth in {axis}"):
            problem = Problem(**{axis: value})
            runs, rows = step_cases.halves(make_trainer(problem, "ssd", bench.device))
            for part, count in rows.items():
                bench.note(f"growth {axis}", part, problem.shape(), "touched rows", count)
            bench.measure(f"growth {axis}", runs, problem.shape())


def growth_in_tasks(bench: Bench) -> None:
    """Each past task had data of its own, and steps that moved the weights."""
    problem = Problem(R=2000) if bench.quick else Problem()
    numbers = [1, 2] if bench.quick else [1, 10, 50]
    runs: dict[str, Run] = {}
    for number in track(numbers, "growth in tasks"):
        trainer = make_trainer(problem, "ssd+ewc", bench.device, past=number)
        runs[str(number)] = step_of(trainer, 0)
        rows = step_cases.important_rows(trainer)
        bench.note("growth tasks", str(number), problem.shape(), "important rows", rows)
    runs[f"{step_targets.SAME_ROWS} {numbers[-1]}"] = step_cases.as_one_task(trainer)
    # In turns, or a drift of the machine would pass for growth.
    bench.measure("growth tasks", runs, problem.shape(), seconds=4.0)


def growth_in_learners(bench: Bench) -> None:
    numbers = [1, 2] if bench.quick else [1, 2, 5, 10]
    problem = Problem(R=2000) if bench.quick else Problem()
    runs = {
        str(n): step_cases.repeated(make_trainer(problem, "ssd", bench.device, seeds=n))
        for n in track(numbers, "growth in S")
    }
    bench.measure("growth S", runs, problem.shape())


def curves(rows: list[Row]) -> Curves:
    """{what grows: {part: {size: row}}}; what is no size of the problem is the provider's name."""
    found: Curves = {}
    for row in rows:
        axis = row.op.removeprefix("growth ")
        if axis == row.op or row.metric != "time":
            continue
        if axis in row.shape:
            found.setdefault(axis, {}).setdefault(row.provider, {})[row.shape[axis]] = row
        elif row.provider.isdigit():
            found.setdefault(axis, {}).setdefault("step", {})[int(row.provider)] = row
    return found


def exponent(points: dict[int, Row]) -> str:
    """Slope of log time over log size, least squares; empty of one point."""
    if len(points) < 2:
        return ""
    times = [row.p50 for row in points.values()]
    return f"{np.polyfit(np.log(list(points)), np.log(times), 1)[0]:.2f}"


def draw(grown: Curves, path: Path, title: str) -> None:
    """Medians with p20 to p80; few points get no line."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for ax, (axis, parts) in zip(axes.flat, grown.items(), strict=True):
        for part, points in parts.items():
            p20, p50, p80 = (
                np.array([getattr(row, name) for row in points.values()])
                for name in ("p20", "p50", "p80")
            )
            slope = exponent(points)
            ax.errorbar(
                list(points), p50, yerr=(p50 - p20, p80 - p50), markersize=4, capsize=3,
                fmt="o-" if len(points) >= LINE else "o",
                label=f"{part}: {slope}" if slope else part,
            )  # fmt: skip
        sizes = sorted({size for points in parts.values() for size in points})
        ax.set(xscale="log", yscale="log", xlabel=axis, ylabel="ms")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        ax.yaxis.set_major_formatter("{x:g}")
        for each in (ax.xaxis, ax.yaxis):
            each.set_minor_locator(NullLocator())
        low, high = ax.get_ylim()
        room = max(high / low, 4)
        ax.set_ylim(low / room**0.2, high * room**0.5)  # the legend is above the points
        ax.legend(frameon=False, fontsize="small", loc="upper left", title="exponent of growth",
                  title_fontsize="small", alignment="left")  # fmt: skip
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    shown = Table(*columns, title=title)
    for row in rows:
        shown.add_row(*row)
    return shown


def show(console: Console, rows: list[Row]) -> None:
    """Everything timed, how it grows, and what it says of the targets."""
    timed = [
        (f"{row.op} {row.mode}, R = {row.shape['R']:,}", row.provider,
         *(f"{figure:.2f}" for figure in (row.p20, row.p50, row.p80) if figure is not None))
        for row in rows
        if row.metric == "time" and not row.op.startswith("growth")
    ]  # fmt: skip
    columns = ("problem", "provider", "p20 ms", "p50 ms", "p80 ms")
    console.print(table("steps, epochs and protocols", columns, timed))
    grown = [
        (axis, part, ", ".join(f"{size:,}: {row.p50:.2f}" for size, row in points.items()),
         exponent(points))
        for axis, parts in curves(rows).items()
        for part, points in parts.items()
    ]  # fmt: skip
    console.print(table("growth", ("axis", "part", "ms by size", "exponent"), grown))
    console.print(table("targets", ("target", "measured", ""), step_targets.verdicts(rows)))


def _options() -> argparse.Namespace:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/<device>)")
    parser.add_argument("--previous", type=Path, metavar="CHECKOUT", help="of an earlier release")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--protocol", type=float, metavar="SECONDS",
                        help="for each protocol (default: 60 on CUDA, none on a CPU)")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = _options()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    seconds = options.protocol if options.protocol is not None else 60.0 if cuda else 0.0
    name, console = record.device_name(device), Console(width=None if sys.stdout.isatty() else 140)
    path = record.results_path(options.out, options.quick, device, "train_bench")
    title = f"{name}; torch {torch.__version__}"
    console.print(title if cuda else f"CPU FIGURES, no GPU was used: {title}")
    before = nullcontext() if options.previous is None else Previous(options.previous)
    with record.Writer(path, name) as writer, before as previous:
        bench = Bench(writer, device, options, previous)
        steps(bench)
        growth_in_learners(bench)
        if seconds > 0:
            protocol(bench, seconds)
        epochs(bench)
        growth(bench)
        growth_in_tasks(bench)
    draw(curves(writer.rows), path.with_suffix(".png"), title)
    show(console, writer.rows)
    console.print(f"rows: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
