"""What a campaign shows while its runs are trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ssd.campaign import Job
from ssd.display import STEPS_PER_UPDATE
from ssd.trainer import Event, Trainer


class CampaignDisplay:
    """How far all runs are: a bar on a terminal, else a line a finished run."""

    def __init__(self, console: Console, work: Mapping[Job, float]) -> None:
        self.console, self.work = console, work
        self.ended = 0  # runs
        self.done, self.total = 0.0, sum(work.values())
        self.jobs: Sequence[Job] = ()  # in training
        self.start = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar = self.progress.add_task("starting", total=self.total, left="")

    def begin(self, jobs: Sequence[Job]) -> None:
        """The runs of a batch begin."""
        self.jobs = jobs
        self._update(0.0, "")

    def watch(self, trainer: Trainer, event: Event) -> None:
        """Takes in an event of the runs in training."""
        if event.kind == "step" and event.step % STEPS_PER_UPDATE:
            return
        config = trainer.config
        task, epoch = min(event.task + 1, config.tasks), min(event.epoch + 1, config.epochs)
        share = (trainer.task + trainer.epoch / config.epochs) / config.tasks
        self._update(share, f" task {task}/{config.tasks} epoch {epoch}/{config.epochs}")

    def end(self, summaries: Sequence[Mapping[str, Any]]) -> None:
        """The runs of the batch have ended, with these summaries."""
        self.done += sum(self.work[job] for job in self.jobs)
        jobs, self.jobs = self.jobs, ()
        for job, summary in zip(jobs, summaries, strict=True):
            self.ended += 1
            if not self.console.is_terminal:
                self.console.print(
                    f"run {self.ended} of {len(self.work)}: {job}: "
                    f"accuracy {summary['mean_accuracy']:.4f}; {self.left(0.0)}"
                )

    def left(self, share: float) -> str:
        """The time left, judged by the time taken, when this share of the batch is done."""
        done = self.done + share * sum(self.work[job] for job in self.jobs)
        if done <= 0:
            return "left -:--:--"
        seconds = round((time.perf_counter() - self.start) * (self.total - done) / done)
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

    def _update(self, share: float, where: str) -> None:
        first, last = self.ended + 1, self.ended + len(self.jobs)
        numbers = f"run {first}" if first == last else f"runs {first} to {last}"
        self.progress.update(
            self.bar,
            description=f"{numbers} of {len(self.work)}: {self.jobs[0]}{where}",
            completed=self.done + share * sum(self.work[job] for job in self.jobs),
            left=self.left(share),
        )
