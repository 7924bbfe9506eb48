"""How commands show their progress."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan
from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssd.trainer import Event, Trainer

STEPS_PER_UPDATE = 10


class Display:
    """A progress bar on a terminal, elsewhere one line per milestone.

    Args:
        console: where it appears.
        quiet: whether to show nothing.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.visible = console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.visible,
        )
        self.bar = self.progress.add_task("starting", total=None)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, text: str, done: float, total: float, milestone: bool = False) -> None:
        """Shows a text and that `done` of `total` is done; without a bar, milestones only."""
        if milestone and not (self.visible or self.quiet):
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)
        self.progress.update(self.bar, description=text, completed=done, total=total)


def position(trainer: Trainer, event: Event) -> tuple[str, int, int]:
    """A trainer's task and epoch as text, its steps so far, and all its steps."""
    config = trainer.config
    task, epoch = min(event.task + 1, config.tasks), min(event.epoch + 1, config.epochs)
    text = f"task {task}/{config.tasks} epoch {epoch}/{config.epochs}"
    return text, trainer.steps, config.epochs * sum(trainer.steps_per_epoch())


def is_due(event: Event) -> bool:
    """Whether to show an event; of the many steps only some are."""
    return event.kind != "step" or event.step % STEPS_PER_UPDATE == 0


def position_watcher(
    report: Callable[[str, int, int], None],
) -> Callable[[Trainer, Event], None]:
    """A watch, see ssd.runs.RunOptions, that reports the position every few steps."""

    def watch(trainer: Trainer, event: Event) -> None:
        if is_due(event):
            report(*position(trainer, event))

    return watch


def watcher(display: Display) -> Callable[[Trainer, Event], None]:
    """A watch, see ssd.runs.RunOptions, that shows loss and accuracy on the tasks so far."""
    loss = train = accuracy = nan

    def watch(trainer: Trainer, event: Event) -> None:
        nonlocal loss, train, accuracy
        if event.kind == "epoch":
            loss = mean(record["loss"] for record in event.records)
            train = mean(record["train_accuracy"] for record in event.records)
            if "test_accuracy" in event.records[0]:
                seen = [record["test_accuracy"][: event.task + 1] for record in event.records]
                accuracy = mean(map(mean, seen))
        if not is_due(event):
            return
        text, done, total = position(trainer, event)
        text += f" loss {_shown(loss)} accuracy {_shown(accuracy)}"
        if event.kind == "task":
            text = f"task {event.task + 1}/{trainer.config.tasks}: loss {loss:.3f}, "
            text += f"train accuracy {train:.3f}, accuracy so far {accuracy:.3f}"
        display.update(text, done, total, milestone=event.kind == "task")

    return watch


def _shown(value: float) -> str:
    return "-.---" if isnan(value) else f"{value:.3f}"
