"""The whole of `python -m ssd.train --dataset mnist`: a process of its own, start to exit.

python benchmarks/command_bench.py          # three runs, about a minute each
python benchmarks/command_bench.py --quick  # one short run: does everything run
"""

from __future__ import annotations

import argparse
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
from ssd.data import default_root

RUNS = 3
TARGET = 60.0  # seconds on 2 CPU cores
QUICK = ("--dataset", "mnist-5k", "--epochs", "1")


def seconds(arguments: tuple[str, ...]) -> float:
    """Wall time of one run in an empty folder; SystemExit if it fails."""
    command = [sys.executable, "-m", "ssd.train", "--data-root", str(default_root().resolve())]
    environment = {**os.environ, "PYTHONPATH": str(record.ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *arguments], cwd=folder, capture_output=True, text=True, env=environment
        )
        took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"command_bench: {' '.join(arguments)} failed: {done.stderr.strip()}")
    return took


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run")
    parser.add_argument("--out", type=Path, help="CSV file (default benchmarks/results/<device>)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.out or record.results_folder(device) / "command_bench.csv"
    arguments = QUICK if options.quick else ("--dataset", "mnist")
    count = 1 if options.quick else RUNS
    times = [seconds(arguments) for _ in track(range(count), "whole command")]
    low, middle, high = map(float, np.percentile(times, [20, 50, 80]))
    with record.Writer(path, record.device_name(device)) as writer:
        writer.write(
            record.Row(
                "ssd.train", " ".join(arguments), "full", "float32", {"runs": count}, "time",
                1e3 * low, 1e3 * middle, 1e3 * high, "ms", None, True,
            )
        )  # fmt: skip
    verdict = "met" if middle <= TARGET else "missed"
    Console().print(
        f"median {middle:.1f} s, p20 {low:.1f}, p80 {high:.1f}, {count} runs"
        + ("" if options.quick else f"; target on a CPU {TARGET:.0f} s: {verdict}")
        + f"\nrows: {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
