"""Chooses each learner's settings on a validation split, then measures it on the test set."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, astuple, dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import Any, NamedTuple, get_type_hints

import torch
from rich.table import Table
from torch import Tensor

from ssd.data import Dataset, Task, class_order, hold_out, split
from ssd.errors import Interrupted, UserError
from ssd.executors import attempt, result_of
from ssd.metrics import backward_transfer, mean_accuracy
from ssd.peers.learners import (
    ALGORITHM,
    Entry,
    Learner,
    Settings,
    accuracies,
    entries,
    evaluate_stream,
)
from ssd.storage.dataset_file import read_dataset, stored
from ssd.storage.files import difference, dumps, read_text, write_atomically
from ssd.storage.link import alive, is_gone
from ssd.storage.provenance import commit, machine, versions
from ssd.tables import csv_text, plus_minus

# Settings are chosen on this share of the training data, with this seed, at this width at most.
VALIDATION, VALIDATION_SEED, VALIDATION_NEURONS = 0.1, 1000, 1000

Key = tuple[str, str, int, str, int]


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
    fit_seconds: float  # CPU time of fit_task over the stream
    test_seconds: float  # CPU time of one prediction of all test sets, after the last task
    state_mib: float  # of the learner's tensors, after the last task
    commit: str
    machine: str
    versions: str
    data_crc32: str
    algorithm: int

    @property
    def key(self) -> Key:
        """What was measured: split, learner, neurons, settings, seed."""
        return astuple(self)[1:6]


class Study:
    """Measures learners on one stream; a row that `out` holds already is not measured again.

    Args:
        name: of the data set, in the rows.
        data: a file of rows belongs to these very data.
        tasks: T.
        neurons: R.
        out: CSV file or None.
        report: takes a line about each new row.

    Raises:
        UserError: `out` is not a file of this study.
    """

    def __init__(
        self,
        name: str,
        data: Dataset,
        tasks: int,
        neurons: int,
        out: Path | None,
        report: Callable[[str], None],
    ) -> None:
        self.name, self.data, self.tasks, self.neurons = name, data, tasks, neurons
        self.out, self.report = out, report
        self.place: dict[str, Any] = {
            "commit": commit(),
            "machine": machine(),
            "versions": "; ".join(f"{name} {number}" for name, number in versions().items()),
        }
        self.shape = data.x_train.shape[1], data.classes
        self.validation = hold_out(data, VALIDATION)
        self.origin: dict[str, Any] = {
            "data_crc32": data.checksum(),
            "tasks": tasks,
            "algorithm": ALGORITHM,
        }
        self.rows = read_rows(out) if out is not None and out.exists() else {}
        for row in self.rows.values():
            if changed := difference(asdict(row), self.origin):
                raise UserError(f"--out {out} is of another study ({changed}); use another file")

    def choose(self, entry: Entry) -> Settings:
        """The settings with the best mean accuracy on the validation split; the first of equals."""
        neurons, seed = min(self.neurons, VALIDATION_NEURONS), VALIDATION_SEED
        tasks = split(self.validation, self.tasks, class_order(self.data.classes, seed))
        tried = []
        for early in entry.early:
            learner, fit = None, Stopwatch()
            for late in entry.late:
                key = "validation", entry.name, neurons, dumps(early | late), seed
                if key not in self.rows:
                    if learner is None:
                        learner = entry.make(*self.shape, neurons, seed, early)
                        for task in tasks:
                            fit.call(learner.fit_task, task.x_train, task.y_train)
                    for name, value in late.items():
                        setattr(learner, name, value)
                    scores, seconds = _tested(learner, tasks)
                    accuracy = mean(accuracies(scores, tasks).tolist())
                    self._add(key, accuracy, math.nan, _Cost(fit.seconds, seconds, learner))
                tried.append(self.rows[key])
        return json.loads(max(tried, key=lambda row: row.mean_accuracy).settings)

    def measure(self, entry: Entry, seeds: int) -> list[Row]:
        """The test accuracy with the settings chosen, for seeds 0, 1, .. (order and projection)."""
        settings, found = self.choose(entry), []
        for seed in range(seeds):
            key = "test", entry.name, self.neurons, dumps(settings), seed
            if key not in self.rows:
                learner, fit = entry.make(*self.shape, self.neurons, seed, settings), Stopwatch()
                tasks = split(self.data, self.tasks, class_order(self.data.classes, seed))
                matrix = evaluate_stream(learner, tasks, partial(fit.call, learner.fit_task))
                accuracy, bwt = mean_accuracy(matrix), backward_transfer(matrix)
                _, seconds = _tested(learner, tasks)
                self._add(key, accuracy, bwt, _Cost(fit.seconds, seconds, learner))
            found.append(self.rows[key])
        return found

    def measure_on(
        self, executor: Executor, found: Sequence[Entry], seeds: int, folder: Path
    ) -> dict[str, list[Row]]:
        """What `measure` returns for each learner by name, each measured by an executor's worker.

        Args:
            executor: see ssd.executors; its workers share the folder's file system.
            found: of ssd.peers.learners.entries.
            seeds: see measure.
            folder: holds a file of the data meanwhile.

        Raises:
            UserError: a worker died, or see measure. What others are at is lost.
        """
        with stored([self.data], folder) as files, alive(folder) as study:
            (file,) = files.values()
            place = file, study, self.name, self.tasks, self.neurons
            jobs = {
                executor.submit(attempt, _measure_elsewhere, *place, e.name, seeds, self.rows): e
                for e in found
            }
            try:
                for job in as_completed(jobs):
                    for row in result_of(job, jobs[job].name):
                        self._keep(row)
            finally:
                for job in jobs:
                    job.cancel()  # those that run end after their row, since the study is gone
        return {entry.name: self.measure(entry, seeds) for entry in found}

    def _add(self, key: Key, accuracy: float, bwt: float, cost: _Cost) -> None:
        row = Row(
            self.name,
            *key,
            mean_accuracy=round(accuracy, 5),
            bwt=round(bwt, 5),
            fit_seconds=round(cost.fit, 3),
            test_seconds=round(cost.test, 3),
            state_mib=round(state_bytes(cost.learner) / 2**20, 3),
            **(self.place | self.origin),
        )
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self.rows[row.key] = row
        run = f"{row.split} {row.learner} {row.settings} seed {row.seed}"
        self.report(f"{run}: {row.mean_accuracy:.4f}")
        if self.out is not None:
            write_atomically(self.out, csv_text([asdict(row) for row in self.rows.values()]))


def _measure_elsewhere(
    file: Path,
    study: Path,
    name: str,
    tasks: int,
    neurons: int,
    learner: str,
    seeds: int,
    known: Mapping[Key, Row],
) -> list[Row]:
    """Measures a learner in a worker; returns the rows that are not known yet."""

    def report(line: str) -> None:
        if is_gone(study):
            raise Interrupted

    data = read_dataset(file)
    own = Study(name, data, tasks, neurons, None, report)
    own.rows.update(known)
    found = {entry.name: entry for entry in entries(data.x_train.shape[1], neurons)}
    own.measure(found[learner], seeds)
    return [row for key, row in own.rows.items() if key not in known]


class Stopwatch:
    """CPU seconds that calls took, over all threads of the process."""

    seconds = 0.0

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns."""
        start = process_time()
        result = function(*arguments)
        self.seconds += process_time() - start
        return result


class _Cost(NamedTuple):
    fit: float  # seconds
    test: float  # seconds
    learner: Learner


def _tested(learner: Learner, tasks: Sequence[Task]) -> tuple[Tensor, float]:
    """The scores of all test sets, and their CPU seconds."""
    watch = Stopwatch()
    scores = watch.call(learner.predict, torch.cat([task.x_test for task in tasks]))
    return scores, watch.seconds


def state_bytes(part: object) -> int:
    """Bytes of the tensors that an object and its attributes hold."""
    if isinstance(part, Tensor):
        return part.nbytes
    return sum(map(state_bytes, vars(part).values())) if hasattr(part, "__dict__") else 0


def read_rows(path: Path) -> dict[Key, Row]:
    """What a Study wrote, each run once; UserError if the file is something else."""
    kinds = get_type_hints(Row)
    lines = csv.reader(StringIO(read_text(path)))
    rows: dict[Key, Row] = {}
    try:
        if next(lines, None) != list(kinds):
            raise ValueError(f"its columns are not {', '.join(kinds)}")
        for cells in filter(None, lines):
            row = Row(*(kind(cell) for kind, cell in zip(kinds.values(), cells, strict=True)))
            if row.key in rows:
                raise ValueError(f"line {lines.line_num} is of the same run as one before it")
            costs = row.fit_seconds, row.test_seconds, row.state_mib
            measured = 0 <= row.mean_accuracy <= 1 and all(0 <= cost < math.inf for cost in costs)
            if not measured or (row.split == "test" and not abs(row.bwt) <= 1):
                raise ValueError(f"line {lines.line_num} has figures that no run has")
            rows[row.key] = row
    except (ValueError, csv.Error) as error:
        raise UserError(f"--out {path} is not a table of peers ({error}); use another") from error
    return rows


def result_table(measured: Mapping[str, Sequence[Row]], title: str) -> Table:
    """Mean and standard deviation over the seeds; "behind" is paired with the best learner."""
    table = Table("learner: settings", title=title, caption="mean ± standard deviation over seeds")
    best = max(measured.values(), key=lambda rows: mean(row.mean_accuracy for row in rows))
    for heading in ("mean accuracy", "behind", "BWT", "fit s", "MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, rows in measured.items():
        settings = ", ".join(f"{k} {v}" for k, v in json.loads(rows[0].settings).items())
        table.add_row(
            f"{name}: {settings}" if settings else name,
            _deviating([row.mean_accuracy for row in rows]),
            _deviating(
                [b.mean_accuracy - r.mean_accuracy for b, r in zip(best, rows, strict=True)]
            ),
            _deviating([row.bwt for row in rows]),
            f"{mean(row.fit_seconds for row in rows):.1f}",
            f"{mean(row.state_mib for row in rows):.1f}",
        )
    return table


def _deviating(values: Sequence[float]) -> str:
    return plus_minus(mean(values), stdev(values) if len(values) > 1 else None, digits=3)
