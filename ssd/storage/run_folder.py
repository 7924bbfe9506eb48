"""The folder of a run: its files, what they hold, and which run it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd import metrics
from ssd.config import Config
from ssd.data import Dataset
from ssd.errors import UserError
from ssd.storage.files import (
    are_numbers,
    damaged,
    difference,
    read_json,
    read_text,
    require_sound,
    temporary,
    write_json,
)
from ssd.storage.lock import LOCK, folder_lock
from ssd.storage.provenance import commit, device_name, versions

# Raise this when a change moves the numbers of runs: runs of another ALGORITHM are neither resumed
# nor shown. Commits are recorded too, but most of them move no number.
ALGORITHM = 1

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.safetensors"
MATRIX = "accuracy_matrix.csv"
FREQUENCY = "activation_frequency.npy"  # [T, R], after each task, on its training set
STRUCTURE = "structure.npz"  # the subnetwork after each task, see ssd.structure
SUMMARY = "summary.json"
DIVERGED = "diverged.json"  # the reason, in place of a summary

# Entries of a summary.
_TEXTS = ("dataset", "method", "evaluated_on", "device", "commit")
_NUMBERS = ("seed", "mean_accuracy", "bwt", "forgetting", "seconds")
_PER_TASK = ("mean_entropy_bits", "dead_fraction", "mean_active")


def evaluated_on(config: Config) -> str:
    """The split on which a run's accuracy is measured."""
    return "validation" if config.validation > 0 else "test"


def accuracies(
    dataset: str, method: str, config: Config, accuracy: Tensor, **stream: Any
) -> dict[str, Any]:
    """The first entries of a summary: what was measured, stream among it, and the accuracy."""
    return {
        "dataset": dataset,
        "method": method,
        "seed": config.seed,
        "evaluated_on": evaluated_on(config),
        **stream,
        "accuracy_matrix": accuracy.tolist(),
        "mean_accuracy": metrics.mean_accuracy(accuracy),
        "bwt": metrics.backward_transfer(accuracy),
        "forgetting": metrics.forgetting(accuracy),
    }


def origin(device: torch.device) -> dict[str, Any]:
    """The entries of a summary that say where its numbers come from."""
    return {"device": device_name(device), **_made_by()}


def _made_by() -> dict[str, Any]:
    return {"versions": versions(), "commit": commit()}


def read_summary(folder: Path, trained: bool = True) -> dict[str, Any]:
    """The summary of a finished run.

    Args:
        folder: of the run.
        trained: whether the run trained a network; the summary of a peer has fewer entries.

    Raises:
        UserError: the summary is damaged.
    """
    path = folder / SUMMARY
    summary = read_json(path)
    matrix, structure = summary.get("accuracy_matrix"), summary.get("structure", {})
    tasks = len(matrix) if isinstance(matrix, list) else 0
    sound = {name: isinstance(summary.get(name), str) for name in _TEXTS}
    sound |= {name: are_numbers(summary.get(name)) for name in _NUMBERS}
    sound["accuracy_matrix"] = tasks > 0 and are_numbers(matrix, tasks, tasks)
    sound["versions"] = isinstance(summary.get("versions"), dict)
    sound["structure"] = isinstance(structure, dict) and all(
        are_numbers(values) or _compared(values, tasks) for values in structure.values()
    )
    if trained:
        sound |= {name: are_numbers(summary.get(name), tasks) for name in _PER_TASK}
        sound["trained_together"] = are_numbers(summary.get("trained_together"))
        sound["config"] = _is_config(summary.get("config"), tasks)
    require_sound(path, sound)
    return summary


def read_diverged(folder: Path) -> dict[str, Any]:
    """What write_diverged wrote; UserError if it is damaged."""
    path, kinds = folder / DIVERGED, {"diverged": str, "versions": dict, "commit": str}
    content = read_json(path)
    require_sound(path, {n: isinstance(content.get(n), kind) for n, kind in kinds.items()})
    return content


def _compared(values: Any, tasks: int) -> bool:
    """Whether each task has a number, or None if there was nothing to compare it with."""
    if not isinstance(values, list) or len(values) != tasks:
        return False
    return all(value is None or are_numbers(value) for value in values)


def _is_config(content: Any, tasks: int) -> bool:
    try:
        config = Config(**content)
        config.validate()
    except (TypeError, UserError):
        return False
    return config.tasks == tasks


def write_diverged(folder: Path, reason: str) -> None:
    """Records why a run has no summary: its numbers were not finite."""
    write_json(folder / DIVERGED, {"diverged": reason, **_made_by()})


def read_frequency(folder: Path, config: Config) -> np.ndarray:
    """The activation frequency [T, R] of a run; UserError if the file is damaged."""
    path, shape = folder / FREQUENCY, (config.tasks, config.neurons)
    try:
        found = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy raises almost anything for a damaged file
        raise damaged(path, error) from error
    if not isinstance(found, np.ndarray) or not are_numbers(found, *shape):
        raise damaged(path, f"no numbers {list(shape)}")
    return found


def read_records(folder: Path, config: Config) -> list[dict[str, Any]]:
    """The log of a finished run, one record per epoch; UserError if it is damaged."""
    path, tasks, epochs = folder / METRICS, config.tasks, config.epochs
    try:
        records = [json.loads(line) for line in read_text(path).splitlines()]
        numbers = [(record["task"], record["epoch"]) for record in records]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    if numbers != list(product(range(tasks), range(epochs))):
        raise damaged(path, f"not a line for each of {tasks} x {epochs} epochs")
    for (task, epoch), record in zip(numbers, records, strict=True):
        expected = epoch + 1 == epochs or "test_accuracy" in record
        if expected and not are_numbers(record.get("test_accuracy"), tasks):
            raise damaged(path, f"no test_accuracy in task {task}, epoch {epoch}")
    return records


def describe(config: Config, data: Dataset, seeds: int = 1) -> dict[str, Any]:
    """What identifies a run, ready for JSON."""
    return {
        "config": config.to_dict(),
        "data": data.name,
        "data_crc32": data.checksum(),
        "seeds": seeds,
        "algorithm": ALGORITHM,
    }


def identity(described: Mapping[str, Any]) -> dict[str, Any]:
    """describe() without what does not tell runs apart.

    That is the name of the feature file, whose checksum identifies it, and a setting that came
    later, at its default: runs from before do not mention it.
    """
    config = described.get("config")
    if not isinstance(config, dict):
        return dict(described)
    later = {f.name: f.default for f in fields(Config) if f.metadata["later"]}
    known = {n: v for n, v in config.items() if n not in later or v != later[n]}
    return {**described, "config": known | {"features": None}}


@contextmanager
def claimed(folder: Path, described: Mapping[str, Any], resume: bool) -> Iterator[None]:
    """Makes the folder of a run, or checks that it holds this run, and locks it.

    Raises:
        UserError: the folder holds something else, or another process uses it.
        OSError: the folder cannot be made.
    """
    _holds(folder, described, resume)  # before the lock writes into a foreign folder
    with folder_lock(folder):
        path, known = folder / CONFIG, _holds(folder, described, resume)
        content = read_json(path) if known else {**described, **_made_by()}
        # The feature file of a known run may have moved, and a plain --resume must find it.
        if not known or content["config"] != described["config"]:
            write_json(path, {**content, "config": described["config"]})
        yield


def _holds(folder: Path, described: Mapping[str, Any], resume: bool) -> bool:
    """Whether a folder already holds this run; UserError if it holds something else."""
    path = folder / CONFIG
    if path.is_file():
        if not resume:
            raise UserError(f"{folder} already holds a run; add --resume or use another --out")
        if changed := difference(identity(read_json(path)), identity(described)):
            raise UserError(
                f"{folder} belongs to another configuration ({changed}); use another --out"
            )
        return True
    if folder.exists() and not _is_empty(folder):
        raise UserError(f"{folder} exists and is not the folder of a run; use another --out")
    return False


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds at most what a run killed at its start leaves behind."""
    leftovers = (temporary(folder / CONFIG), folder / LOCK)
    return folder.is_dir() and all(file in leftovers for file in folder.iterdir())
