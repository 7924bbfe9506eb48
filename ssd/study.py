"""Many runs under one folder, each found again by its settings: sweeps and reproductions."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing

from ssd.config import Config
from ssd.data import Dataset
from ssd.errors import Diverged, Interrupted
from ssd.progress import STEPS_PER_UPDATE, progress
from ssd.run import RunOptions, leave_out, run_together
from ssd.storage.files import dumps
from ssd.storage.run_folder import (
    SUMMARY,
    describe,
    ended,
    identity,
    read_diverged,
    read_summary,
    write_diverged,
)
from ssd.trainer import Event, Trainer, together

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event as Flag

    from torch.multiprocessing import Queue

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


# A process takes seconds to start: multiplications that one thread does in many times that.
WORTH = 2e12


@dataclass(frozen=True)
class Batch:
    """Runs that one worker trains; see ssd.jobs.run_jobs."""

    configs: Sequence[Config]
    data: Dataset
    root: Path
    options: RunOptions


def processes_for(work: float, batches: int, device: torch.device) -> int:
    """How many processes batches of so many multiplications are worth."""
    if device.type != "cpu" or work < WORTH:
        return 1
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, batches))


def train_all(
    batches: Sequence[Batch],
    processes: int,
    report: Callable[[int, float, str], None],
    ended: Callable[[int], None],
    stopped: Callable[[], bool],
) -> None:
    """Trains the batches in order, so many at a time.

    Args:
        report: takes the number of a batch, the share of it that is done, and where it is.
        ended: takes the number of a batch that has ended.
        stopped: asked several times a second; when true, the workers save what they have.

    Raises:
        Interrupted: stopped() was true. Whatever a worker raised, once the others have saved.
    """
    context = multiprocessing.get_context("spawn")
    reports, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(processes, context, _begin, (reports, stop)) as pool:
        running = {pool.submit(_train, n, batch): n for n, batch in enumerate(batches)}
        waiting: set[Future[None]] = set(running)
        try:
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when="FIRST_COMPLETED")
                while not reports.empty():
                    report(*reports.get())
                for future in finished:
                    future.result()
                    ended(running[future])
                if stopped():
                    raise Interrupted
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


_shared: dict[str, Any] = {}


def _begin(reports: Queue[tuple[int, float, str]], stop: Flag) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared.update(reports=reports, stop=stop)


def _end_with_parent() -> None:
    # A parent that was killed stops nobody, and its runs may be resumed at once.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(number: int, batch: Batch) -> None:
    def watch(trainer: Trainer, event: Event) -> None:
        if event.kind != "step" or event.step % STEPS_PER_UPDATE == 0:
            _shared["reports"].put((number, *progress(trainer, event)))

    run_jobs(batch.configs, batch.data, batch.root, batch.options, watch, _shared["stop"].is_set)
