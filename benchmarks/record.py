"""The CSV files of all benchmarks: a row is a measurement."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import torch

from ssd.storage.lock import file_lock
from ssd.storage.provenance import commit, installed, processor

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """A measurement. p20, p50 and p80 are None where the provider failed its correctness gate."""

    op: str
    provider: str
    mode: str  # forward | backward | full (both) | step | epoch | protocol
    dtype: str
    shape: dict[str, int]
    metric: str  # time | bandwidth | compute | memory, or a benchmark's own
    p20: float | None
    p50: float | None
    p80: float | None
    unit: str
    roofline_fraction: float | None = None
    correct: bool = True
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


COLUMNS = tuple(field.name for field in fields(Row))
NUMBERS = ("p20", "p50", "p80", "roofline_fraction")


class Writer:
    """Writes each row to a CSV file at once, so that a killed run leaves what it measured.

    Rows get device, versions, date and, unless they name another, the commit.
    """

    def __init__(self, file: TextIO, device: str) -> None:
        self.rows: list[Row] = []
        self._commit, self._file = commit(), file
        self._stamp = {
            "device": device,
            "torch": torch.__version__,
            "triton": installed("triton"),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._csv = csv.DictWriter(file, COLUMNS)
        self._csv.writeheader()

    def write(self, row: Row) -> None:
        row = replace(row, **self._stamp, commit=row.commit or self._commit)
        self.rows.append(row)
        cells = asdict(row)
        for name in NUMBERS:
            cells[name] = "" if cells[name] is None else f"{cells[name]:.6g}"
        cells["shape"] = json.dumps(row.shape, allow_nan=False)
        cells["correct"] = str(row.correct).lower()
        self._csv.writerow(cells)
        self._file.flush()


@contextmanager
def writing(path: Path, device: str) -> Iterator[Writer]:
    """A writer of a new file at `path`.

    Raises:
        UserError: another process writes the file. OSError: it cannot be written.
    """
    with file_lock(path), path.open("w", newline="", encoding="utf-8") as file:
        yield Writer(file, device)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; ValueError if its columns are not those of this schema."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: columns {lines.fieldnames} are not {list(COLUMNS)}")
        return [_row(line) for line in lines]


def _row(line: Mapping[str, str]) -> Row:
    parsed: dict[str, Any] = dict(line)
    parsed |= {name: float(line[name]) if line[name] else None for name in NUMBERS}
    parsed |= {"shape": json.loads(line["shape"]), "correct": line["correct"] == "true"}
    return Row(**parsed)


def find(
    rows: Iterable[Row],
    provider: str,
    metric: str = "time",
    sizes: Mapping[str, int] | None = None,
    **cells: Any,
) -> Row | None:
    """The first correct row that has these cells, and these sizes in its shape."""
    for row in rows:
        wanted = {"provider": provider, "metric": metric, "correct": True, **cells}
        there = all(getattr(row, name) == cell for name, cell in wanted.items())
        if there and row.p50 is not None and (sizes or {}).items() <= row.shape.items():
            return row
    return None


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU: {processor()}, threads: {torch.get_num_threads()}"


def results_folder(device: torch.device) -> Path:
    """benchmarks/results/<gpu>, or benchmarks/results/cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_path(given: Path | None, quick: bool, device: torch.device, name: str) -> Path:
    """Where a benchmark writes: `given`, a temporary file if quick, or the kept file."""
    if given is not None:
        return given
    folder = Path(tempfile.mkdtemp()) if quick else results_folder(device)
    return folder / f"{name}.csv"
