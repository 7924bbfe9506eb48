"""Measures the training step beside plain PyTorch, and how its parts grow with the problem.

    python benchmarks/train_bench.py [--quick] [--previous CHECKOUT] [--protocol SECONDS]

Providers of a step and an epoch: ours; ours without numba, where it is installed; plain
(benchmarks/plain.py: dense eager autograd, a DataLoader, an optimiser, the teacher at every step);
compiled, the same under torch.compile; previous, the step of another checkout in a process of its
own; and of a step its products alone, see step_cases.products.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import bench, step_cases, step_targets
from benchmarks.previous import Previous
from benchmarks.record import Row
from benchmarks.report import measurements, table
from benchmarks.step_cases import PHASES, Problem, make_trainer, step_of
from benchmarks.timing import Quantiles, Run, SelfTimed, alternate, quantiles
from ssd.cli import exit_status
from ssd.storage.provenance import commit
from ssd_kernels import _dispatch

LINE = 4  # a curve of fewer points is drawn without a line
Curves = dict[str, dict[str, dict[int, Row]]]


class Steps:
    """Times runs in turns and writes a row for each."""

    def __init__(self, run: bench.Bench, previous: Previous | None) -> None:
        self.bench, self.device, self.previous = run, run.device, previous
        self.quick = run.options.quick
        self.compiles = not (self.quick or run.options.no_compile)
        other = run.options.previous
        self.before = commit(other / "benchmarks" / "step_cases.py") if other else ""

    def time(
        self,
        op: str,
        runs: dict[str, Run],
        problem: Problem,
        seconds: float = 1.5,
        mode: str = "step",
    ) -> None:
        """Writes the times of runs, each timed for so long and at least five times."""
        ready, errors = {}, {}
        for name, run in runs.items():
            try:
                run()  # compiles and fills caches
                ready[name] = run
            except Exception as error:
                errors[name] = error
        times, raised = alternate(ready, 0.1 if self.quick else seconds, self.device)
        for name, error in {**errors, **raised}.items():
            print(f"{op} {name}: {error}", file=sys.stderr)
        for name, taken in times.items():
            self.write(op, name, problem, "time", taken, mode)

    def write(
        self,
        op: str,
        provider: str,
        problem: Problem,
        metric: str,
        figure: Quantiles | float,
        mode: str = "step",
        **sizes: int,
    ) -> None:
        """Writes quantiles in milliseconds, or a count that a time goes with."""
        timed = isinstance(figure, Quantiles)
        found, unit = (figure, "ms") if timed else (quantiles([figure]), "")
        case = op, provider, mode, "float32", problem.shape(**sizes)
        own = self.before if provider == "previous" else ""
        self.bench.write(case, metric, found, unit, commit=own)

    def compare(self, mode: str, problem: Problem, phase: str) -> None:
        """A step or an epoch of every provider in a phase of the GABA switch."""
        op = f"ssd {phase}"
        make = step_cases.step_runs if mode == "step" else step_cases.epoch_runs
        timed = make_trainer(problem, "ssd", self.device, phase=phase)
        runs = make(timed, self.compiles)
        if _dispatch.NUMBA and not self.bench.cuda:
            other = step_cases.without_numba(
                lambda: make(make_trainer(problem, "ssd", self.device, phase=phase), False)["ours"]
            )()
            runs["without numba"] = step_cases.without_numba(other)
        if self.previous is not None:
            try:
                self.previous.prepare(mode, asdict(problem), phase)
                runs["previous"] = SelfTimed(self.previous.sample)
            except RuntimeError as error:
                print(f"{op} previous: {error}", file=sys.stderr)
        if mode == "step":
            runs[step_targets.PRODUCTS], path, firing = step_cases.products(timed)
            self.write(op, step_targets.PRODUCTS, problem, "neurons that fire", firing)
            self.write(op, "ours", problem, path, 1)
        self.time(op, runs, problem, mode=mode)

    def phases(self, mode: str, samples: int | None = None) -> None:
        """Steps or epochs in every phase of the switch, and the step of a large layer after it."""
        sizes = [1000] if self.quick else [1000, 10_000]
        cases = [(Problem(R=n, N=samples), phase) for n in sizes for phase in PHASES]
        if mode == "step":
            cases.append((Problem(R=2000 if self.quick else 100_000), step_cases.INHIBITED))
        for problem, phase in track(cases, f"{mode}s"):
            self.compare(mode, problem, phase)

    def protocol(self, seconds: float) -> None:
        """Split CIFAR-10 from the first step to the end, cut to fewer epochs if it takes longer."""
        for neurons in track([1000] if self.quick else [1000, 10_000], "whole protocol"):
            trainer = step_cases.protocol(neurons, self.device)
            tasks, taken, fewest = trainer.config.tasks, [], trainer.config.epochs
            start = last = time.perf_counter()
            for event in trainer.run():
                if event.kind == "step":
                    continue
                now = time.perf_counter()
                if event.kind == "epoch":
                    taken.append(1e3 * (now - last))
                    if now - start > seconds * (event.task + 1) / tasks:
                        trainer.epoch = trainer.config.epochs  # ends the task
                        fewest = min(fewest, event.epoch + 1)
                last = now
            problem = Problem(R=neurons, N=len(trainer.learners[0].labels))
            whole, epoch = quantiles([1e3 * (last - start)]), quantiles(taken)
            for metric, figure in {"time": whole, "epochs": fewest, "an epoch": epoch}.items():
                self.write("ssd", "ours", problem, metric, figure, "protocol", tasks=tasks)

    def growth(self) -> None:
        """The parts of a step while one size grows."""
        for axis, sizes in (
            ("R", [1000, 10_000, 100_000, 1_000_000]),
            ("B", [32, 128, 512]),
            ("k", [2, 10, 50]),
            ("d", [64, 256, 1024]),
        ):
            for size in track(sizes[:2] if self.quick else sizes, f"growth in {axis}"):
                problem = Problem(**{axis: size})
                runs, rows = step_cases.halves(make_trainer(problem, "ssd", self.device))
                for part, count in rows.items():
                    self.write(f"growth {axis}", part, problem, "touched rows", count)
                self.time(f"growth {axis}", runs, problem)

    def growth_in_tasks(self) -> None:
        """A step after more and more tasks, each with its own data and steps."""
        problem = Problem(R=2000) if self.quick else Problem()
        numbers = [1, 2] if self.quick else [1, 10, 50]
        runs: dict[str, Run] = {}
        for number in track(numbers, "growth in tasks"):
            trainer = make_trainer(problem, "ssd+ewc", self.device, past=number)
            runs[str(number)] = step_of(trainer, 0)
            rows = step_cases.important_rows(trainer)
            self.write("growth tasks", str(number), problem, "important rows", rows)
        runs[f"{step_targets.SAME_ROWS} {numbers[-1]}"] = step_cases.as_one_task(trainer)
        # In turns, so that a drift of the machine does not look like growth.
        self.time("growth tasks", runs, problem, seconds=4.0)

    def growth_in_learners(self) -> None:
        numbers = [1, 2] if self.quick else [1, 2, 5, 10]
        problem = Problem(R=2000) if self.quick else Problem()
        runs = {
            str(n): step_cases.repeated(make_trainer(problem, "ssd", self.device, seeds=n))
            for n in track(numbers, "growth in S")
        }
        self.time("growth S", runs, problem)


def curves(rows: Sequence[Row]) -> Curves:
    """{what grows: {part: {size: row}}}; a size that no shape has is the provider's name."""
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
    """Slope of log time over log size, least squares; empty for one point."""
    if len(points) < 2:
        return ""
    times = [row.p50 for row in points.values()]
    return f"{np.polyfit(np.log(list(points)), np.log(times), 1)[0]:.2f}"


def draw(grown: Curves, path: Path, title: str) -> None:
    """Medians with p20 to p80."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for ax, (size_name, parts) in zip(axes.flat, grown.items(), strict=True):
        for part, points in parts.items():
            p20, p50, p80 = np.array([(row.p20, row.p50, row.p80) for row in points.values()]).T
            slope = exponent(points)
            ax.errorbar(
                list(points),
                p50,
                yerr=(p50 - p20, p80 - p50),
                markersize=4,
                capsize=3,
                fmt="o-" if len(points) >= LINE else "o",
                label=f"{part}: {slope}" if slope else part,
            )
        sizes = sorted({size for points in parts.values() for size in points})
        ax.set(xscale="log", yscale="log", xlabel=size_name, ylabel="ms")
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        low, high = ax.get_ylim()
        room = max(high / low, 4)
        ax.set_ylim(low / room**0.2, high * room**0.5)  # the legend is above the points
        legend = ax.legend(loc="upper left", frameon=False, alignment="left", fontsize="small")
        legend.set_title("exponent of growth", {"size": "small"})
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(run: bench.Bench) -> None:
    """All times, how they grow, and the targets."""
    rows = run.writer.rows
    timed = [row for row in rows if row.unit == "ms" and not row.op.startswith("growth")]
    run.console.print(measurements(timed, "steps, epochs and protocols"))
    grown = []
    for axis, parts in curves(rows).items():
        for part, points in parts.items():
            times = ", ".join(f"{size:,}: {row.p50:.2f}" for size, row in points.items())
            grown.append((axis, part, times, exponent(points)))
    run.console.print(table("growth", ("axis", "part", "ms by size", "exponent"), grown))
    run.console.print(table("targets", ("target", "measured", ""), step_targets.verdicts(rows)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = bench.parser(__doc__, "small sizes, seconds")
    parser.add_argument("--previous", type=Path, metavar="CHECKOUT", help="of an earlier release")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument(
        "--protocol",
        type=float,
        metavar="SECONDS",
        help="for each whole protocol (default: 60 on CUDA, none on a CPU)",
    )
    options = parser.parse_args(arguments)
    before = nullcontext() if options.previous is None else Previous(options.previous)
    with bench.running("train_bench", options) as run, before as previous:
        measured = Steps(run, previous)
        measured.phases("step")
        measured.growth_in_learners()
        seconds = options.protocol
        if seconds is None:
            seconds = 60.0 if run.cuda else 0.0
        if seconds > 0:
            measured.protocol(seconds)
        measured.phases("epoch", samples=1500 if options.quick else 10_000)
        measured.growth()
        measured.growth_in_tasks()
        draw(curves(run.writer.rows), run.path.with_suffix(".png"), run.title)
        show(run)


if __name__ == "__main__":
    sys.exit(exit_status(main))
