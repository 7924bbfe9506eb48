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
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from ssd.checkpoint import read_text, write_atomically
from ssd.cli import (
    ArgumentParser,
    check_file,
    command_line,
    exit_status,
    in_words,
    note,
    resumable,
)
from ssd.data import Dataset, Task, class_order, default_root, hold_out, load, split
from ssd.errors import UserError
from ssd.folder import commit, difference, doubts
from ssd.lock import file_lock
from ssd.memory import MOST_RUNS, require_memory
from ssd.metrics import backward_transfer, mean_accuracy, predicted
from ssd.readout import (
    CodeReadout,
    RandomCode,
    discriminant,
    gaussian_addresses,
    local_addresses,
    only_seen,
    ridge_solution,
)
from ssd.strict_json import dumps
from ssd_kernels import TopKOutput, sparse_linear, topk
from ssd_kernels._checks import in_range
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.reference import power_of_two

# Raise it when a change moves the numbers of peers: those of another are not shown.
ALGORITHM = 1

# Samples whose hidden layer is held at a time.
CHUNK = 4096


class Learner(Protocol):
    """A class-incremental learner."""

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Learns a task's training data x [N, d] with labels y [N] int64 in 0..C-1, once."""

    def predict(self, x: Tensor) -> Tensor:
        """Scores [N, C] of x [N, d]; the label is that of the largest."""


@runtime_checkable
class CodedLearner(Learner, Protocol):
    """A learner whose scores are read from a code of the input."""

    @property
    def fixed(self) -> bool:
        """Whether the code of an input stays what it is after the first task."""

    def encode(self, x: Tensor) -> list[TopKOutput]:
        """Codes of x [N, d], part by part."""

    def read(self, codes: Sequence[TopKOutput]) -> Tensor:
        """predict(x), from what encode(x) returned."""


def evaluate_stream(learner: Learner, tasks: Sequence[Task]) -> Tensor:
    """Trains on each task in turn; the accuracy matrix [T, T] float64 on the test sets.

    Row t is what the learner knows after task t; classes that no task has shown yet score 0.

    Raises:
        Diverged: a score is not finite.
    """
    accuracy = torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device="cpu")
    codes: list[TopKOutput] = []
    for t, task in enumerate(tasks):
        learner.fit_task(task.x_train, task.y_train)
        seen = tasks[: t + 1]
        if isinstance(learner, CodedLearner) and learner.fixed:
            codes += learner.encode(task.x_test)
            scores = learner.read(codes)
        else:
            scores = learner.predict(torch.cat([s.x_test for s in seen]))
        labels = predicted(scores)
        right = labels == torch.cat([s.y_test for s in seen])
        parts = right.double().split([len(s.y_test) for s in seen])
        accuracy[t, : t + 1] = torch.stack([part.mean() for part in parts]).cpu()
    return accuracy


class _AnyScale:
    """Takes inputs in units of the first ones' largest entry: then no square leaves the range.

    The unit is a power of two, so nothing is rounded.
    """

    _unit: float | None = None
    counts: Tensor  # [C] samples of each class

    def _require_labels(self, y: Tensor) -> None:
        """ValueError for a label outside 0..C-1; looked for on a CPU."""
        in_range(type(self).__name__, "labels", y, len(self.counts))

    def _in_units(self, x: Tensor) -> Tensor:
        if self._unit is None:
            self._unit = power_of_two(x.abs().amax()).item()
        return x / self._unit


class NearestClassMean(_AnyScale):
    """The class whose mean of the training data is nearest.

    Args:
        features: d. classes: C.
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        self.sums.index_add_(0, y, self._in_units(x).double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        means = self.sums / self.counts.clamp(min=1).unsqueeze(1)
        # The squared length of x is the same for every class.
        scores = 2 * self._in_units(x).double() @ means.T - means.square().sum(1)
        return only_seen(scores, self.counts)


class StreamingLDA(_AnyScale):
    """Linear discriminant analysis with one covariance for all classes, equal priors.

    The covariance within classes comes from running sums of x, x x^T and counts alone; shrunk to
    (1 - s) S + s (tr S / d) I, as in Hayes & Kanan (2020) and scikit-learn.

    Args:
        features: d. classes: C. shrinkage: s in 0..1.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        shrinkage: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shrinkage = shrinkage
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        wide = self._in_units(x).double()
        self.gram.addmm_(wide.T, wide)
        self.cross.index_add_(1, y, wide.T)
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight, bias = discriminant(self.gram, self.cross, self.counts, self.shrinkage)
        return only_seen(self._in_units(x).double() @ weight + bias, self.counts)


class FlyModel(_AnyScale):
    """Sparse binary random projection, its largest responses, one Hebbian pass.

    The input is centred per sample; the k largest responses, scaled to 0..1 by the largest, are
    added to the weights of the label, which stop at 1 (Shen, Dasgupta & Navlakha 2023; the
    variant compared in Bricken et al. 2023).

    Args:
        features: d. classes: C. neurons: R.
        share: k / R. connections: inputs a neuron sums, over d. lr: learning rate.
        generator: source of the projection.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        share: float = 0.05,
        connections: float = 0.1,
        lr: float = 0.005,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.k, self.lr = max(1, round(share * neurons)), lr
        picked = torch.rand(neurons, features, generator=generator, device="cpu").argsort(1)
        inputs = picked[:, : max(1, round(connections * features))]
        projection = torch.zeros(neurons, features, device="cpu").scatter_(1, inputs, 1.0)
        self.projection = projection.to(device)
        self.weight = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._in_units(x).float()
        centred = x - x.mean(1, keepdim=True)
        values, indices, *_ = topk(centred @ self.projection.T, self.k)
        values = values.relu()
        largest = values[:, :1]
        return values / torch.where(largest > 0, largest, 1.0), indices

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        neurons, classes = self.weight.shape
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            values, indices = self._code(part)
            targets = F.one_hot(labels, classes).double()
            self.weight += self.lr * row_gradient(values.double(), targets, indices, neurons)
        # Steps only ever add, so clipping once at the end is clipping after each.
        self.weight.clamp_(max=1.0)
        self.counts += y.bincount(minlength=classes)

    def predict(self, x: Tensor) -> Tensor:
        scores = [
            sparse_linear(values.double(), indices, self.weight)
            for values, indices in map(self._code, x.split(CHUNK))
        ]
        return only_seen(torch.cat(scores), self.counts)


class RandomReLU(_AnyScale):
    """relu(x P^T) with a Gaussian P, and ridge regression on the one-hot labels.

    Updated task by task through the Gram matrix, which gives what recursive least squares gives.

    Args:
        features: d. classes: C. neurons: R.
        ridge: in units of the Gram matrix's mean diagonal entry.
        dtype: of the Gram matrix; its solution is float64.
        generator: source of P.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        neurons: int,
        ridge: float = 1e-4,
        dtype: torch.dtype = torch.float64,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.ridge = ridge
        self.projection = gaussian_addresses(neurons, features, generator).to(device)
        self.gram = torch.zeros(neurons, neurons, dtype=dtype, device=device)
        self.cross = torch.zeros(neurons, classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def _hidden(self, x: Tensor) -> Tensor:
        return (self._in_units(x).float() @ self.projection.T).relu()

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        self._require_labels(y)
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            hidden = self._hidden(part).to(self.gram.dtype)
            self.gram.addmm_(hidden.T, hidden)
            self.cross.index_add_(1, labels, hidden.T.double())
        self.counts += y.bincount(minlength=len(self.counts))

    def predict(self, x: Tensor) -> Tensor:
        weight = ridge_solution(self.gram, self.cross, self.ridge).float()
        scores = [self._hidden(part) @ weight for part in x.split(CHUNK)]
        return only_seen(torch.cat(scores), self.counts)


# Settings are chosen on this share of the training data, with this seed, at this width at most.
VALIDATION, VALIDATION_SEED, VALIDATION_NEURONS = 0.1, 1000, 1000
# A wider Gram matrix is kept in float32: 10,000 neurons take 400 MB.
WIDE = 4096

Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A learner of the table, and what is tried for it.

    build(d, C, R, generator, **settings); early settings are given to build, late ones are
    attributes that matter to predict alone, so all of them are tried on one fit.
    """

    name: str
    build: Callable[..., Learner]
    early: Sequence[Settings] = ({},)
    late: Sequence[Settings] = ({},)


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


def entries(features: int, neurons: int) -> list[Entry]:
    """The learners compared on d inputs with R neurons, all of a width where they have one."""
    strengths = (1e-4, 1e-3, 1e-2, 1e-1)
    shares = (0.1, 0.2, 0.3, 0.4)
    late = [{"readout": r, "strength": s} for r in ("lda", "ridge") for s in strengths[:3]]
    codes = [{"share": s, "power": p} for p in (1.0, 0.5) for s in shares]
    found = [
        Entry("nearest class mean", lambda d, c, r, g: NearestClassMean(d, c)),
        Entry(
            "streaming LDA",
            lambda d, c, r, g: StreamingLDA(d, c),
            late=[{"shrinkage": s} for s in strengths],
        ),
        Entry(
            "FlyModel",
            lambda d, c, r, g, **s: FlyModel(d, c, r, generator=g, **s),
            [{"share": s, "lr": lr} for s in (0.01, 0.05, 0.1) for lr in (1e-4, 1e-3, 5e-3, 2e-2)],
        ),
        Entry(
            "random ReLU + ridge",
            lambda d, c, r, g: RandomReLU(d, c, r, dtype=_dtype(r), generator=g),
            late=[{"ridge": s} for s in (1e-5, *strengths)],
        ),
        Entry("sparse code, Gaussian addresses", _gaussian_readout, codes, late),
    ]
    side = math.isqrt(features)
    if side * side == features and features >= 784:  # a square image, not 256 features
        local = [{"share": s, "width": w} for w in (3.0, 6.0) for s in shares]
        found.append(Entry("sparse code, local addresses", _local_readout, local, late))
    if neurons >= 2 * features:
        beside = [{"share": s, "power": p} for p in (1.0, 0.5) for s in (0.1, 0.2, 0.4)]
        found.append(Entry("sparse code beside the input", _beside_readout, beside, late[:3]))
        # What the same readout makes of units that are not sparse: share 1 is a plain ReLU.
        dense = [{"share": 1.0, "power": p} for p in (1.0, 0.5)]
        found.append(Entry("control: ReLU beside the input", _beside_readout, dense, late[:3]))
    return found


def _dtype(neurons: int) -> torch.dtype:
    return torch.float32 if neurons > WIDE else torch.float64


def _require_fit(data: Dataset, neurons: int) -> None:
    """UserError where the Gram matrix of the hidden layer and its weights cannot fit."""
    width = data.x_train.shape[1] + data.classes
    needed = neurons * (_dtype(neurons).itemsize * neurons + 4 * width)
    require_memory(needed, f"--neurons {neurons}", torch.device("cpu"))


def _gaussian_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, power: float
) -> Learner:
    addresses = gaussian_addresses(neurons, d, generator)
    code = RandomCode(addresses, max(1, round(share * neurons)), power)
    return CodeReadout(code, classes, dtype=_dtype(neurons))


def _beside_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, power: float
) -> Learner:
    addresses = gaussian_addresses(neurons - d, d, generator)
    code = RandomCode(addresses, max(1, round(share * len(addresses))), power, beside=True)
    return CodeReadout(code, classes, dtype=_dtype(neurons))


def _local_readout(
    d: int, classes: int, neurons: int, generator: torch.Generator, share: float, width: float
) -> Learner:
    addresses = local_addresses(neurons, math.isqrt(d), generator, width)
    code = RandomCode(addresses, max(1, round(share * neurons)))
    return CodeReadout(code, classes, dtype=_dtype(neurons))


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
