"""The runs behind the tables: which there are, which exist, and training those that do not."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ssd import metrics
from ssd.checkpoint import write_atomically
from ssd.config import Config
from ssd.data import Dataset, load
from ssd.errors import UserError
from ssd.experiments import Row
from ssd.folder import SUMMARY, commit, read_json, versions
from ssd.jobs import job_folder, run_jobs
from ssd.run import RunOptions, device_name, make_tasks
from ssd.trainer import Event, Trainer

STEPS_PER_UPDATE = 10


@dataclass(frozen=True)
class Job:
    """One run of a row."""

    row: Row
    seed: int

    @property
    def config(self) -> Config:
        return replace(self.row.config, seed=self.seed)

    def __str__(self) -> str:
        row = self.row
        parts = [row.benchmark.name, row.method, f"R={row.neurons}" if row.neurons else "",
                 f"{row.factor}={row.value}" if row.value else "", f"seed {self.seed}"]  # fmt: skip
        return " ".join(part for part in parts if part)


class Campaign:
    """Runs of all rows, each in a folder named by its settings.

    Args:
        data: of each benchmark that has them, by name. absent: why the others have none.
        root: holds the folders of the runs. options: of every run.
    """

    def __init__(
        self,
        data: Mapping[str, Dataset],
        absent: Mapping[str, str],
        root: Path,
        options: RunOptions,
    ) -> None:
        self.data, self.absent, self.root, self.options = data, absent, root, options

    def refusal(self, row: Row) -> str:
        """Why a row cannot be run at all; empty if it can."""
        if row.benchmark.name in self.absent:
            return f"no data: {self.absent[row.benchmark.name]}"
        try:
            row.config.validate()
        except UserError as error:
            return f"refused: {error}"
        return ""

    def folder(self, job: Job) -> Path:
        """Where a run lies."""
        data, row = self.data[job.row.benchmark.name], job.row
        if row.peer is None:
            return job_folder(self.root, job.config, data)
        described = {
            "peer": row.method,
            "settings": dict(row.peer.settings),
            "tasks": row.config.tasks,
            "seed": job.seed,
            "data_crc32": data.checksum(),
        }
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
        name = "-".join("".join(c if c.isalnum() else " " for c in row.method).split())
        return self.root / f"{data.name}-{name}-seed{job.seed}-{digest}"

    def find(self, job: Job) -> dict[str, Any] | None:
        """The summary of a run that was trained to its end."""
        path = self.folder(job) / SUMMARY
        return read_json(path) if path.is_file() else None

    def train(
        self,
        job: Job,
        watch: Callable[[Trainer, Event], None],
        stopped: Callable[[], bool],
    ) -> dict[str, Any]:
        """Trains a run, from its checkpoint if it has one, and returns its summary.

        Raises:
            UserError, Interrupted, OSError: see ssd.run.run.
        """
        if job.row.peer is not None:
            return self._evaluate_peer(job)
        data = self.data[job.row.benchmark.name]
        return run_jobs([job.config], data, self.root, self.options, watch, stopped)[0]

    def _evaluate_peer(self, job: Job) -> dict[str, Any]:
        peer, data = job.row.peer, self.data[job.row.benchmark.name]
        assert peer is not None
        tasks = [task.to(self.options.device) for task in make_tasks(job.config, data)]
        start = time.perf_counter()
        accuracy = peer.evaluate(tasks, data.classes, job.seed, **peer.settings).cpu()
        summary = {
            "dataset": data.name,
            "method": job.row.method,
            "seed": job.seed,
            "evaluated_on": "test",
            "accuracy_matrix": accuracy.tolist(),
            "mean_accuracy": metrics.mean_accuracy(accuracy),
            "bwt": metrics.backward_transfer(accuracy),
            "forgetting": metrics.forgetting(accuracy),
            "seconds": time.perf_counter() - start,
            "device": device_name(self.options.device),
            "versions": versions(),
            "commit": commit(),
            "settings": dict(peer.settings),
        }
        folder = self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return summary

    def work(self, job: Job) -> float:
        """Size of a run for the time left: the encoder's multiplications."""
        data = self.data[job.row.benchmark.name]
        epochs = 1 if job.row.peer is not None else job.row.config.epochs
        return float(data.x_train.numel()) * epochs * max(1, job.row.neurons)


def load_benchmarks(
    rows: Sequence[Row], root: Path, features: Mapping[str, str]
) -> tuple[dict[str, Dataset], dict[str, str]]:
    """The data of the rows' benchmarks by name, and why others have none.

    Raises:
        UserError: none of them has data.
    """
    data: dict[str, Dataset] = {}
    absent: dict[str, str] = {}
    for benchmark, config in {row.benchmark: row.config for row in rows}.items():
        path = Path(features[benchmark.name]) if benchmark.features else None
        try:
            found = load(benchmark.dataset, root, path, strict=True)
            make_tasks(config, found)
            data[benchmark.name] = found
        except UserError as error:
            absent[benchmark.name] = str(error)
    if not data:
        raise UserError(f"no data: {'; '.join(absent.values())}")
    return data, absent


class CampaignDisplay:
    """How far all runs are: a bar on a terminal, else a line a finished run."""

    def __init__(self, console: Console, work: Mapping[Job, float]) -> None:
        self.console, self.work = console, work
        self.number = 0  # of the run in training
        self.done, self.total = 0.0, sum(work.values())
        self.start = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task("starting", total=self.total, left="")
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        """A run begins."""
        self.job, self.number = job, self.number + 1
        self._update(0.0, "")

    def watch(self, trainer: Trainer, event: Event) -> None:
        """Takes in an event of the run in training."""
        if event.kind == "step" and event.step % STEPS_PER_UPDATE:
            return
        config = trainer.config
        tasks = len(trainer.tasks)
        task, epoch = min(event.task + 1, tasks), min(event.epoch + 1, config.epochs)
        share = (trainer.task + trainer.epoch / config.epochs) / tasks
        self._update(share, f" task {task}/{tasks} epoch {epoch}/{config.epochs}")

    def end(self, job: Job, summary: Mapping[str, Any]) -> None:
        """A run has ended."""
        self.done += self.work[job]
        if not self.console.is_terminal:
            self.console.print(
                f"run {self.number} of {len(self.work)}: {job}: accuracy "
                f"{summary['mean_accuracy']:.4f} in {summary['seconds']:.0f} s; {self.left(0.0)}"
            )

    def left(self, share: float) -> str:
        """The time left, judged by the time taken, when a share of the run in training is done."""
        done = self.done + (self.work[self.job] * share if self.job else 0.0)
        if done <= 0:
            return "left -:--:--"
        seconds = round((time.perf_counter() - self.start) * (self.total - done) / done)
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _update(self, share: float, where: str) -> None:
        assert self.job is not None
        self.progress.update(
            self.bar,
            description=f"run {self.number} of {len(self.work)}: {self.job}{where}",
            completed=self.done + share * self.work[self.job],
            left=self.left(share),
        )
