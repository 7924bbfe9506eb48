"""Kills runs with SIGKILL at random moments, resumes them, and compares what they end with.

    python tests/kill_resume.py --kills 20 [--seed 0]

Exit status 0 if every killed and resumed run ends bit-identical to one that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

EXACT = ("accuracy_matrix.csv", "activation_frequency.npy", "metrics.jsonl")
TIMED = ("seconds", "steps_per_second")
KILLS_PER_RUN = 4
# Python and PyTorch take longer to start than the run takes: most kills shall hit the run.
START_SHARE = 0.2
ROOT = Path(__file__).resolve().parents[1]
# One thread: several processes share a small machine.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_features(path: Path, samples: int = 600, features: int = 16, classes: int = 4) -> None:
    """A small data set of noisy classes."""
    generator = np.random.default_rng(0)
    centers = generator.random((classes, features))
    arrays = {}
    for part, count in (("train", samples), ("test", samples // 3)):
        labels = np.arange(count) % classes
        noise = 0.3 * generator.standard_normal((count, features))
        arrays[f"x_{part}"] = (centers[labels] + noise).astype(np.float32)
        arrays[f"y_{part}"] = labels.astype(np.uint8)
    np.savez(path, **arrays)


class Killed(BaseException):
    """What nothing catches."""


def crash_at_every_write(patch: pytest.MonkeyPatch, work: Callable[[], object], files: int) -> int:
    """Crashes before and after each replacement of a file until `work`, which resumes, ends.

    Args:
        files: more than work replaces between two checkpoints, and odd: then each is hit both ways.

    Returns:
        The number of crashes.
    """
    replace_file, crashes, left = os.replace, 0, 1

    def crash(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left > 0 or crashes % 2:
            replace_file(source, target)
        if left == 0:
            raise Killed

    patch.setattr(os, "replace", crash)
    while True:
        try:
            work()
            return crashes
        except Killed:
            crashes += 1
            left = 1 + crashes % files


def command(features: Path, out: Path) -> list[str]:
    """A run that is long enough to be hit and writes a checkpoint in most of its moments."""
    return [
        *(sys.executable, "-m", "ssd.train", "--dataset", "features", "--features", str(features)),
        *("--tasks", "2", "--neurons", "64", "-k", "4", "--anneal-samples", "2000"),
        *("--epochs", "10", "--batch-size", "32", "--eval-every", "2", "--method", "ssd+ewc"),
        *("--device", "cpu", "--checkpoint-every", "0.01", "--quiet", "--out", str(out)),
    ]


def start_and_kill(arguments: list[str], out: Path, training: bool, moment: float) -> int | None:
    """Runs a command and kills it; its exit status if it ended before.

    Args:
        training: count the moment from the first checkpoint, otherwise from the start.
        moment: seconds.
    """
    before = checkpoint_time(out)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while training and process.poll() is None and checkpoint_time(out) == before:
            time.sleep(0.002)
        try:
            return process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            return None


def checkpoint_time(out: Path) -> int:
    """When the last checkpoint was written, 0 if there is none."""
    try:
        return (out / "checkpoint.safetensors").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def timed_run(arguments: list[str], out: Path) -> tuple[float, float]:
    """Runs to the end; seconds until it began to train, and until it ended."""
    begin, started = time.monotonic(), 0.0
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=ENVIRONMENT) as process:
        while process.poll() is None:
            if not started and (out / "checkpoint.safetensors").exists():
                started = time.monotonic() - begin
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"the run that was left alone failed with status {process.returncode}")
    return started, time.monotonic() - begin


def progress_of(out: Path) -> str:
    """How far a run has come, as its files tell."""
    if (out / "summary.json").exists():
        return "summary written"
    if (out / "metrics.jsonl").exists():
        text = (out / "metrics.jsonl").read_text()
        preparing = ", a file half-written" if list(out.glob(".*.tmp")) else ""
        return f"{text.count(chr(10))} epochs logged{preparing}"
    return "folder made" if out.exists() else "nothing written"


def differences(expected: Path, found: Path) -> list[str]:
    """The files of two runs that differ, apart from times."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (expected, found)]
    for summary in summaries:
        for key in TIMED:
            del summary[key]
    names = [] if summaries[0] == summaries[1] else ["summary.json"]
    names += [n for n in EXACT if (expected / n).read_bytes() != (found / n).read_bytes()]
    return names


def check(kills: int, seed: int, work: Path) -> int:
    """Kills and resumes as often as asked; returns the number of runs that ended otherwise."""
    rng = random.Random(seed)
    features, expected = work / "features.npz", work / "expected"
    write_features(features)
    start, end = timed_run(command(features, expected), expected)
    print(f"left alone: trains after {start:.1f} s, ends after {end:.1f} s", flush=True)
    done = runs = wrong = 0
    while done < kills:
        runs += 1
        out, left = work / f"run{runs}", min(rng.randint(1, KILLS_PER_RUN), kills - done)
        again: list[str] = []
        while True:
            training = rng.random() > START_SHARE
            moment = rng.uniform(0, (end - start) if training else start) if left else 600.0
            arguments = command(features, out) + again
            status = start_and_kill(arguments, out, training and left > 0, moment)
            if status == 0:
                break
            if status is not None:
                print(f"run {runs}: resuming failed with status {status}")
                return wrong + 1
            done, left, again = done + 1, left - 1, ["--resume"]
            since = "training began" if training else "the start"
            print(f"kill {done:2d}, run {runs}, {moment:4.2f} s after {since}: {progress_of(out)}")
        changed = differences(expected, out)
        wrong += bool(changed)
        print(f"run {runs}: {'differs in ' + ', '.join(changed) if changed else 'identical'}")
    print(f"{done} kills in {runs} runs, {wrong} of them ended otherwise", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        return int(check(options.kills, options.seed, Path(work)) > 0)


if __name__ == "__main__":
    sys.exit(main())
