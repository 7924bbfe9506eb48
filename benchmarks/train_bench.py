"""Measures the training step beside plain PyTorch, and how its parts grow with the problem.

    python benchmarks/train_bench.py [--quick] [--out FILE.csv]

Providers of a step: ours; plain (benchmarks/plain.py: dense eager autograd, a DataLoader, an
optimiser, the teacher at every step); compiled, the same under torch.compile; and the float32
product of x and W1 alone, the floor of every method that computes all scores in float32, as one
writes it and in the order that a CPU multiplies fastest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import record, step_cases, step_targets
from benchmarks.step_cases import EXCITED, SWITCHING, Problem, make_trainer, step_of
from benchmarks.timing import Run, alternate
from ssd.cli import ArgumentParser, exit_status

Shape = dict[str, int]
Grown = dict[str, dict[str, dict[int, float]]]


class Bench:
    """Times runs in turns and writes a row for each."""

    def __init__(self, writer: record.Writer, device: torch.device, quick: bool) -> None:
        self.writer, self.device, self.quick = writer, device, quick

    def measure(
        self, op: str, runs: dict[str, Run], shape: Shape, seconds: float = 1.5
    ) -> dict[str, float]:
        """Medians in milliseconds by provider, each timed for so long and at least five times."""
        for run in runs.values():
            run()  # compiles and fills caches
        times, errors = alternate(runs, 0.1 if self.quick else seconds, self.device)
        for name, error in errors.items():
            print(f"{op} {name}: {error}", file=sys.stderr)
        for name, t in times.items():
            self._write(op, name, shape, "time", t.p20, t.p50, t.p80, "ms")
        return {name: t.p50 for name, t in times.items()}

    def note(self, op: str, provider: str, shape: Shape, metric: str, value: float) -> None:
        """Something counted that the time goes with."""
        self._write(op, provider, shape, metric, value, value, value, "")

    def _write(
        self, op: str, provider: str, shape: Shape, metric: str, *figures: float | str
    ) -> None:
        p20, p50, p80, unit = figures
        self.writer.write(
            record.Row(
                op, provider, "step", "float32", shape, metric, p20, p50, p80, unit, None, True
            )
        )  # fmt: skip


def steps(bench: Bench) -> None:
    """After the GABA switch: ours, plain, compiled and the product alone; SSD beside SDMLP."""
    sizes = [2000] if bench.quick else [10_000, 100_000]
    for neurons in track(sizes, "steps"):
        problem = Problem(R=neurons)
        for method in ("ssd", "sdmlp"):
            trainer = make_trainer(problem, method, bench.device)
            runs = step_cases.step_runs(trainer, compiled=not bench.quick)
            runs |= step_cases.products(trainer)
            bench.measure(method, runs, problem.shape())
    problem = Problem(R=sizes[0])
    both = {method: make_trainer(problem, method, bench.device) for method in ("ssd", "sdmlp")}
    runs = {m: step_cases.step_runs(t, compiled=False)["ours"] for m, t in both.items()}
    bench.measure("ssd and sdmlp", runs, problem.shape(), seconds=4.0)


def switch(bench: Bench) -> None:
    """In the middle of the GABA switch, and before it, when every neuron is excited."""
    for neurons in track([1000] if bench.quick else [1000, 10_000], "GABA switch"):
        problem = Problem(R=neurons)
        for phase in (SWITCHING, EXCITED):
            trainer = make_trainer(problem, "ssd", bench.device, phase=phase)
            op, shape = f"ssd {phase}", problem.shape()
            bench.note(op, "ours", shape, "graded", step_cases.graded_share(trainer))
            bench.measure(op, step_cases.step_runs(trainer, compiled=False), shape)
            bench.note(op, "ours", shape, step_cases.path_of(trainer), 1.0)


def epochs(bench: Bench) -> None:
    samples = 1500 if bench.quick else 10_000
    for neurons in track([1000] if bench.quick else [1000, 10_000], "epochs"):
        problem = Problem(R=neurons, N=samples)
        trainer = make_trainer(problem, "ssd", bench.device)
        bench.measure("ssd epoch", step_cases.epoch_runs(trainer), problem.shape())


def growth(bench: Bench) -> Grown:
    """{axis: {part: {size: ms}}}; R reaches a million neurons."""
    sizes = {
        "R": [1000, 10_000, 100_000, 1_000_000],
        "B": [32, 128, 512],
        "k": [2, 10, 50],
        "d": [64, 256, 1024],
    }
    grown: Grown = {}
    for axis, values in sizes.items():
        for value in track(values[:2] if bench.quick else values, f"growth in {axis}"):
            problem = Problem(**{axis: value})
            runs, rows = step_cases.halves(make_trainer(problem, "ssd", bench.device))
            for part, count in rows.items():
                bench.note(f"growth {axis}", part, problem.shape(), "touched rows", count)
            for part, ms in bench.measure(f"growth {axis}", runs, problem.shape()).items():
                grown.setdefault(axis, {}).setdefault(part, {})[value] = ms
    return grown | {
        "tasks": {"step with EWC": growth_in_tasks(bench)},
        "S": {"step of S learners": growth_in_learners(bench)},
    }


def growth_in_tasks(bench: Bench) -> dict[int, float]:
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
    times = bench.measure("growth tasks", runs, problem.shape(), seconds=4.0)
    return {number: times[str(number)] for number in numbers}


def growth_in_learners(bench: Bench) -> dict[int, float]:
    numbers = [1, 2] if bench.quick else [1, 2, 5, 10]
    problem = Problem(R=2000) if bench.quick else Problem()
    runs = {
        str(n): step_cases.repeated(make_trainer(problem, "ssd", bench.device, seeds=n))
        for n in track(numbers, "growth in S")
    }
    times = bench.measure("growth S", runs, problem.shape())
    return {number: times[str(number)] for number in numbers}


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log size, least squares."""
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def draw(grown: Grown, path: Path, title: str) -> None:
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


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*row)
    return shown


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/<device>)")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, console = record.device_name(device), Console()
    path = options.out or record.results_folder(device) / "train_bench.csv"
    title = f"{name}; torch {torch.__version__}"
    console.print(title if device.type == "cuda" else f"CPU FIGURES, no GPU was used: {title}")
    with record.Writer(path, name) as writer:
        bench = Bench(writer, device, options.quick)
        steps(bench)
        switch(bench)
        epochs(bench)
        grown = growth(bench)
    draw(grown, path.with_suffix(".png"), title)
    measured = [
        (f"{row.op}, R = {row.shape['R']:,}", row.provider, f"{row.p50:.2f}")
        for row in writer.rows
        if row.metric == "time" and not row.op.startswith("growth")
    ]
    console.print(table("steps and epochs", ("problem", "provider", "median ms"), measured))
    curves = [
        (axis, part, ", ".join(f"{size:,}: {ms:.2f}" for size, ms in times.items()),
         f"{exponent(times):.2f}")
        for axis, by_part in grown.items()
        for part, times in by_part.items()
    ]  # fmt: skip
    console.print(table("growth", ("axis", "part", "ms by size", "exponent"), curves))
    console.print(table("targets", ("target", "measured", ""), step_targets.verdicts(writer.rows)))
    console.print(f"rows: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
