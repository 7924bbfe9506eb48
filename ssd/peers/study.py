"""Chooses each learner's settings on a validation split, then measures it on the test set."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any, get_type_hints

import torch
from rich.table import Table

from ssd.data import Dataset, Task, class_order, hold_out, split
from ssd.errors import UserError
from ssd.metrics import backward_transfer, mean_accuracy
from ssd.peers.learners import ALGORITHM, Entry, Learner, Settings, accuracies, evaluate_stream
from ssd.storage.files import difference, dumps, read_text, write_atomically
from ssd.storage.provenance import commit
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
    seconds: float
    commit: str
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
        self.out, self.report, self.commit = out, report, commit()
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
            start, learner = perf_counter(), None
            for late in entry.late:
                key = "validation", entry.name, neurons, dumps(early | late), seed
                if key not in self.rows:
                    learner = learner or _fitted(
                        entry.make(*self.shape, neurons, seed, early), tasks
                    )
                    for name, value in late.items():
                        setattr(learner, name, value)
                    scores = learner.predict(torch.cat([task.x_test for task in tasks]))
                    accuracy = mean(accuracies(scores, tasks).tolist())
                    self._add(key, accuracy, math.nan, perf_counter() - start)
                tried.append(self.rows[key])
        return json.loads(max(tried, key=lambda row: row.mean_accuracy).settings)

    def measure(self, entry: Entry, seeds: int) -> list[Row]:
        """The test accuracy with the settings chosen, for seeds 0, 1, .. (order and projection)."""
        settings, found = self.choose(entry), []
        for seed in range(seeds):
            key = "test", entry.name, self.neurons, dumps(settings), seed
            if key not in self.rows:
                start = perf_counter()
                learner = entry.make(*self.shape, self.neurons, seed, settings)
                tasks = split(self.data, self.tasks, class_order(self.data.classes, seed))
                matrix = evaluate_stream(learner, tasks)
                accuracy, bwt = mean_accuracy(matrix), backward_transfer(matrix)
                self._add(key, accuracy, bwt, perf_counter() - start)
            found.append(self.rows[key])
        return found

    def _add(self, key: Key, accuracy: float, bwt: float, seconds: float) -> None:
        self.rows[key] = Row(
            self.name,
            *key,
            mean_accuracy=round(accuracy, 5),
            bwt=round(bwt, 5),
            seconds=round(seconds, 2),
            commit=self.commit,
            **self.origin,
        )
        part, learner, _, settings, seed = key
        self.report(f"{part} {learner} {settings} seed {seed}: {accuracy:.4f}")
        if self.out is not None:
            write_atomically(self.out, csv_text([asdict(row) for row in self.rows.values()]))


def _fitted(learner: Learner, tasks: Sequence[Task]) -> Learner:
    for task in tasks:
        learner.fit_task(task.x_train, task.y_train)
    return learner


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
            measured = 0 <= row.mean_accuracy <= 1 and 0 <= row.seconds < math.inf
            if not measured or (row.split == "test" and not abs(row.bwt) <= 1):
                raise ValueError(f"line {lines.line_num} has figures that no run has")
            rows[row.key] = row
    except (ValueError, csv.Error) as error:
        raise UserError(f"--out {path} is not a table of peers ({error}); use another") from error
    return rows


def result_table(measured: Mapping[str, Sequence[Row]], title: str) -> Table:
    """Mean and standard deviation over the seeds."""
    table = Table("learner", title=title, caption="mean ± standard deviation over seeds")
    for heading in ("mean accuracy", "BWT", "seconds", "settings"):
        table.add_column(heading, justify="left" if heading == "settings" else "right")
    for name, rows in measured.items():
        table.add_row(
            name,
            _deviating([row.mean_accuracy for row in rows]),
            _deviating([row.bwt for row in rows]),
            f"{mean(row.seconds for row in rows):.1f}",
            ", ".join(f"{k} {v}" for k, v in json.loads(rows[0].settings).items()),
        )
    return table


def _deviating(values: Sequence[float]) -> str:
    return plus_minus(mean(values), stdev(values) if len(values) > 1 else None, digits=3)
