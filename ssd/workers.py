"""Batches of runs in several processes, a thread each: one small network leaves cores idle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing

from ssd.config import Config
from ssd.data import Dataset
from ssd.display import STEPS_PER_UPDATE, progress
from ssd.errors import Interrupted
from ssd.jobs import run_jobs
from ssd.run import RunOptions
from ssd.trainer import Event, Trainer

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event as Flag

    from torch.multiprocessing import Queue

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
