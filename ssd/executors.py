"""Executors for studies that one machine is too small for: a Ray cluster, or Slurm by submitit.

`EXECUTORS` has a row for each. A new one is a function that returns a `concurrent.futures.Executor`
and a row; a job of its that dies must raise `BrokenExecutor`.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ssd.errors import Interrupted, UserError, one_line

HERE = "processes"
POLL = 0.5  # seconds; submitit itself asks Slurm more and more rarely
MINUTES = 240  # of a Slurm job; submitit's default is 5
UNTOLD = "Job not requeued"  # how submitit begins to say that a job may not go on
TIMES = 100  # a job may reach its time limit, since it gets further each time


class RayExecutor(Executor):
    """Runs calls as tasks of a Ray cluster, which repeats those whose worker dies.

    Args:
        options: of `ray.remote`, as {"num_cpus": 2}.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        import ray

        self._task = cache(ray.remote(**options) if options else ray.remote)
        self._task(_nothing)  # refuses what it does not know
        self._ray, self._begun = ray, not ray.is_initialized()
        if self._begun:
            ray.init(logging_level=logging.WARNING)
        self._futures: set[Future[Any]] = set()

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        errors, result = self._ray.exceptions, Future[Any]()
        result.set_running_or_notify_cancel()  # Ray does not say which tasks wait

        def settle(done: Future[Any]) -> None:
            self._futures.discard(done)
            error = done.exception()
            if error is None:
                result.set_result(done.result())
                return
            raised = isinstance(error, errors.RayTaskError)  # by the call itself
            if isinstance(error, errors.RayError) and not raised:
                error = BrokenExecutor(one_line(error))
            result.set_exception(error)

        done = self._task(function).remote(*args, **named).future()
        self._futures.add(done)  # keeps the task's result alive
        done.add_done_callback(settle)
        return result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while wait and self._futures:
            time.sleep(POLL)
        if self._begun and self._ray.is_initialized():
            self._ray.shutdown()


class SubmititExecutor(Executor):
    """Runs calls as jobs of a Slurm cluster, which go on after preemption and time limits.

    Args:
        folder: of submitit's files.
        cluster: "slurm", or "local" for processes of this machine.
        options: of `submitit.AutoExecutor.update_parameters`.
    """

    def __init__(self, folder: Path, cluster: str, options: Mapping[str, Any]) -> None:
        import submitit

        again = {"slurm_max_num_timeout": TIMES}
        self._executor = submitit.AutoExecutor(folder, cluster=cluster, **again)
        self._executor.update_parameters(**options)
        self._errors = submitit.core.utils
        self._jobs: dict[Future[Any], Any] = {}
        self._closed, self._waits = threading.Event(), True
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        # Jobs of this machine would get the Ctrl-C of a terminal, too.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            job = self._executor.submit(_Repeatable(function), *args, **named)
        except self._errors.FailedJobError as error:
            raise UserError(f"Slurm refuses the job ({one_line(error)}); see --job") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        future = Future[Any]()
        self._jobs[future] = job
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for future in list(self._jobs) if cancel_futures else ():
            future.cancel()
        self._waits = wait
        self._closed.set()
        self._watcher.join(None if wait else 2 * POLL)
        for job in list(self._jobs.values()) if cancel_futures else ():
            with suppress(OSError):
                job.cancel(check=False)

    def _watch(self) -> None:
        """Brings futures to the state of their jobs, until the executor is shut down."""
        closed = False
        while not closed or (self._waits and self._jobs):
            closed = self._closed.wait(POLL)
            if closed and self._waits:
                time.sleep(POLL)
            for future, job in self._jobs.copy().items():
                # Files of another machine may be gone for a moment, or Slurm not answer.
                with suppress(OSError, subprocess.SubprocessError):
                    self._settle(future, job)

    def _settle(self, future: Future[Any], job: Any) -> None:
        if not future.cancelled():
            done = job.done()
            # Slurm is asked for the state but rarely; a job that has begun has a log.
            if not done and job.state != "RUNNING" and not job.paths.stdout.exists():
                return
            if future.running() or future.set_running_or_notify_cancel():
                if done:
                    self._end(future, job)
                    del self._jobs[future]
                return
        else:
            future.set_running_or_notify_cancel()  # tells those who wait for it
        del self._jobs[future]
        job.cancel(check=False)

    def _end(self, future: Future[Any], job: Any) -> None:
        try:
            future.set_result(job.result())
        except (OSError, subprocess.SubprocessError):
            raise  # to be tried again
        except Exception as error:
            raised = isinstance(error, self._errors.FailedJobError) and UNTOLD not in str(error)
            future.set_exception(error if raised else BrokenExecutor(one_line(error)))


def _nothing() -> None:
    pass


class _Repeatable:
    """A call that submitit may repeat on another machine: whatever it did so far, it finds."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)

    def checkpoint(self, *args: Any, **named: Any) -> Any:
        """What submitit queues again after a preemption or a time limit."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args, **named)


def _ray(options: Mapping[str, Any], folder: Path, device: torch.device) -> Executor:
    return RayExecutor({"num_gpus": 1, **options} if device.type == "cuda" else options)


def _slurm(options: Mapping[str, Any], folder: Path, device: torch.device) -> Executor:
    # Some clusters queue again only jobs that allow it.
    again = {"slurm_additional_parameters": {"requeue": True}}
    given = {"timeout_min": MINUTES, **again, **options}
    if device.type == "cuda":
        given.setdefault("gpus_per_node", 1)
    return SubmititExecutor(folder / "slurm", given.pop("cluster", "slurm"), given)


# Name -> what makes it, and the package that it needs.
EXECUTORS: Mapping[str, tuple[Callable[[Mapping[str, Any], Path, torch.device], Executor], str]] = {
    "ray": (_ray, "ray"),
    "slurm": (_slurm, "submitit"),
}


def executor_maker(
    name: str, asked: Sequence[str]
) -> Callable[[Path, torch.device], AbstractContextManager[Executor | None]]:
    """What makes the executor of a study, given its folder and where each job trains.

    Args:
        name: "processes", for which it makes None: the study starts them itself; or of EXECUTORS.
        asked: "KEY=VALUE" in the words of Ray's `remote` or of submitit, a number where it is one.

    Raises:
        UserError: no such executor, its package is absent, or an option is not KEY=VALUE. From
            what is returned: the executor refuses.
    """
    if name == HERE:
        if asked:
            raise UserError(f"--job {asked[0]} needs --on {' or '.join(EXECUTORS)}")
        return lambda folder, device: nullcontext()
    if name not in EXECUTORS:
        raise UserError(f"--on {name} is unknown; choose from {', '.join([HERE, *EXECUTORS])}")
    make, package = EXECUTORS[name]
    if find_spec(package) is None:
        raise UserError(f'--on {name} needs {package}: pip install "ssd-kernels[{name}]"')
    options = dict(map(_option, asked))

    @contextmanager
    def made(folder: Path, device: torch.device) -> Iterator[Executor]:
        try:
            executor = make(options, folder, device)
        except Exception as error:
            raise UserError(f"--on {name}: {one_line(error)}") from error
        try:
            yield executor
        finally:  # a study waits for its jobs itself, unless it is interrupted twice
            executor.shutdown(wait=False, cancel_futures=True)

    return made


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What a call returns or what stopped it: not every executor keeps the type of an exception."""
    try:
        return function(*args)
    except (UserError, Interrupted, OSError) as error:
        return error


def result_of(job: Future[Any], what: str) -> Any:
    """What an attempt in a job returned; raises what stopped it.

    Args:
        job: submitted as `attempt`.
        what: it worked on.

    Raises:
        UserError: its worker died.
    """
    try:
        result = job.result()
    except BrokenExecutor as broken:
        reason = f"a worker died while it worked on {what} ({one_line(broken)})"
        raise UserError(f"{reason}; the same command goes on with what it had saved") from broken
    if isinstance(result, Exception):
        raise result
    return result


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise UserError(f"--job {text} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
