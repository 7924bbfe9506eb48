"""Many runs under one folder, each found again by its settings: sweeps and reproductions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssd.config import Config
from ssd.data import Dataset
from ssd.folder import SUMMARY, describe, identity, read_json
from ssd.run import RunOptions, run_together
from ssd.trainer import Event, Trainer, together

# Runs of one program: beyond it memory grows and nothing gets faster.
MOST = 16


def job_folder(root: Path, config: Config, data: Dataset) -> Path:
    """Where the run of these settings on these data lies: named by method, seed, digest."""
    text = json.dumps(identity(describe(config, data)), sort_keys=True)
    return root / f"{data.name}-{config.method}-seed{config.seed}-{_digest(text)}"


def run_jobs(
    configs: Sequence[Config],
    data: Dataset,
    root: Path,
    options: RunOptions,
    watch: Callable[[Trainer, Event], None] = lambda trainer, event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Trains what has not been trained yet; the summaries, in the order of the configs.

    Runs that differ only in numbers (trainer.OWN) are trained side by side as one program.

    Args:
        configs: one per run. data: of all of them. root: holds a folder for each run.
        options, watch, stopped: see ssd.run.run; a run that was begun is always resumed.

    Raises:
        UserError, Interrupted, OSError: see ssd.run.run.
    """
    for config in configs:
        config.validate()
    resumed = replace(options, resume=True)
    waiting = [c for c in configs if not (job_folder(root, c, data) / SUMMARY).is_file()]
    for batch in _batches(waiting):
        folders = [job_folder(root, config, data) for config in batch]
        names = "\n".join(folder.name for folder in folders)
        checkpoint = root / f"together-{_digest(names)}.safetensors"
        run_together(batch, data, folders, checkpoint, resumed, watch, stopped)
        checkpoint.unlink(missing_ok=True)
    return [read_json(job_folder(root, config, data) / SUMMARY) for config in configs]


def _batches(configs: Sequence[Config]) -> list[list[Config]]:
    """The distinct configs, grouped into what can be trained together."""
    groups: dict[tuple[Any, ...], list[Config]] = {}
    for config in dict.fromkeys(configs):
        groups.setdefault(together(config), []).append(config)
    return [
        group[first : first + MOST]
        for group in groups.values()
        for first in range(0, len(group), MOST)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
