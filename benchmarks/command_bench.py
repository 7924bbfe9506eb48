"""The whole of `python -m ssd.train --dataset mnist`, start to exit: alone, and two at once.

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

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import record
from ssd.cli import ArgumentParser, exit_status
from ssd.data import default_root

RUNS = 3
TARGET = 30.0  # seconds on 2 CPU cores
AT_ONCE = 2  # processes that share the cores
SLOWER = 2.3  # times at most, the target for them
QUICK = ("--dataset", "mnist-5k", "--epochs", "1")


def seconds(arguments: tuple[str, ...], at_once: int = 1) -> float:
    """Wall time until so many equal runs have ended, each in an empty folder of its own.

    SystemExit if one fails.
    """
    command = [sys.executable, "-m", "ssd.train", "--data-root", str(default_root().resolve())]
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        start, runs = time.perf_counter(), []
        for number in range(at_once):
            own = Path(folder, str(number))
            own.mkdir()
            runs.append(
                subprocess.Popen(
                    [*command, *arguments], cwd=own, env=environment, encoding="utf-8",
                    errors="replace", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        said = [run.communicate()[1] for run in runs]
        took = time.perf_counter() - start
    for run, errors in zip(runs, said, strict=True):
        if run.returncode:
            raise SystemExit(f"command_bench: {' '.join(arguments)} failed: {errors.strip()}")
    return took


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/<device>)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = record.results_path(options.out, options.quick, device, "command_bench")
    arguments = QUICK if options.quick else ("--dataset", "mnist")
    count = 1 if options.quick else RUNS
    times: dict[int, list[float]] = {1: [], AT_ONCE: []}
    console, medians = Console(), {}
    with record.Writer(path, record.device_name(device)) as writer:
        for _ in track(range(count), "whole command"):
            for at_once, taken in times.items():
                taken.append(seconds(arguments, at_once))
        for at_once, taken in times.items():
            low, middle, high = map(float, np.percentile(taken, [20, 50, 80]))
            medians[at_once] = middle
            writer.write(
                record.Row(
                    "ssd.train", " ".join(arguments), "full", "float32",
                    {"runs": count, "at once": at_once}, "time",
                    1e3 * low, 1e3 * middle, 1e3 * high, "ms", None, True,
                )
            )  # fmt: skip
            console.print(
                f"{at_once} at once: median {middle:.1f} s, p20 {low:.1f}, p80 {high:.1f}"
            )
    ratio = medians[AT_ONCE] / medians[1]
    console.print(f"{AT_ONCE} at once take {ratio:.2f} times one")
    if not options.quick:
        for what, met in (
            (f"alone at most {TARGET:.0f} s on a CPU", medians[1] <= TARGET),
            (f"{AT_ONCE} at once at most {SLOWER} times one", ratio <= SLOWER),
        ):
            console.print(f"target: {what}: {'met' if met else 'missed'}")
    console.print(f"rows: {path}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
