"""Many runs under one folder, each found again by its settings: sweeps and reproductions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssd.config import Config
from ssd.data import Dataset
from ssd.errors import Diverged
from ssd.folder import (
    SUMMARY,
    describe,
    ended,
    identity,
    read_diverged,
    read_summary,
    write_diverged,
)
from ssd.run import RunOptions, leave_out, run_together
from ssd.strict_json import dumps
from ssd.trainer import Event, Trainer, together

# Runs of one program: beyond it memory grows and nothing gets faster.
MOST = 16


def job_folder(root: Path, config: Config, data: Dataset) -> Path:
    """Where the run of these settings on these data lies: named by method, seed, digest."""
    text = dumps(identity(describe(config, data)), sort_keys=True)
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

    Runs that differ only in numbers (trainer.OWN) are trained side by side as one program. One that
    diverges is left out, and the others go on; in place of its summary stands {"diverged": why},
    with versions and commit. That is kept, so it is not trained again until its folder is deleted.

    Args:
        configs: one per run. data: of all of them. root: holds a folder for each run.
        options, watch, stopped: see ssd.run.run; a run that was begun is always resumed.

    Raises:
        UserError, Interrupted, OSError: see ssd.run.run.
    """
    for config in configs:
        config.validate()
    resumed = replace(options, resume=True)
    waiting = [c for c in configs if not ended(job_folder(root, c, data))]
    for batch in _batches(waiting):
        while batch:
            folders = [job_folder(root, config, data) for config in batch]
            checkpoint = _checkpoint(root, folders)
            try:
                run_together(batch, data, folders, checkpoint, resumed, watch, stopped)
                batch = []
            except Diverged as error:
                reason = str(error.__cause__ or error)
                bad = folders.pop(error.number)
                batch.pop(error.number)
                if batch:
                    leave_out(checkpoint, error.number, _checkpoint(root, folders))
                write_diverged(bad, reason)
            checkpoint.unlink(missing_ok=True)
    ends = []
    for folder in (job_folder(root, config, data) for config in configs):
        whole = (folder / SUMMARY).is_file()
        ends.append(read_summary(folder) if whole else read_diverged(folder))
    return ends


def _checkpoint(root: Path, folders: Sequence[Path]) -> Path:
    """Of runs that are trained together."""
    names = "\n".join(folder.name for folder in folders)
    return root / f"together-{_digest(names)}.safetensors"


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
