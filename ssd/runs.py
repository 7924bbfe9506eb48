"""Runs in their folders: trained side by side, logged, saved, summarised and resumed."""

from __future__ import annotations

import io
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd import metrics
from ssd.config import JOINT, Config
from ssd.data import Dataset, Task, class_order, cumulated, hold_out, load, split
from ssd.errors import Diverged, Interrupted, UserError, fitting, one_line, require_memory
from ssd.learner import TERMS, Learner, build_model
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint
from ssd.storage.files import damaged, difference, dumps, write_atomically, write_json
from ssd.storage.run_folder import (
    CHECKPOINT,
    FREQUENCY,
    MATRIX,
    METRICS,
    STRUCTURE,
    SUMMARY,
    accuracies,
    claimed,
    describe,
    identity,
    origin,
    read_summary,
)
from ssd.trainer import Event, Trainer


@dataclass(frozen=True)
class RunOptions:
    """How runs proceed and whom they tell; none of it changes their numbers.

    Args:
        device: where they train.
        resume: whether their folders may hold them already.
        checkpoint_every: seconds.
        watch: called with the trainer at every event.
        stopped: asked at every event; once true, the state is saved and the training ends.
    """

    device: torch.device
    resume: bool = False
    checkpoint_every: float = 30.0
    watch: Callable[[Trainer, Event], None] = lambda trainer, event: None
    stopped: Callable[[], bool] = lambda: False


def load_data(config: Config, root: Path, **how: Any) -> Dataset:
    """The data set of a run; root and how: see ssd.data.load."""
    return load(config.dataset, root, Path(config.features) if config.features else None, **how)


def make_tasks(config: Config, data: Dataset) -> list[Task]:
    """The stream of tasks of a run; UserError if the data set does not fit the settings."""
    shown = hold_out(data, config.validation) if config.validation > 0 else data
    seed = config.seed if config.order_seed is None else config.order_seed
    tasks = split(shown, config.tasks, class_order(data.classes, seed))
    return cumulated(tasks) if JOINT in config.parts else tasks


def make_learner(
    config: Config, tasks: Sequence[Task], classes: int, device: torch.device
) -> Learner:
    """The learner of a run; UserError if it does not fit into memory."""
    with fitting(f"--neurons {config.neurons}", device):
        tasks = [task.to(device) for task in tasks]
        model = build_model(config, tasks[0].x_train.shape[1], classes).to(device)
        return Learner(config, tasks, model)


def require_fit(config: Config, data: Dataset, count: int, device: torch.device) -> None:
    """UserError if the samples and weights of `count` runs side by side cannot fit."""
    weights = 4 * config.neurons * (data.x_train.shape[1] + data.classes)
    teacher = 0  # the activations of a task's samples that are distilled
    if "ssd" in config.parts:
        units = config.neurons if config.selection == "all" else config.subnetwork * config.k
        teacher = round(4 * units * len(data.y_train) / config.tasks)
    # Each run has its own copy of the samples.
    needed = count * (data.x_train.nbytes + weights + teacher)
    runs = f", {count} runs side by side," * (count > 1)
    require_memory(needed, f"--neurons {config.neurons}{runs}", device)


class Journal:
    """The logs and the common checkpoint of runs, which always agree.

    Args:
        trainer: trains the runs.
        checkpoint: the file.
        folders: one per run.
        described: what identifies each run, see run_folder.describe.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoint: Path,
        folders: Sequence[Path],
        described: Sequence[Mapping[str, Any]],
    ) -> None:
        self.trainer, self.path, self.described = trainer, checkpoint, described
        self.logs = [folder / METRICS for folder in folders]
        self.seconds = 0.0  # trained before this process
        self.start = self.saved = time.perf_counter()

    def restore(self) -> None:
        """Restores the trainer from the checkpoint; without one, starts empty logs."""
        if not self.path.is_file():
            for log in self.logs:
                write_atomically(log, "")
            return
        tensors, state = load_checkpoint(self.path, self.trainer.device)
        before = state.get("runs", [])
        pairs = zip(map(identity, before), map(identity, self.described), strict=False)
        changed = "; ".join(filter(None, (difference(*pair) for pair in pairs)))
        if changed or len(before) != len(self.described):
            raise UserError(
                f"checkpoint {self.path} is of another run ({changed}); use another --out"
            )
        try:
            self.trainer.load_state(tensors, state["numbers"])
            self.seconds = float(state["seconds"])
            logs = [(int(log["bytes"]), str(log["crc32"])) for log in state["logs"]]
            if len(logs) != len(self.logs):
                raise ValueError(f"of {len(logs)} logs")
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"checkpoint {self.path} is not of this model ({one_line(error)})"
            raise UserError(f"{reason}; use another --out") from error
        for log, (size, crc) in zip(self.logs, logs, strict=True):
            _rewind(log, size, crc)

    def write(self, event: Event) -> None:
        """Logs one epoch of each run."""
        for log, record in zip(self.logs, event.records, strict=True):
            line = dumps({"task": event.task, "epoch": event.epoch, **record})
            with open(log, "ab") as stream:
                stream.write(line.encode() + b"\n")

    def elapsed(self) -> float:
        """Seconds of training so far, including those before the run was resumed."""
        return self.seconds + time.perf_counter() - self.start

    def save(self) -> None:
        for log in self.logs:
            with open(log, "rb") as stream:
                os.fsync(stream.fileno())  # the log must not fall behind the checkpoint
        tensors, numbers = self.trainer.state()
        state = {
            "runs": self.described,
            "numbers": numbers,
            "seconds": self.elapsed(),
            "logs": [
                {"bytes": len(text), "crc32": f"{zlib.crc32(text):08x}"}
                for text in (log.read_bytes() for log in self.logs)
            ],
        }
        save_checkpoint(self.path, tensors, state)
        self.saved = time.perf_counter()


def _rewind(log: Path, size: int, crc: str) -> None:
    """Cuts off what the log holds from after the checkpoint; training will log it again."""
    if not log.is_file() or log.stat().st_size < size:
        raise damaged(log, "it lacks lines")
    if f"{zlib.crc32(log.read_bytes()[:size]):08x}" != crc:
        raise damaged(log, "checksum differs")
    with open(log, "r+b") as stream:
        stream.truncate(size)


def run(config: Config, data: Dataset, folder: Path, options: RunOptions) -> dict[str, Any]:
    """Trains one run to its end; see run_together. Its checkpoint lies in its own folder."""
    (summary,) = run_together([config], data, [folder], folder / CHECKPOINT, options)
    return summary


def run_together(
    configs: Sequence[Config],
    data: Dataset,
    folders: Sequence[Path],
    checkpoint: Path,
    options: RunOptions,
    make: Callable[[Config], Learner] | None = None,
) -> list[dict[str, Any]]:
    """Trains runs side by side to their end, from their checkpoint if there is one.

    Args:
        configs: settings of each run; they agree in trainer.together.
        data: the data set of all runs.
        folders: one per run.
        checkpoint: the file of their common state.
        options: see RunOptions.
        make: builds the learner of a run; None: from its settings and the data.

    Returns:
        The summary of each run.

    Raises:
        UserError: bad settings, or a folder of another run or in use by another process.
        Interrupted: options.stopped() was true.
        Diverged: numbers of a run are not finite; the checkpoint is from before.
        OSError: a file could not be written.
    """
    for config in configs:
        config.validate()
    require_fit(configs[0], data, len(configs), options.device)
    if make is None:
        learners = [
            make_learner(config, make_tasks(config, data), data.classes, options.device)
            for config in configs
        ]
    else:
        learners = [make(config) for config in configs]
    trainer = Trainer(learners)
    described = [describe(config, data) for config in configs]
    with ExitStack() as held:
        for folder, identified in zip(folders, described, strict=True):
            held.enter_context(claimed(folder, identified, options.resume))
        if all((folder / SUMMARY).is_file() for folder in folders):
            return [read_summary(folder) for folder in folders]
        journal = Journal(trainer, checkpoint, folders, described)
        journal.restore()
        try:
            _train(journal, options)
        except Diverged as error:
            raise Diverged(
                f"{error}; {checkpoint} is from before, and --resume would take the same steps: "
                "change the settings and use another --out",
                error.number,
            ) from error
        return [
            _conclude(folder, learner, data, journal)
            for folder, learner in zip(folders, learners, strict=True)
        ]


def _train(journal: Journal, options: RunOptions) -> None:
    """Trains to the end; logs every epoch, saves the initial state and then as options say."""
    trainer = journal.trainer
    if not journal.path.is_file():
        journal.save()
    for event in trainer.run():
        if event.kind == "epoch":
            journal.write(event)
        options.watch(trainer, event)
        stop = options.stopped()
        due = time.perf_counter() - journal.saved > options.checkpoint_every
        if stop or due or event.kind == "task":
            journal.save()
        if stop and trainer.task < trainer.config.tasks:
            raise Interrupted


def _conclude(folder: Path, learner: Learner, data: Dataset, journal: Journal) -> dict[str, Any]:
    """Writes the results of a run; returns its summary."""
    config, frequency, structure = learner.config, learner.frequency, learner.structure
    trainer, seconds = journal.trainer, journal.elapsed()
    classes = [list(task.classes) for task in learner.tasks]
    summary = {
        **accuracies(data.name, config.method, config, learner.accuracy, classes_per_task=classes),
        "mean_entropy_bits": metrics.activation_entropy(frequency).mean(-1).tolist(),
        "dead_fraction": [metrics.dead_fraction(row) for row in frequency],
        "mean_active": frequency.sum(-1).tolist(),
        **{
            f"{term}_gradient": [norm if norm >= 0 else None for norm in column.tolist()]
            for term, column in zip(TERMS, learner.gradients.T, strict=True)
        },
        **({} if structure is None else {"structure": structure.summary()}),
        "trained_together": len(trainer.learners),
        "seconds": seconds,  # of all runs that were trained together
        "steps_per_second": trainer.steps / seconds,
        **origin(learner.device),
        "config": config.to_dict(),
    }
    stream = io.BytesIO()
    np.save(stream, frequency.cpu().numpy(), allow_pickle=False)
    write_atomically(folder / MATRIX, matrix_csv(summary["accuracy_matrix"]))
    write_atomically(folder / FREQUENCY, stream.getvalue())
    if structure is not None:
        structure.save(folder / STRUCTURE)
    write_json(folder / SUMMARY, summary)
    return summary


def leave_out(checkpoint: Path, number: int, target: Path) -> None:
    """Writes a checkpoint without one of its runs, for run_together to go on from.

    Args:
        checkpoint: of runs that are trained together.
        number: position of the run that is left out.
        target: the new file.
    """
    tensors, state = load_checkpoint(checkpoint, torch.device("cpu"))
    kept = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition("/")
        if int(owner) != number:
            kept[f"{int(owner) - (int(owner) > number)}/{rest}"] = tensor
    for listed in (state["runs"], state["logs"]):
        del listed[number]
    save_checkpoint(target, kept, state)


def matrix_csv(matrix: list[list[float]]) -> str:
    """The accuracy matrix as CSV: row t after training task t, column i accuracy on task i."""
    header = ",".join(["after_task", *(f"task_{i}" for i in range(len(matrix)))])
    rows = [",".join([str(t), *(repr(a) for a in row)]) for t, row in enumerate(matrix)]
    return "\n".join([header, *rows]) + "\n"
