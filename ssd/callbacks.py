"""Callbacks that log to TensorBoard and to Weights & Biases.

    ssd.run("mnist", method="ssd+ewc", seeds=3, callbacks=[TensorBoard("runs")])

With a Trainer of your own:

    with TensorBoard("runs") as log:
        for event in trainer.run():
            log(trainer, event)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ssd.learner import Learner
from ssd.trainer import Event, Trainer


def scalars(trainer: Trainer, event: Event) -> list[dict[str, float]]:
    """What there is to log of an event, {name: value}, one per learner.

    Of an epoch: loss, train_accuracy and, where it was measured, test_accuracy/task_i and
    gradient_norm/term. Of a task: mean_accuracy, on the test sets of the tasks so far.
    """
    if event.kind == "task":
        done = event.task + 1
        return [
            {"mean_accuracy": learner.accuracy[event.task, :done].mean().item()}
            for learner in trainer.learners
        ]
    return [dict(_flat(record)) for record in event.records]


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    yield from ((name, record[name]) for name in ("loss", "train_accuracy"))
    for task, accuracy in enumerate(record.get("test_accuracy", ())):
        yield f"test_accuracy/task_{task}", accuracy
    for term, norm in record.get("gradient_norms", {}).items():
        yield f"gradient_norm/{term}", norm


class Logger(ABC):
    """A callback that logs each learner to a run of its own; the x axis is the number of steps.

    To leave it as a context manager ends the runs; ssd.run does so.
    """

    def __init__(self) -> None:
        self.runs: list[Any] = []

    @abstractmethod
    def begin(self, learner: Learner, step: int) -> Any:
        """A run, of which whatever is logged at `step` or later will be logged anew."""

    @abstractmethod
    def log(self, run: Any, values: Mapping[str, float], step: int) -> None:
        """Logs the values of one learner."""

    @abstractmethod
    def end(self, run: Any, failed: bool) -> None:
        """Ends a run."""

    def __call__(self, trainer: Trainer, event: Event) -> None:
        if not self.runs:
            # The last epoch before a task's end has the same step, and does not come again.
            step = trainer.steps + (event.kind == "task")
            for learner in trainer.learners:
                self.runs.append(self.begin(learner, step))
        if event.kind != "step":
            for run, values in zip(self.runs, scalars(trainer, event), strict=True):
                self.log(run, values, trainer.steps)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        while self.runs:
            self.end(self.runs.pop(0), failed=kind is not None)


class TensorBoard(Logger):
    """Logs to event files of TensorBoard, in one folder a seed.

    A training that goes on after an interruption does so in the same folders.

    Args:
        folder: of all seeds.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        _installed("tensorboard", "tensorboard")
        self.folder = Path(folder)

    def begin(self, learner: Learner, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder / f"seed{learner.config.seed}", purge_step=step)

    def log(self, run: Any, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            run.add_scalar(name, value, step)

    def end(self, run: Any, failed: bool) -> None:
        run.close()


class WandB(Logger):
    """Logs to Weights & Biases, a run a seed, grouped by method.

    A training that goes on after an interruption does so in new runs.

    Args:
        project: its name there.
        init: further arguments of wandb.init, for instance mode="offline"; they come before ours.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, **init: Any) -> None:
        super().__init__()
        self.wandb = _installed("wandb", "wandb")
        self.init = {"project": project, **init}

    def begin(self, learner: Learner, step: int) -> Any:
        config = learner.config
        own = {"group": config.method, "name": f"seed{config.seed}", "config": config.to_dict()}
        # A run of another seed would else end this one.
        return self.wandb.init(**{**own, "reinit": "create_new", **self.init})

    def log(self, run: Any, values: Mapping[str, float], step: int) -> None:
        run.log(values, step=step)

    def end(self, run: Any, failed: bool) -> None:
        run.finish(exit_code=int(failed))


def _installed(module: str, extra: str) -> Any:
    """A module; ImportError with what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'ssd.callbacks cannot import {module} ({error}); pip install "ssd-kernels[{extra}]"'
        ) from error
