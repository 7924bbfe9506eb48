"""The runs behind the tables: which there are, which exist, and training those that do not."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd import metrics
from ssd.config import Config
from ssd.data import Dataset, load
from ssd.distillation import select_subnetwork
from ssd.errors import Diverged, UserError
from ssd.peers import learners as peers
from ssd.reproduce.experiments import Row
from ssd.run import RunOptions, make_tasks
from ssd.storage.files import dumps, write_atomically
from ssd.storage.provenance import commit, device_name, versions
from ssd.storage.run_folder import (
    DIVERGED,
    FREQUENCY,
    SUMMARY,
    describe,
    identity,
    read_frequency,
    read_summary,
    write_diverged,
)
from ssd.study import MOST, Batch, job_folder, run_jobs
from ssd.trainer import Event, Trainer, together


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
            "neurons": row.neurons,
            "settings": row.settings,
            "tasks": row.config.tasks,
            "seed": job.seed,
            "data_crc32": data.checksum(),
            "algorithm": peers.ALGORITHM,
        }
        if row.peer.method:
            described["config"] = identity(describe(job.config, data))
        digest = hashlib.sha256(dumps(described, sort_keys=True).encode()).hexdigest()[:10]
        name = "-".join("".join(c if c.isalnum() else " " for c in row.method).split())
        return self.root / f"{data.name}-{name}-seed{job.seed}-{digest}"

    def find(self, job: Job) -> dict[str, Any] | None:
        """The summary of a run that was trained to its end, with the structure of its code."""
        folder = self.folder(job)
        if not (folder / SUMMARY).is_file():
            return None
        summary = read_summary(folder, trained=job.row.peer is None)
        if "structure" not in summary and (folder / FREQUENCY).is_file():
            frequency = torch.from_numpy(read_frequency(folder, job.config))
            size = max(1, round(job.config.subnetwork * job.config.k))
            summary["structure"] = overlaps(frequency, size)
        return summary

    def diverged(self, job: Job) -> bool:
        """Whether a run ended without a summary, because its numbers were not finite."""
        return (self.folder(job) / DIVERGED).is_file()

    def train(
        self,
        jobs: Sequence[Job],
        watch: Callable[[Trainer, Event], None],
        stopped: Callable[[], bool],
    ) -> None:
        """Trains the runs of a batch, from their checkpoint if they have one.

        Raises:
            UserError, Interrupted, OSError: see ssd.run.run.
        """
        if jobs[0].row.peer is not None:
            for job in jobs:
                self._evaluate_peer(job)
            return
        data, configs = self.data[jobs[0].row.benchmark.name], [job.config for job in jobs]
        run_jobs(configs, data, self.root, self.options, watch, stopped)

    def batch(self, jobs: Sequence[Job]) -> Batch:
        """Runs that are no peer's, for a worker of another process."""
        data = self.data[jobs[0].row.benchmark.name]
        return Batch([job.config for job in jobs], data, self.root, self.options)

    def _evaluate_peer(self, job: Job) -> None:
        row, data = job.row, self.data[job.row.benchmark.name]
        assert row.peer is not None
        tasks = [task.to(self.options.device) for task in make_tasks(job.config, data)]
        start, folder = time.perf_counter(), self.folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            matrix = row.peer.evaluate(tasks, data.classes, row.neurons, job.config, **row.settings)
        except Diverged as error:
            write_diverged(folder, str(error))
            return
        accuracy = matrix.cpu()
        summary = {
            "dataset": data.name,
            "method": row.method,
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
            "neurons": row.neurons,
            "settings": row.settings,
        }
        write_atomically(folder / SUMMARY, dumps(summary, indent=2) + "\n")

    def weights(self, job: Job) -> int:
        """Weights of the encoder of a run."""
        return self.data[job.row.benchmark.name].x_train.shape[1] * job.row.neurons

    def work(self, job: Job) -> float:
        """Size of a run for the time left: the encoder's multiplications."""
        data = self.data[job.row.benchmark.name]
        peer = job.row.peer
        epochs = 1 if peer is not None and not peer.method else job.row.config.epochs
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
    most_tasks = sorted(rows, key=lambda row: row.config.tasks)
    for benchmark, config in {row.benchmark: row.config for row in most_tasks}.items():
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


def overlaps(frequency: Tensor, size: int) -> dict[str, list[float | None]]:
    """How each task's code differs from that of the task before; None for the first task.

    Args:
        frequency: [T, R] activation frequency. size: n, neurons of the subnetwork.

    Returns:
        jaccard of the subnetworks and kl_bits of the frequencies, as in ssd.structure.compare.
    """
    chosen = [select_subnetwork(row, size) for row in frequency]
    return {
        "jaccard": [None, *(metrics.jaccard(now, was) for was, now in pairwise(chosen))],
        "kl_bits": [None, *(metrics.kl_divergence(now, was) for was, now in pairwise(frequency))],
    }


def batches(jobs: Sequence[Job], most: int = MOST) -> list[list[Job]]:
    """The jobs in groups of at most so many that are trained side by side; peers one by one."""
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        alone = job if job.row.peer is not None else None
        groups.setdefault((job.row.benchmark, alone, together(job.config)), []).append(job)
    return [
        group[first : first + most]
        for group in groups.values()
        for first in range(0, len(group), most)
    ]
