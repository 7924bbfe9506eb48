"""One run in its folder: configuration, metrics, checkpoints, summary; resumable."""

from __future__ import annotations

import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
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
from ssd.trainer import Event, Trainer, build_distiller, build_model, build_regularizers

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
MATRIX = "accuracy_matrix.csv"
FREQUENCY = "activation_frequency.npy"  # [T, R], after each task, on its training set
SUMMARY = "summary.json"


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint."""


@dataclass(frozen=True)
class RunOptions:
    """What changes a run's progress but not its numbers."""

    device: torch.device
    resume: bool = False
    checkpoint_every: float = 30.0  # seconds


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("ssd-kernels", "torch", "triton", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the source tree, "-dirty" if it was changed; "unknown" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_json(path: Path) -> Any:
    """A JSON file of a run; UserError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); use another --out") from error


def prepare_folder(folder: Path, config: Config, data: Dataset, resume: bool) -> None:
    """Makes the folder of a run, or checks that it belongs to this very run.

    Raises:
        UserError: the folder holds something else.
    """
    path = folder / CONFIG
    described = {"config": config.to_dict(), "data": data.name, "data_crc32": data.checksum()}
    if path.is_file():
        if not resume:
            raise UserError(f"{folder} already holds a run; add --resume or use another --out")
        before = read_json(path)
        for key, value in described.items():
            if before.get(key) != value:
                raise UserError(
                    f"{folder} belongs to another configuration "
                    f"({_difference(before.get(key), value)}); use another --out"
                )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not the folder of a run; use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    described |= {"versions": versions(), "commit": commit()}
    write_atomically(path, json.dumps(described, indent=2) + "\n")


def _difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"{before}, now {now}"
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    return ", ".join(f"{k} {before.get(k)}, now {now.get(k)}" for k in keys)


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
    shown = hold_out(data, config.validation) if config.validation > 0 else data
    order = class_order(data.classes, config.seed)
    tasks = [t.to(options.device) for t in split(shown, config.tasks, order)]
    prepare_folder(folder, config, data, options.resume)
    if (folder / SUMMARY).is_file():
        return read_json(folder / SUMMARY)
    model = build_model(config, shown.x_train.shape[1], data.classes).to(options.device)
    trainer = Trainer(
        config, tasks, model, build_distiller(config, model), build_regularizers(config, model)
    )
    seconds = _restore(trainer, folder, options.device)
    clock = time.perf_counter()
    saved = clock

    def save() -> None:
        tensors, numbers = trainer.state()
        state = {
            "numbers": numbers,
            "seconds": seconds + time.perf_counter() - clock,
            "metrics_bytes": (folder / METRICS).stat().st_size,
        }
        save_checkpoint(folder / CHECKPOINT, tensors, state)

    with open(folder / METRICS, "a", encoding="utf-8") as log:
        for event in trainer.run():
            if event.kind == "epoch":
                record = {"task": event.task, "epoch": event.epoch, **event.record}
                log.write(json.dumps(record) + "\n")
                log.flush()
            watch(trainer, event)
            stop = stopped()
            due = time.perf_counter() - saved > options.checkpoint_every
            if stop or due or event.kind == "task":
                save()
                saved = time.perf_counter()
            if stop and trainer.task < config.tasks:
                raise Interrupted
    seconds += time.perf_counter() - clock
    summary = summarize(config, data, tasks, trainer, seconds, options.device)
    write_atomically(folder / MATRIX, matrix_csv(summary["accuracy_matrix"]))
    write_atomically(folder / FREQUENCY, npy(trainer.frequency))
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _restore(trainer: Trainer, folder: Path, device: torch.device) -> float:
    """Loads the folder's checkpoint if there is one; returns the seconds trained before."""
    path, log = folder / CHECKPOINT, folder / METRICS
    if not path.is_file():
        log.unlink(missing_ok=True)
        log.touch()
        return 0.0
    tensors, state = load_checkpoint(path, device)
    try:
        trainer.load_state(tensors, state["numbers"])
        # Lines written after the checkpoint come again.
        with open(log, "r+b") as stream:
            stream.truncate(state["metrics_bytes"])
        return float(state["seconds"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"checkpoint {path} is not of this model ({line[:200]}); use another --out"
        ) from error


def summarize(
    config: Config,
    data: Dataset,
    tasks: Sequence[Task],
    trainer: Trainer,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """The content of summary.json."""
    accuracy, frequency = trainer.accuracy, trainer.frequency
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "dataset": data.name,
        "method": config.method,
        "seed": config.seed,
        "evaluated_on": "validation" if config.validation > 0 else "test",
        "classes_per_task": [list(task.classes) for task in tasks],
        "accuracy_matrix": accuracy.tolist(),
        "mean_accuracy": metrics.mean_accuracy(accuracy),
        "bwt": metrics.backward_transfer(accuracy),
        "forgetting": metrics.forgetting(accuracy),
        "mean_entropy_bits": metrics.activation_entropy(frequency).mean(-1).tolist(),
        "dead_fraction": [metrics.dead_fraction(row) for row in frequency],
        "mean_active": frequency.sum(-1).tolist(),
        "seconds": seconds,
        "steps_per_second": trainer.steps / seconds,
        "device": f"{device.type} ({name})",
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
