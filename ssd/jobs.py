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
from ssd.folder import describe
from ssd.run import RunOptions, run
from ssd.trainer import Event, Trainer


def job_folder(root: Path, config: Config, data: Dataset) -> Path:
    """Where the run of these settings on these data lies: method, seed and a digest."""
    text = json.dumps(describe(config, data), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return root / f"{data.name}-{config.method}-seed{config.seed}-{digest}"


def run_jobs(
    configs: Sequence[Config],
    data: Dataset,
    root: Path,
    options: RunOptions,
    watch: Callable[[Trainer, Event], None] = lambda trainer, event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Trains what has not been trained yet; the summaries, in the order of the configs.

    Args:
        configs: one per run. data: of all of them. root: holds a folder for each run.
        options, watch, stopped: see ssd.run.run; a run that was begun is always resumed.

    Raises:
        UserError, Interrupted, OSError: see ssd.run.run.
    """
    for config in configs:
        config.validate()
    resumed = replace(options, resume=True)
    return [
        run(config, data, job_folder(root, config, data), resumed, watch, stopped)
        for config in configs
    ]
