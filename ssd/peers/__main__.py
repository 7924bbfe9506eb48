"""python -m ssd.peers: learners without gradients that see each task once, in order.

No replay and no task labels. A learner has two methods, see Learner; scores of classes that it has
not seen are -inf. Sums are taken in float64, so the order of the samples of a task does not matter
beyond its rounding.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ssd.cli import ArgumentParser, check_file, command_line, exit_status, in_words, note, resumable
from ssd.data import Dataset, class_order, default_root, hold_out, load, split
from ssd.errors import MOST_RUNS, UserError, require_memory
from ssd.metrics import backward_transfer, mean_accuracy, predicted
from ssd.peers.learners import ALGORITHM, Entry, Learner, Settings, _dtype, entries, evaluate_stream
from ssd.storage.files import difference, dumps, read_text, write_atomically
from ssd.storage.lock import file_lock
from ssd.storage.provenance import commit, doubts

# Settings are chosen on this share of the training data, with this seed, at this width at most.
VALIDATION, VALIDATION_SEED, VALIDATION_NEURONS = 0.1, 1000, 1000


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    dataset: str
    split: str  # validation or test
    learner: str
    neurons: int
    settings: str  # JSON
    seed: int
    tasks: int
    mean_accuracy: float
    bwt: float
    seconds: float
    commit: str
    data_crc32: str
    algorithm: int


def _require_fit(data: Dataset, neurons: int) -> None:
    """UserError where the Gram matrix of the hidden layer and its weights cannot fit."""
    width = data.x_train.shape[1] + data.classes
    needed = neurons * (_dtype(neurons).itemsize * neurons + 4 * width)
    require_memory(needed, f"--neurons {neurons}", torch.device("cpu"))


class Study:
    """Chooses each learner's settings on a validation split, then measures it on the test set.

    Rows that `out` holds already are not measured again: it belongs to these very data.

    Args:
        name: of the data set. tasks: T. out: CSV file or None. console: where progress goes.

    Raises:
        UserError: `out` is not a file of this study.
    """

    def __init__(
        self, name: str, data: Dataset, tasks: int, out: Path | None, console: Console
    ) -> None:
        self.name, self.data, self.tasks, self.out, self.console = name, data, tasks, out, console
        self.rows = read_rows(out) if out is not None and out.exists() else []
        self.key: dict[str, Any] = {
            "data_crc32": data.checksum(), "tasks": tasks, "algorithm": ALGORITHM
        }  # fmt: skip
        for row in self.rows:
            if changed := difference(asdict(row), self.key):
                raise UserError(f"--out {out} is of another study ({changed}); use another file")
        self.commit = commit()
        self.validation = hold_out(data, VALIDATION)

    def choose(self, entry: Entry, neurons: int) -> Settings:
        """The settings with the best mean accuracy on the validation split."""
        neurons = min(neurons, VALIDATION_NEURONS)
        stream = split(self.validation, self.tasks, class_order(self.data.classes, VALIDATION_SEED))
        joint = [(s.x_test, s.y_test) for s in stream]
        for early in entry.early:
            wanted = [late for late in entry.late
                      if not self._known("validation", entry, neurons, early | late)]  # fmt: skip
            if not wanted:
                continue
            start = perf_counter()
            learner = self._build(entry, neurons, VALIDATION_SEED, early)
            for task in stream:
                learner.fit_task(task.x_train, task.y_train)
            for late in wanted:
                _set(learner, late)
                labels = predicted(learner.predict(torch.cat([x for x, _ in joint])))
                right = (labels == torch.cat([y for _, y in joint])).double()
                parts = right.split([len(y) for _, y in joint])
                accuracy = mean(part.mean().item() for part in parts)
                self._add("validation", entry, neurons, early | late, VALIDATION_SEED,
                          accuracy, math.nan, perf_counter() - start)  # fmt: skip
        # In the order of the grid, not of the file, where interruptions may have left another.
        tried = [row for early in entry.early for late in entry.late
                 for row in self._known("validation", entry, neurons, early | late)]  # fmt: skip
        return json.loads(max(tried, key=lambda row: row.mean_accuracy).settings)

    def measure(self, entry: Entry, neurons: int, seeds: int) -> list[Row]:
        """The test accuracy with the settings chosen, for seeds 0, 1, .. (order and projection)."""
        settings = self.choose(entry, neurons)
        early = {k: v for k, v in settings.items() if any(k in e for e in entry.early)}
        late = {k: v for k, v in settings.items() if k not in early}
        for seed in range(seeds):
            if self._known("test", entry, neurons, settings, seed):
                continue
            start = perf_counter()
            learner = self._build(entry, neurons, seed, early)
            _set(learner, late)
            stream = split(self.data, self.tasks, class_order(self.data.classes, seed))
            accuracy = evaluate_stream(learner, stream)
            self._add("test", entry, neurons, settings, seed, mean_accuracy(accuracy),
                      backward_transfer(accuracy), perf_counter() - start)  # fmt: skip
        return [row for seed in range(seeds)
                for row in self._known("test", entry, neurons, settings, seed)]  # fmt: skip

    def _build(self, entry: Entry, neurons: int, seed: int, early: Settings) -> Learner:
        generator = torch.Generator().manual_seed(seed)
        features = self.data.x_train.shape[1]
        return entry.build(features, self.data.classes, neurons, generator, **early)

    def _known(
        self, part: str, entry: Entry, neurons: int, settings: Settings, seed: int | None = None
    ) -> list[Row]:
        key = part, entry.name, neurons, dumps(settings)
        return [row for row in self.rows
                if (row.split, row.learner, row.neurons, row.settings) == key
                and seed in (None, row.seed)]  # fmt: skip

    def _add(
        self, part: str, entry: Entry, neurons: int, settings: Settings, seed: int,
        accuracy: float, bwt: float, seconds: float,
    ) -> None:  # fmt: skip
        text = dumps(settings)
        row = Row(self.name, part, entry.name, neurons, text, seed,
                  mean_accuracy=round(accuracy, 5), bwt=round(bwt, 5), seconds=round(seconds, 2),
                  commit=self.commit, **self.key)  # fmt: skip
        self.rows.append(row)
        line = f"{part} {entry.name} {text} seed {seed}: {accuracy:.4f}"
        self.console.print(line, soft_wrap=True, highlight=False)
        if self.out is not None:
            write_atomically(self.out, format_rows(self.rows))


def _set(learner: Learner, late: Settings) -> None:
    for name, value in late.items():
        setattr(learner, name, value)


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as CSV."""
    text = StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[Row]:
    """What format_rows wrote; UserError if the file is something else."""
    whole = ("neurons", "seed", "tasks", "algorithm")
    kinds: dict[str, Callable[[str], Any]] = dict.fromkeys(whole, int)
    kinds |= dict.fromkeys(("mean_accuracy", "bwt", "seconds"), float)
    lines = csv.DictReader(StringIO(read_text(path)))
    columns = [field.name for field in fields(Row)]
    try:
        if list(lines.fieldnames or ()) != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
        rows, seen = [], set[tuple[Any, ...]]()
        for line in lines:
            row = Row(**{name: kinds.get(name, str)(text) for name, text in line.items()})
            key = row.split, row.learner, row.neurons, row.settings, row.seed
            if key in seen:
                raise ValueError(f"line {lines.line_num} is of the same run as one before it")
            measured = 0 <= row.mean_accuracy <= 1 and 0 <= row.seconds < math.inf
            if not measured or (row.split == "test" and not abs(row.bwt) <= 1):
                raise ValueError(f"line {lines.line_num} has figures that no run has")
            rows.append(row)
            seen.add(key)
        return rows
    except (TypeError, ValueError, csv.Error) as error:
        raise UserError(f"--out {path} is not a table of peers ({error}); use another") from error


def result_table(measured: dict[str, list[Row]], title: str) -> Table:
    """Mean and standard deviation over the seeds."""
    table = Table("learner", title=title, caption="mean ± standard deviation over seeds")
    for heading in ("mean accuracy", "BWT", "seconds", "settings"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    for name, rows in measured.items():
        table.add_row(
            name,
            spread([row.mean_accuracy for row in rows]),
            spread([row.bwt for row in rows]),
            f"{mean(row.seconds for row in rows):.1f}",
            ", ".join(f"{k} {v}" for k, v in json.loads(rows[0].settings).items()),
        )
    return table


def spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation."""
    text = f"{mean(numbers):.3f}"
    return f"{text} ± {stdev(numbers):.3f}" if len(numbers) > 1 else text


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.peers",
        description="Measure learners that need no gradients; settings are chosen on a "
        "validation split of the training data.",
    )
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="mnist, fashion-mnist, mnist-5k, .. (default mnist)")
    add("--features", metavar="FILE", type=Path, help=".npz or .pt in place of a data set")
    add("--data-root", metavar="DIR", type=Path, help="data sets (default $SSD_DATA or data)")
    add("--tasks", metavar="N", type=int, default=5, help="number of tasks (default 5)")
    add("--neurons", metavar="R", type=int, default=1000, help="width (default 1000)")
    add("--seeds", metavar="N", type=int, default=3, help="class orders and projections (3)")
    add("--out", metavar="FILE", type=Path, help="CSV; rows that it holds are not measured again")
    return parser


def execute(arguments: Sequence[str]) -> None:
    """Checks, loads and measures; nothing is written before all checks are done."""
    given = _parser().parse_args(arguments)
    if given.neurons < 10:
        raise UserError(f"--neurons {given.neurons} must be at least 10")
    if not 1 <= given.seeds <= MOST_RUNS:
        raise UserError(f"--seeds {given.seeds} must be in 1..{MOST_RUNS}")
    out, dataset = given.out, given.dataset or ("features" if given.features else "mnist")
    if out is not None:
        check_file(out)
    again = f"go on with: {command_line('ssd.peers', arguments)}"
    again = "without --out FILE nothing is kept" if out is None else again
    with resumable(again), in_words({"--validation": "the validation share"}):
        data = load(dataset, given.data_root or default_root(), given.features, notice=note)
        split(data, given.tasks, class_order(data.classes, 0))
        _require_fit(data, given.neurons)
        name = given.features.stem if given.features else data.name
        progress = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        if out is not None and out.exists():
            Study(name, data, given.tasks, out, progress)  # what is of another is not touched
        with nullcontext() if out is None else file_lock(out):
            study = Study(name, data, given.tasks, out, progress)
            measured = {
                entry.name: study.measure(entry, given.neurons, given.seeds)
                for entry in entries(data.x_train.shape[1], given.neurons)
            }
    commits = {row.commit for rows in measured.values() for row in rows}
    if len(commits) > 1:
        note(f"the table shows {doubts(commits)}")
    title = f"{name}, {given.tasks} tasks, R = {given.neurons:,}, {given.seeds} seeds"
    Console().print(result_table(measured, title))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the peers; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
