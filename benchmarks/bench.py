"""What the benchmark commands share: options, the device, and a file for the rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import record
from benchmarks.timing import Quantiles
from ssd.cli import ArgumentParser
from ssd.storage.provenance import commit


@dataclass(frozen=True)
class Bench:
    """A run of a command.

    Args:
        options: --quick, --out and the command's own.
        title: device and versions; says so if there is no GPU.
        path: of the CSV file that `writer` writes.
    """

    options: argparse.Namespace
    device: torch.device
    title: str
    path: Path
    console: Console
    writer: record.Writer

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def write(
        self, case: Sequence[Any], metric: str, figure: Quantiles | None, unit: str, **cells: Any
    ) -> None:
        """Writes a row of the CSV file.

        Args:
            case: op, provider, mode, dtype and sizes, as in record.Row.
            figure: None: the provider is wrong or raises.
            cells: others of the row.
        """
        quantiles = figure or (None, None, None)
        self.writer.write(
            record.Row(*case, metric, *quantiles, unit, correct=figure is not None, **cells)
        )


def parser(about: str | None, quick: str) -> ArgumentParser:
    """The options of all benchmarks; the first line of `about` describes the command."""
    made = ArgumentParser(description=(about or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help=f"{quick}, into a temporary file")
    made.add_argument("--out", type=Path, help="CSV file (default: in benchmarks/results/<device>)")
    return made


@contextmanager
def running(command: str, options: argparse.Namespace) -> Iterator[Bench]:
    """Opens the file of the rows; prints the device first and the file's path at the end."""
    torch.set_float32_matmul_precision("highest")  # fp32 baselines are IEEE, as the kernels are
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = record.device_name(device)
    title = f"{name}; torch {torch.__version__}; commit {commit()}"
    if device.type != "cuda":
        title = f"CPU FIGURES, no GPU was used: {title}"
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(f"[bold]{title}[/bold]")
    path = record.results_path(options.out, options.quick, device, command)
    with record.writing(path, name) as writer:
        try:
            yield Bench(options, device, title, path, console, writer)
        finally:
            console.print(f"rows: {path}")
