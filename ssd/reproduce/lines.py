"""Lines of a reproduction's tables: a row with the runs that exist of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from ssd.config import Config
from ssd.metrics import estimate
from ssd.reproduce.experiments import Row
from ssd.storage.run_folder import FREQUENCY

NOT_RUN = "not run"
DIGITS = {"seconds": 1, "mean_active": 1, "effective_rank": 1}  # all else: 4


@dataclass(frozen=True)
class Line:
    """A row with what has been measured of it.

    Args:
        summaries: of the seeds that were run. missing: why others were not; empty if all were.
        folders: where each of those runs lies.
    """

    row: Row
    summaries: Sequence[Mapping[str, Any]]
    missing: str = ""
    folders: Sequence[Path] = ()

    @property
    def note(self) -> str:
        """What the table says beside the figures."""
        return "; ".join(text for text in (self.row.note, self.missing) if text)

    def per_task(self, measure: str) -> list[list[float]]:
        """A measure of each run that has it, one value a task; a scalar is a list of one."""
        found = (_measured(summary, measure) for summary in self.summaries)
        return [values for values in found if values]

    def values(self, measure: str) -> list[float]:
        """A measure of each run that has it, lists over tasks averaged."""
        return [mean(values) for values in self.per_task(measure)]

    def frequencies(self) -> dict[int, tuple[Path, Config]]:
        """What read_frequency takes for each run that has its activation frequency, by its seed."""
        found = zip(self.summaries, self.folders, strict=False)
        return {
            summary["seed"]: (folder, self.row.config)
            for summary, folder in found
            if (folder / FREQUENCY).is_file()
        }

    def by_seed(self, measure: str) -> dict[int, float]:
        """What values() gives, by the seed of the run."""
        found = ((summary["seed"], _measured(summary, measure)) for summary in self.summaries)
        return {seed: mean(values) for seed, values in found if values}


def seconds(summary: Mapping[str, Any]) -> float:
    """A run's part of the time of all that were trained side by side with it."""
    return summary["seconds"] / summary.get("trained_together", 1)


def _measured(summary: Mapping[str, Any], measure: str) -> list[float]:
    if measure == "seconds":
        return [seconds(summary)]
    value = summary.get("structure", {}).get(measure, summary.get(measure))
    values = value if isinstance(value, list) else [value]
    # The first task has nothing to be compared with.
    return [v for v in values if v is not None]


def shown(measure: str, values: Sequence[float]) -> str:
    """`mean ± standard error`; empty without values."""
    if not values:
        return ""
    center, error = estimate(values)
    digits = DIGITS.get(measure, 4)
    text = f"{center:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"
