"""Measures `python -m ssd.train --dataset mnist` from start to exit: alone, and two at once.

python benchmarks/command_bench.py          # three of each, about ten minutes
python benchmarks/command_bench.py --quick  # one of each, short: does everything run
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import bench
from benchmarks.record import ROOT
from benchmarks.timing import quantiles
from ssd.cli import exit_status
from ssd.data import default_root

RUNS = 3
TARGET = 30.0  # seconds on 2 CPU cores
AT_ONCE = 2  # processes that share the cores
SLOWER = 2.3  # times at most, the target for them
QUICK = ("--dataset", "mnist-5k", "--epochs", "1")


def seconds(arguments: tuple[str, ...], at_once: int = 1) -> float:
    """Wall time until so many equal runs have ended; SystemExit if one fails."""
    root = ["--data-root", str(default_root().resolve())]
    command = [sys.executable, "-m", "ssd.train", *root, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        start, runs = time.perf_counter(), []
        for _ in range(at_once):
            process = subprocess.Popen(
                command,
                cwd=tempfile.mkdtemp(dir=folder),
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                encoding="utf-8",
                errors="replace",
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            runs.append(process)
        said = [run.communicate()[1] for run in runs]
        taken = time.perf_counter() - start
    for run, errors in zip(runs, said, strict=True):
        if run.returncode:
            raise SystemExit(f"command_bench: {' '.join(arguments)} failed: {errors.strip()}")
    return taken


def main() -> None:
    options = bench.parser(__doc__, "one short run of each").parse_args()
    arguments = QUICK if options.quick else ("--dataset", "mnist")
    count = 1 if options.quick else RUNS
    times: dict[int, list[float]] = {1: [], AT_ONCE: []}
    with bench.running("command_bench", options) as run:
        for _ in track(range(count), "whole command"):
            for at_once, taken in times.items():
                taken.append(1e3 * seconds(arguments, at_once))
        for at_once, taken in times.items():
            found, shape = quantiles(taken), {"runs": count, "at once": at_once}
            case = "ssd.train", " ".join(arguments), "full", "float32", shape
            run.write(case, "time", found, "ms")
            low, middle, high = (ms / 1e3 for ms in found)
            run.console.print(
                f"{at_once} at once: median {middle:.1f} s, p20 {low:.1f}, p80 {high:.1f}"
            )
    alone, together = (quantiles(taken).p50 for taken in times.values())
    run.console.print(f"{AT_ONCE} at once take {together / alone:.2f} times one")
    if options.quick:
        return
    for what, met in (
        (f"alone at most {TARGET:.0f} s on a CPU", alone <= 1e3 * TARGET),
        (f"{AT_ONCE} at once at most {SLOWER} times one", together <= SLOWER * alone),
    ):
        run.console.print(f"target: {what}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
