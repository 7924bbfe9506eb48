"""The one CSV schema of every benchmark in this project: one row a measurement."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ssd.storage.lock import file_lock

ROOT = Path(__file__).resolve().parents[1]
MODES = ("forward", "backward", "full", "step", "epoch", "protocol")


@dataclass(frozen=True)
class Row:
    """One measurement. The figures are None where the provider failed its correctness gate."""

    op: str
    provider: str
    mode: str  # one of MODES; full is forward + backward
    dtype: str
    shape: dict[str, int]
    metric: str  # time | bandwidth | compute | memory, or a name of the benchmark's own
    p20: float | None
    p50: float | None
    p80: float | None
    unit: str
    roofline_fraction: float | None
    correct: bool
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Row: mode={self.mode!r} is not one of {', '.join(MODES)}")


COLUMNS = tuple(field.name for field in fields(Row))
NUMBERS = ("p20", "p50", "p80", "roofline_fraction")


class Writer:
    """Writes rows to a CSV file as they come, so that a killed run leaves what it had.

    Each row is stamped with device, torch, triton, date and, if it names none, the commit. Use as a
    context manager.

    Raises:
        UserError: another process writes the file. OSError: it cannot be written.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.stamp: dict[str, Any] = {
            "device": device,
            "torch": torch.__version__,
            "triton": installed("triton"),
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.rows: list[Row] = []
        with ExitStack() as held:
            held.enter_context(file_lock(path))
            self._file = held.enter_context(path.open("w", newline="", encoding="utf-8"))
            self._held = held.pop_all()
        self._csv = csv.writer(self._file)
        self._csv.writerow(COLUMNS)

    def write(self, row: Row) -> None:
        row = replace(row, **self.stamp | ({"commit": row.commit} if row.commit else {}))
        self.rows.append(row)
        self._csv.writerow(_cells(row))
        self._file.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; ValueError if its columns are not this schema's."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: columns {lines.fieldnames} are not {list(COLUMNS)}")
        return [_row(line) for line in lines]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's as the operating system gives it and the cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), re.M)
        name = found[1].strip() if found else name
    return f"CPU: {name}, threads: {torch.get_num_threads()}"


def results_folder(device: torch.device) -> Path:
    """benchmarks/results/<gpu>, or benchmarks/results/cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_path(given: Path | None, quick: bool, device: torch.device, name: str) -> Path:
    """Where a benchmark writes: as asked, for a quick try a temporary file, else the kept file."""
    if given is not None:
        return given
    folder = Path(tempfile.mkdtemp()) if quick else results_folder(device)
    return folder / f"{name}.csv"


def installed(package: str) -> str:
    """The version of an installed package, or an empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit(checkout: Path = ROOT) -> str:
    """The commit of a checkout, '-dirty' if changed; GIT_COMMIT, where that is set, is ours."""
    if checkout == ROOT and (given := os.environ.get("GIT_COMMIT")):
        return given
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        return done.stdout.decode(errors="replace").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cells(row: Row) -> list[str]:
    cells = asdict(row) | {
        "shape": json.dumps(row.shape, allow_nan=False),
        "correct": str(row.correct).lower(),
    }
    for name in NUMBERS:
        cells[name] = "" if cells[name] is None else f"{cells[name]:.6g}"
    return [cells[name] for name in COLUMNS]


def _row(line: Mapping[str, str]) -> Row:
    parsed: dict[str, Any] = dict(line)
    parsed |= {name: float(line[name]) if line[name] else None for name in NUMBERS}
    parsed |= {"shape": json.loads(line["shape"]), "correct": line["correct"] == "true"}
    return Row(**parsed)
