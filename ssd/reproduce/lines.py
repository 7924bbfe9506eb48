"""Lines of a reproduction's tables: rows with those of their runs that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from ssd import metrics
from ssd.data import Dataset
from ssd.distillation import select_subnetwork
from ssd.peers import learners as peers
from ssd.reproduce.experiments import Row
from ssd.storage.run_folder import FREQUENCY, read_frequency
from ssd.study import Evaluation, Run, measured

NOT_RUN = "not run"


@dataclass(frozen=True)
class Line:
    """A row with what was measured of it.

    Args:
        row: what was to be run.
        summaries: of the seeds that were run.
        missing: why other seeds were not; empty if all were.
        folders: of the runs in summaries.
    """

    row: Row
    summaries: Sequence[Mapping[str, Any]]
    missing: str = ""
    folders: Sequence[Path] = ()

    @property
    def note(self) -> str:
        """The text beside the figures in the table."""
        return "; ".join(text for text in (self.row.note, self.missing) if text)

    def per_task(self, measure: str) -> list[list[float]]:
        """A measure of each run that has it, one value per task; one value for a scalar."""
        found = (measured(summary, measure) for summary in self.summaries)
        return [values for values in found if values]

    def by_seed(self, measure: str) -> dict[int, float]:
        """Seed -> a measure of each run that has it, the mean for a list over tasks."""
        found = ((summary["seed"], measured(summary, measure)) for summary in self.summaries)
        return {seed: mean(values) for seed, values in found if values}

    def values(self, measure: str) -> list[float]:
        """The values of by_seed()."""
        return list(self.by_seed(measure).values())

    def recorded(self) -> dict[int, Path]:
        """Seed -> folder of each run that has its activation frequency."""
        found = zip(self.summaries, self.folders, strict=False)
        return {s["seed"]: folder for s, folder in found if (folder / FREQUENCY).is_file()}


def runs_of(row: Row, data: Dataset, root: Path) -> list[Run]:
    """The runs of a row on its benchmark's data, one per seed; root: folder of all runs."""
    size = f"R={row.neurons}" if row.neurons else ""
    changed = f"{row.factor}={row.value}" if row.value else ""
    name = " ".join(filter(None, [row.benchmark.name, row.method, size, changed]))
    runs = []
    for seed in row.seeds:
        config, evaluation = replace(row.config, seed=seed), None
        if row.peer is not None:
            given = {"classes": data.classes, "neurons": row.neurons, "config": config}
            evaluation = Evaluation(
                row.method,
                partial(row.peer.evaluate, **given, **row.settings),
                row.neurons,
                row.settings,
                peers.ALGORITHM,
                trains=bool(row.peer.method),
            )
        runs.append(Run(f"{name} seed {seed}", config, data, root, evaluation))
    return runs


def line_of(row: Row, runs: Sequence[Run], left_out: bool) -> Line:
    """A row with what its runs came to; left_out: whether --only excludes it from training."""
    outcomes = {run: outcome for run in runs if (outcome := run.outcome()) is not None}
    found = {
        run: _with_structure(run, outcome)
        for run, outcome in outcomes.items()
        if "diverged" not in outcome
    }
    missing = ""
    if diverged := len(outcomes) - len(found):
        missing = f"{diverged} of {len(runs)} seeds diverged"
    elif len(found) < len(runs):
        why = " (left out by --only)" if left_out else ""
        missing = f"{len(runs) - len(found)} of {len(runs)} seeds {NOT_RUN}{why}"
    return Line(row, tuple(found.values()), missing, tuple(run.folder for run in found))


def _with_structure(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with the structure of the run's code, as far as its frequency shows it."""
    if "structure" in summary or not (run.folder / FREQUENCY).is_file():
        return summary
    frequency = torch.from_numpy(read_frequency(run.folder, run.config))
    size = max(1, round(run.config.subnetwork * run.config.k))
    return {**summary, "structure": overlaps(frequency, size)}


def overlaps(frequency: Tensor, size: int) -> dict[str, list[float | None]]:
    """How each task's code differs from that of the task before; None for the first task.

    Args:
        frequency: [T, R] activation frequency.
        size: n, neurons of the subnetwork.

    Returns:
        jaccard of the subnetworks and kl_bits of the frequencies, as in ssd.structure.compare.
    """
    chosen = [select_subnetwork(row, size) for row in frequency]
    return {
        "jaccard": [None, *(metrics.jaccard(now, was) for was, now in pairwise(chosen))],
        "kl_bits": [None, *(metrics.kl_divergence(now, was) for was, now in pairwise(frequency))],
    }
