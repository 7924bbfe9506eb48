"""What a run shows while it is trained."""

from __future__ import annotations

from statistics import mean

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ssd.config import Config
from ssd.trainer import Event, Trainer

STEPS_PER_UPDATE = 10


def progress_bar(console: Console, quiet: bool) -> Progress:
    """A bar with its times; nothing where quiet or not on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )


class Display:
    """A progress bar on a terminal, else a line a task; fed by the trainer's events."""

    def __init__(self, console: Console, config: Config, quiet: bool) -> None:
        self.console, self.config = console, config
        self.progress = progress_bar(console, quiet)
        self.plain = not quiet and not console.is_terminal
        self.bar = self.progress.add_task("starting", total=None)
        self.loss = self.train = self.test = float("nan")

    def watch(self, trainer: Trainer, event: Event) -> None:
        """Takes in an event."""
        if event.kind == "epoch":
            self.loss = mean(record["loss"] for record in event.records)
            self.train = mean(record["train_accuracy"] for record in event.records)
            if "test_accuracy" in event.records[0]:
                seen = [record["test_accuracy"][: event.task + 1] for record in event.records]
                self.test = mean(map(mean, seen))
        if event.kind == "task" and self.plain:
            self.console.print(
                f"task {event.task + 1}/{self.config.tasks}: loss {self.loss:.3f}, "
                f"train accuracy {self.train:.3f}, accuracy so far {self.test:.3f}"
            )
        if event.kind == "step" and event.step % STEPS_PER_UPDATE:
            return
        steps = trainer.steps_per_epoch()
        epoch = min(event.epoch + 1, self.config.epochs)
        self.progress.update(
            self.bar,
            description=f"task {event.task + 1}/{self.config.tasks} "
            f"epoch {epoch}/{self.config.epochs} "
            f"loss {_shown(self.loss)} accuracy {_shown(self.test)}",
            completed=trainer.steps,
            total=self.config.epochs * sum(steps),
        )


def _shown(value: float) -> str:
    return "-.---" if value != value else f"{value:.3f}"


class StepDisplay:
    """A progress bar on a terminal, else a line a milestone, for work that is counted in steps."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self.console = console
        self.progress = progress_bar(console, quiet)
        self.visible = not quiet and console.is_terminal
        self.plain = not quiet and not console.is_terminal
        self.bar = self.progress.add_task("starting", total=None)

    def __enter__(self) -> StepDisplay:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, text: str, done: float, total: float, milestone: bool = False) -> None:
        """Takes in progress.

        Args:
            milestone: whether it deserves a line where there is no bar.
        """
        if milestone and self.plain:
            self.console.print(text)
        self.progress.update(self.bar, description=text, completed=done, total=total)


def progress(trainer: Trainer, event: Event) -> tuple[float, str]:
    """The share of its epochs that a trainer has done, and where it is in words."""
    config = trainer.config
    task, epoch = min(event.task + 1, config.tasks), min(event.epoch + 1, config.epochs)
    share = (trainer.task + trainer.epoch / config.epochs) / config.tasks
    return share, f" task {task}/{config.tasks} epoch {epoch}/{config.epochs}"
