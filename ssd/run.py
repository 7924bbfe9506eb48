"""One run in its folder: trained, logged, checkpointed, summarised; resumable."""

from __future__ import annotations

import io
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd import metrics
from ssd.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from ssd.config import Config
from ssd.data import Dataset, Task, class_order, hold_out, split
from ssd.errors import UserError
from ssd.folder import (
    CHECKPOINT,
    FREQUENCY,
    MATRIX,
    METRICS,
    SUMMARY,
    claim,
    commit,
    describe,
    difference,
    read_json,
    versions,
)
from ssd.trainer import Event, Trainer, build_distiller, build_model, build_regularizers


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint."""


@dataclass(frozen=True)
class RunOptions:
    """What changes a run's progress but not its numbers."""

    device: torch.device
    resume: bool = False
    checkpoint_every: float = 30.0  # seconds


def make_tasks(config: Config, data: Dataset) -> list[Task]:
    """The stream of a run; UserError if the data set does not suit the settings."""
    shown = hold_out(data, config.validation) if config.validation > 0 else data
    return split(shown, config.tasks, class_order(data.classes, config.seed))


def make_trainer(
    config: Config, tasks: Sequence[Task], classes: int, device: torch.device
) -> Trainer:
    """The trainer of a run; UserError if it does not fit into memory."""
    try:
        tasks = [task.to(device) for task in tasks]
        model = build_model(config, tasks[0].x_train.shape[1], classes).to(device)
        return Trainer(
            config, tasks, model, build_distiller(config, model), build_regularizers(config, model)
        )
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"--neurons {config.neurons} does not fit into the memory of {device}"
        ) from error


class Journal:
    """The metrics log and the checkpoint of a run, kept in step with one another.

    Args:
        folder: of the run. described: whose checkpoint it is, see folder.describe.
    """

    def __init__(self, folder: Path, described: Mapping[str, Any]) -> None:
        self.path, self.described = folder / CHECKPOINT, described
        self.log = folder / METRICS
        self.seconds = 0.0  # trained before this process
        self.start = self.saved = time.perf_counter()

    def restore(self, trainer: Trainer, device: torch.device) -> None:
        """Puts the trainer where the checkpoint was taken; without one, starts the log anew."""
        if not self.path.is_file():
            write_atomically(self.log, "")
            return
        tensors, state = load_checkpoint(self.path, device)
        changed = difference(state.get("run", {}), self.described)
        if changed:
            raise UserError(
                f"checkpoint {self.path} is of another run ({changed}); use another --out"
            )
        try:
            trainer.load_state(tensors, state["numbers"])
            self.seconds, size = float(state["seconds"]), int(state["metrics_bytes"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())
            raise UserError(
                f"checkpoint {self.path} is not of this model ({line[:200]}); use another --out"
            ) from error
        self._rewind(size)

    def _rewind(self, size: int) -> None:
        """Cuts off what was logged after the checkpoint: it comes again."""
        if not self.log.is_file() or self.log.stat().st_size < size:
            raise UserError(f"{self.log} is damaged (it lacks lines); use another --out")
        with open(self.log, "r+b") as stream:
            stream.truncate(size)

    def write(self, record: Mapping[str, Any]) -> None:
        with open(self.log, "ab") as stream:
            stream.write(json.dumps(record).encode() + b"\n")

    def elapsed(self) -> float:
        """Seconds trained up to now, those before a resumption included."""
        return self.seconds + time.perf_counter() - self.start

    def due(self, every: float) -> bool:
        """Whether the checkpoint is older than `every` seconds."""
        return time.perf_counter() - self.saved > every

    def save(self, trainer: Trainer) -> None:
        with open(self.log, "rb") as stream:
            os.fsync(stream.fileno())  # the log must not fall behind the checkpoint
        tensors, numbers = trainer.state()
        state = {
            "run": self.described,
            "numbers": numbers,
            "seconds": self.elapsed(),
            "metrics_bytes": self.log.stat().st_size,
        }
        save_checkpoint(self.path, tensors, state)
        self.saved = time.perf_counter()


def run(
    config: Config,
    data: Dataset,
    folder: Path,
    options: RunOptions,
    watch: Callable[[Trainer, Event], None] = lambda trainer, event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains one run to its end, from its checkpoint if there is one, and returns its summary.

    Args:
        config, data, folder, options: see there. watch: called at every event.
        stopped: asked at every event; when true a checkpoint is written.

    Raises:
        UserError: bad settings or a folder that is not this run's. Interrupted: it was stopped.
        OSError: a file could not be written.
    """
    config.validate()
    trainer = make_trainer(config, make_tasks(config, data), data.classes, options.device)
    described = describe(config, data)
    claim(folder, described, options.resume)
    if (folder / SUMMARY).is_file():
        return read_json(folder / SUMMARY)
    journal = Journal(folder, described)
    journal.restore(trainer, options.device)
    for event in trainer.run():
        if event.kind == "epoch":
            journal.write({"task": event.task, "epoch": event.epoch, **event.record})
        watch(trainer, event)
        stop = stopped()
        if stop or event.kind == "task" or journal.due(options.checkpoint_every):
            journal.save(trainer)
        if stop and trainer.task < config.tasks:
            raise Interrupted
    summary = summarize(config, data.name, trainer, journal.elapsed())
    write_atomically(folder / MATRIX, matrix_csv(summary["accuracy_matrix"]))
    write_atomically(folder / FREQUENCY, npy(trainer.frequency))
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def device_name(device: torch.device) -> str:
    """A device with the name of its hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def summarize(config: Config, dataset: str, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The content of summary.json."""
    accuracy, frequency = trainer.accuracy, trainer.frequency
    return {
        "dataset": dataset,
        "method": config.method,
        "seed": config.seed,
        "evaluated_on": "validation" if config.validation > 0 else "test",
        "classes_per_task": [list(task.classes) for task in trainer.tasks],
        "accuracy_matrix": accuracy.tolist(),
        "mean_accuracy": metrics.mean_accuracy(accuracy),
        "bwt": metrics.backward_transfer(accuracy),
        "forgetting": metrics.forgetting(accuracy),
        "mean_entropy_bits": metrics.activation_entropy(frequency).mean(-1).tolist(),
        "dead_fraction": [metrics.dead_fraction(row) for row in frequency],
        "mean_active": frequency.sum(-1).tolist(),
        "seconds": seconds,
        "steps_per_second": trainer.steps / seconds,
        "device": device_name(trainer.parameters[0].device),
        "versions": versions(),
        "commit": commit(),
        "config": config.to_dict(),
    }


def matrix_csv(matrix: list[list[float]]) -> str:
    """Rows: after training task t; columns: accuracy on task i."""
    header = ",".join(["after_task", *(f"task_{i}" for i in range(len(matrix)))])
    rows = [",".join([str(t), *(repr(a) for a in row)]) for t, row in enumerate(matrix)]
    return "\n".join([header, *rows]) + "\n"


def npy(tensor: Tensor) -> bytes:
    """The content of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, tensor.cpu().numpy(), allow_pickle=False)
    return stream.getvalue()
