"""What a campaign shows while its runs are trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ssd.progress import STEPS_PER_UPDATE, progress
from ssd.reproduce.campaign import Job
from ssd.trainer import Event, Trainer


class CampaignDisplay:
    """How far all runs are: a bar on a terminal, else a line a finished run."""

    def __init__(self, console: Console, work: Mapping[Job, float]) -> None:
        self.console, self.work = console, work
        self.ended = 0  # runs
        self.done, self.total = 0.0, sum(work.values())
        self.running: dict[tuple[Job, ...], float] = {}  # batches, the share done of each
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
        self.report(jobs, 0.0, "")

    def watch(self, trainer: Trainer, event: Event) -> None:
        """Takes in an event of the only batch in training."""
        if event.kind != "step" or event.step % STEPS_PER_UPDATE == 0:
            (jobs,) = self.running
            self.report(jobs, *progress(trainer, event))

    def report(self, jobs: Sequence[Job], share: float, where: str) -> None:
        """So much of a batch is done."""
        self.running[tuple(jobs)] = share
        at_once = sum(len(batch) for batch in self.running)
        first, last = self.ended + 1, self.ended + at_once
        numbers = f"run {first}" if first == last else f"runs {first} to {last}"
        self.progress.update(
            self.bar,
            description=f"{numbers} of {len(self.work)}: {jobs[0]}{where}",
            completed=self._done(),
            left=self.left(),
        )

    def end(self, jobs: Sequence[Job], summaries: Sequence[Mapping[str, Any] | None]) -> None:
        """The runs of a batch have ended, with these summaries; None for one that diverged."""
        self.running.pop(tuple(jobs), None)
        self.done += sum(self.work[job] for job in jobs)
        for job, summary in zip(jobs, summaries, strict=True):
            self.ended += 1
            if not self.console.is_terminal:
                self.console.print(
                    f"run {self.ended} of {len(self.work)}: {job}: "
                    + (f"accuracy {summary['mean_accuracy']:.4f}" if summary else "diverged")
                    + f"; {self.left()}"
                )

    def _done(self) -> float:
        shares = self.running.items()
        return self.done + sum(share * sum(self.work[job] for job in b) for b, share in shares)

    def left(self) -> str:
        """The time left, judged by the time taken."""
        done = self._done()
        if done <= 0:
            return "left -:--:--"
        seconds = round((time.perf_counter() - self.start) * (self.total - done) / done)
        return f"left {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
