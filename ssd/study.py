"""Studies: many runs, each in a folder named by its settings, so that none is trained twice."""

from __future__ import annotations

import hashlib
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, multiprocessing

from ssd.config import Config, hints
from ssd.data import Dataset, Task
from ssd.errors import Diverged, Interrupted, UserError
from ssd.executors import attempt, result_of
from ssd.progress import Display, position_watcher
from ssd.runs import RunOptions, leave_out, make_tasks, run_together
from ssd.storage.dataset_file import read_dataset, stored
from ssd.storage.files import dumps, write_json
from ssd.storage.link import LOOK, Every, Link, alive
from ssd.storage.run_folder import (
    DIVERGED,
    SUMMARY,
    accuracies,
    describe,
    identity,
    origin,
    read_diverged,
    read_summary,
    write_diverged,
)
from ssd.trainer import together

# Runs of one program: more take more memory and are no faster.
MOST = 16
# Runs of one program where several processes share the work.
MOST_APART = 3
# Up to so many encoder weights, as R = 10,000 with d = 784, several processes share the work.
# Larger encoders would push one another out of the cache, and one process uses all cores with them.
SMALL = 2**23
# A process takes seconds to start. One thread does so many multiplications in many times that.
WORTH = 2e12
# A network file system may show a file this many seconds after another machine wrote it.
UNSEEN = 90.0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A learner of another kind, in place of the network that a run trains.

    Args:
        method: its name.
        evaluate: tasks on the device -> accuracy matrix [T, T].
        neurons: R, 0 if it has none.
        settings: what else its figures depend on.
        algorithm: raised when a change moves its figures.
        trains: whether it trains a network with the run's config.
    """

    method: str
    evaluate: Callable[[Sequence[Task]], Tensor]
    neurons: int
    settings: Mapping[str, Any]
    algorithm: int
    trains: bool


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a study.

    Args:
        name: its name in the progress.
        config, data: its settings and its data.
        root: folder of all runs.
        evaluation: what to do instead of training a network.
    """

    name: str
    config: Config
    data: Dataset
    root: Path
    evaluation: Evaluation | None = None

    @cached_property
    def folder(self) -> Path:
        """Its folder, named by data set, method, seed, and a digest of settings and data."""
        config, evaluation = self.config, self.evaluation
        method, described = config.method, identity(describe(config, self.data))
        if evaluation is not None:
            method = "-".join("".join(c if c.isalnum() else " " for c in evaluation.method).split())
            trained = {"config": described} if evaluation.trains else {}
            described = {
                "peer": evaluation.method,
                "neurons": evaluation.neurons,
                "settings": evaluation.settings,
                "tasks": config.tasks,
                "seed": config.seed,
                "data_crc32": self.data.checksum(),
                "algorithm": evaluation.algorithm,
                **({} if config.order_seed is None else {"order_seed": config.order_seed}),
                **trained,
            }
        digest = _digest(dumps(described, sort_keys=True))
        return self.root / f"{self.data.name}-{method}-seed{config.seed}-{digest}"

    def outcome(self) -> dict[str, Any] | None:
        """Its summary, or {"diverged": why} with versions and commit; None if it has not ended.

        Raises:
            UserError: the file is damaged.
        """
        if (self.folder / SUMMARY).is_file():
            return read_summary(self.folder, trained=self.evaluation is None)
        return read_diverged(self.folder) if (self.folder / DIVERGED).is_file() else None

    @property
    def is_small(self) -> bool:
        """Whether it can share the cores with other runs."""
        return self.evaluation is None and self.data.x_train.shape[1] * self.config.neurons <= SMALL

    @property
    def work(self) -> float:
        """Multiplications of the encoder."""
        evaluation = self.evaluation
        epochs = self.config.epochs if evaluation is None or evaluation.trains else 1
        neurons = self.config.neurons if evaluation is None else evaluation.neurons
        return float(self.data.x_train.numel()) * epochs * max(1, neurons)


def measured(summary: Mapping[str, Any], measure: str) -> list[float]:
    """A measure of a run, one value per task; one value for a scalar, none if it is absent."""
    if measure == "seconds":  # its part of the time of all runs that were trained side by side
        return [summary["seconds"] / summary.get("trained_together", 1)]
    value = summary.get("structure", {}).get(measure, summary.get(measure))
    values = value if isinstance(value, list) else [value]
    return [v for v in values if v is not None]  # the first task has nothing to compare with


def hints_for(configs: Sequence[Config], data: Dataset) -> list[str]:
    """What a user should know of runs on these data, one line per hint; see ssd.config.hints.

    Raises:
        UserError: the data do not suit the settings.
    """
    streams = {(config.tasks, config.validation): config for config in configs}
    samples = {key: len(make_tasks(c, data)[0].y_train) for key, c in streams.items()}
    largest = data.x_train.abs().max().item()
    found = [hint for c in configs for hint in hints(c, samples[c.tasks, c.validation], largest)]
    return list(dict.fromkeys(found))


class Study:
    """Trains those of many runs that are missing, with one progress over all of them.

    Args:
        runs: of several with the same settings the first is trained.
        device: where they train.
        display: shows the progress.
        saved: called whenever runs have ended.
        executor: trains all runs, see ssd.executors; its workers share the file system of the
            runs' folders. None: this process, on a CPU several of this machine.

    Raises:
        UserError: the summary of a run is damaged.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        device: torch.device,
        display: Display,
        saved: Callable[[], None] = lambda: None,
        executor: Executor | None = None,
    ) -> None:
        self.device, self.display, self.saved, self.executor = device, display, saved, executor
        self.missing: dict[Path, Run] = {}
        for run in runs:
            if run.outcome() is None:
                self.missing.setdefault(run.folder, run)
        self.total, self.trained = len(self.missing), 0
        self.work, self.done = _work(self.missing.values()), 0.0
        self.shares: dict[tuple[Run, ...], float] = {}  # done of the batches in training
        self.start = time.perf_counter()

    def train(self, runs: Sequence[Run], stopped: Callable[[], bool]) -> None:
        """Trains those of the runs that are missing, on a CPU small ones in several processes.

        Args:
            stopped: asked again and again; once true, all runs in training save their state.

        Raises:
            Interrupted: stopped() was true. UserError: a worker died, or wrote where this process
            does not see it. UserError, OSError: see ssd.runs.run_together.
        """
        folders = dict.fromkeys(run.folder for run in runs)
        waiting = [self.missing[folder] for folder in folders if folder in self.missing]
        with self.display:
            if self.executor is not None and waiting:
                self._train_on(self.executor, waiting, stopped)
                waiting = []
            small = [run for run in waiting if run.is_small]
            processes = processes_for(_work(small), len(small), self.device)
            if processes > 1:
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(processes, context, _begin) as pool:
                    self._train_on(pool, small, stopped)
                waiting = [run for run in waiting if not run.is_small]
            for batch in _batches(waiting, MOST):
                if stopped():
                    raise Interrupted
                self._report(batch, "", 0, 1)
                watch = position_watcher(partial(self._report, batch))
                train_batch(batch, RunOptions(self.device, watch=watch, stopped=stopped))
                self._end(batch)

    def _train_on(
        self, executor: Executor, runs: Sequence[Run], stopped: Callable[[], bool]
    ) -> None:
        """Trains the runs by an executor; whatever ends that early, its workers save first."""
        # Long batches first, and none so long that one worker is left alone with it.
        batches = sorted(_batches(runs, MOST_APART), key=_work, reverse=True)
        running: dict[Future[None], tuple[tuple[Run, ...], Link]] = {}
        with stored((run.data for run in runs), runs[0].root) as files, alive(runs[0].root) as file:
            try:
                for batch in batches:
                    if stopped():
                        raise Interrupted
                    make = [
                        partial(
                            Run, r.name, r.config, root=r.root.absolute(), evaluation=r.evaluation
                        )
                        for r in batch
                    ]
                    link = Link(file, _checkpoint([r.folder for r in batch]).absolute())
                    data = files[batch[0].data.checksum()]
                    job = executor.submit(attempt, _train_elsewhere, make, data, self.device, link)
                    running[job] = batch, link
                waiting, look = set(running), Every(LOOK)
                while waiting:
                    finished, waiting = wait(waiting, timeout=0.2, return_when="FIRST_COMPLETED")
                    for job in finished:
                        batch, link = running[job]
                        result_of(job, batch[0].name)
                        _require_seen(batch)
                        link.clear()
                        self._end(batch)
                    for batch, link in [running[job] for job in waiting] if look() else ():
                        if position := link.position():
                            self._report(batch, *position)
                    if stopped():
                        raise Interrupted
            except BaseException:
                file.unlink(missing_ok=True)
                wait([job for job in running if not job.cancel()])
                raise
            finally:
                for _, link in running.values():
                    link.clear()

    def _report(self, batch: tuple[Run, ...], where: str, steps: int, total: int) -> None:
        """Shows how far a batch is."""
        self.shares[batch] = steps / total
        first, last = self.trained + 1, self.trained + sum(map(len, self.shares))
        numbers = f"run {first}" if first == last else f"runs {first} to {last}"
        text = f"{numbers} of {self.total}: {batch[0].name} {where}"
        self.display.update(text, self._done(), self.work)

    def _end(self, batch: tuple[Run, ...]) -> None:
        """Shows what the runs of a batch came to."""
        self.shares.pop(batch, None)
        self.done += _work(batch)
        for run in batch:
            del self.missing[run.folder]
            self.trained += 1
            accuracy, done = (run.outcome() or {}).get("mean_accuracy"), self._done()
            result = "diverged" if accuracy is None else f"accuracy {accuracy:.4f}"
            seconds = (time.perf_counter() - self.start) * (self.work - done) / done
            text = f"run {self.trained} of {self.total}: {run.name}: {result}; left "
            text += str(timedelta(seconds=round(seconds)))
            self.display.update(text, done, self.work, milestone=True)
        self.saved()

    def _done(self) -> float:
        return self.done + sum(share * _work(batch) for batch, share in self.shares.items())


def _work(runs: Iterable[Run]) -> float:
    return sum(run.work for run in runs)


def processes_for(work: float, runs: int, device: torch.device) -> int:
    """How many processes runs of so many multiplications are worth."""
    if device.type != "cpu" or work < WORTH:
        return 1
    return max(1, min(torch.get_num_threads(), os.cpu_count() or 1, runs))


def _batches(runs: Sequence[Run], most: int) -> list[tuple[Run, ...]]:
    """The runs in groups of at most so many that can be trained as one program."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        key = (id(run.data), together(run.config)) if run.evaluation is None else run
        groups.setdefault(key, []).append(run)
    return [
        tuple(group[first : first + most])
        for group in groups.values()
        for first in range(0, len(group), most)
    ]


def train_batch(batch: Sequence[Run], options: RunOptions) -> None:
    """Trains runs as one program, or evaluates the only one; goes on with what was begun.

    A run that diverges is left out, and the others go on. Its folder says so from then on: delete
    the folder to train it again.

    Args:
        batch: runs that differ only in numbers (trainer.OWN), on the same data.
        options: see ssd.runs.RunOptions.

    Raises:
        UserError, Interrupted, OSError: see ssd.runs.run_together.
    """
    if batch[0].evaluation is not None:
        _evaluate(batch[0], batch[0].evaluation, options.device)
        return
    options, left = replace(options, resume=True), list(batch)
    while left:
        folders = [run.folder for run in left]
        checkpoint = _checkpoint(folders)
        configs = [run.config for run in left]
        try:
            run_together(configs, left[0].data, folders, checkpoint, options)
            left = []
        except Diverged as error:
            diverged = folders.pop(error.number)
            del left[error.number]
            if left:
                leave_out(checkpoint, error.number, _checkpoint(folders))
            write_diverged(diverged, str(error.__cause__ or error))
        checkpoint.unlink(missing_ok=True)


def _evaluate(run: Run, evaluation: Evaluation, device: torch.device) -> None:
    """Evaluates a learner of another kind and writes its summary."""
    tasks = [task.to(device) for task in make_tasks(run.config, run.data)]
    run.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        accuracy = evaluation.evaluate(tasks).cpu()
    except Diverged as error:
        write_diverged(run.folder, str(error))
        return
    summary = {
        **accuracies(run.data.name, evaluation.method, run.config, accuracy),
        "seconds": time.perf_counter() - start,
        **origin(device),
        "neurons": evaluation.neurons,
        "settings": evaluation.settings,
    }
    write_json(run.folder / SUMMARY, summary)


def _checkpoint(folders: Sequence[Path]) -> Path:
    """The common checkpoint of runs that are trained together."""
    digest = _digest("\n".join(folder.name for folder in folders))
    return folders[0].with_name(f"together-{digest}.safetensors")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _train_elsewhere(
    make: Sequence[Callable[..., Run]], file: Path, device: torch.device, link: Link
) -> None:
    """Trains a batch in a worker.

    Args:
        make: makes each run, given its data.
        file: of the data.
        device: where it trains.
        link: to the study.

    Raises:
        Interrupted: the study wants no more. UserError: the device is absent, or the file.
        UserError, OSError: see train_batch.
    """
    if link.is_stopped():
        raise Interrupted
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device} is not on {platform.node()}; see --job")
    data = read_dataset(file)
    watch = position_watcher(link.report)
    options = RunOptions(device, watch=watch, stopped=link.is_stopped)
    train_batch([each(data=data) for each in make], options)


def _require_seen(batch: Sequence[Run]) -> None:
    """UserError if runs that a worker finished are not to be seen from here."""
    end = time.monotonic() + UNSEEN
    for run in batch:
        while run.outcome() is None:
            if time.monotonic() > end:
                reason = f"a worker finished {run.folder}, which cannot be seen from here"
                raise UserError(f"{reason}; use a folder that all machines share")
            time.sleep(LOOK)


def _begin() -> None:
    """Readies a process of this machine."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed stops nobody, and its runs may be resumed at once.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
