"""A run that was killed or interrupted anywhere ends bit-identical to one that was left alone."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import kill_resume
import pytest
import torch

from ssd.config import Config
from ssd.data import load
from ssd.runs import Interrupted, RunOptions, run

CPU = RunOptions(torch.device("cpu"), resume=True, checkpoint_every=1e9)
SIZES = {"tasks": 2, "epochs": 2, "batch_size": 64, "neurons": 32, "k": 3, "anneal_samples": 300}
SMALL = Config(dataset="features", method="ssd+ewc", eval_every=1, **SIZES)
VARIANTS = {
    "ssd+ewc": {},
    "momentum": {"momentum": 0.9},
    "mse": {"hidden_loss": "mse", "selection": "activation", "protection": "use", "tasks": 4},
    "linear": {"method": "sdmlp", "schedule": "linear"},
    "seen, accumulated": {"logits": "seen", "frequency": "accumulated", "tasks": 4},
    "before": {"hidden": "before", "inhibition": "mask", "schedule": "flat"},
    "seeds": {"order_seed": 3, "weight_seed": 4},
    "lwf": {"method": "lwf+ewc", "validation": 0.2},
    "centred": {"center": "always"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_at_every_event(tmp_path: Path, variant: str) -> None:
    """Every step, epoch and task is the last one of some process."""
    kill_resume.write_features(tmp_path / "f.npz", 384)
    data = load("features", tmp_path, tmp_path / "f.npz")
    config = replace(SMALL, **VARIANTS[variant])
    events: list[object] = []
    watched = replace(CPU, watch=lambda _, event: events.append(event))
    run(config, data, tmp_path / "expected", watched)
    stops = 0
    while True:
        try:
            run(config, data, tmp_path / "stopped", replace(CPU, stopped=lambda: True))
            break
        except Interrupted:
            stops += 1
    assert stops == len(events) - 1
    assert not kill_resume.differences(tmp_path / "expected", tmp_path / "stopped")


def test_crash_at_every_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Crashes before and after the replacement of a file, with a checkpoint at every event."""
    kill_resume.write_features(tmp_path / "f.npz", 256)
    data = load("features", tmp_path, tmp_path / "f.npz")
    options = replace(CPU, checkpoint_every=0.0)
    run(SMALL, data, tmp_path / "expected", options)

    def work() -> None:
        run(SMALL, data, tmp_path / "crashed", options)

    # A finished run writes four files at its end.
    crashes = kill_resume.crash_at_every_write(monkeypatch, work, 5)
    assert crashes > 5
    assert not kill_resume.differences(tmp_path / "expected", tmp_path / "crashed")


@pytest.mark.slow
def test_sigkill(tmp_path: Path) -> None:
    """The short form of `python tests/kill_resume.py --kills 20`."""
    assert kill_resume.check(kills=3, seed=0, work=tmp_path) == 0


def test_sigint(tmp_path: Path) -> None:
    """Ctrl-C saves, says how to go on, and that works from the folder alone."""
    kill_resume.write_features(tmp_path / "f.npz")
    expected, out = tmp_path / "expected", tmp_path / "a run"
    arguments = [*kill_resume.command(tmp_path / "f.npz", out), "--checkpoint-every", "1000"]
    arguments[arguments.index("--epochs") + 1] = "15"
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kill_resume.ENVIRONMENT,
    ) as process:
        while process.poll() is None and not _bytes(out / "metrics.jsonl"):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert printed == ""
    assert said == f"interrupted; go on with: python -m ssd.train --out '{out}' --resume\n"
    assert not (out / "summary.json").exists()
    config = Config(**json.loads((out / "config.json").read_text())["config"])
    again = [sys.executable, "-m", "ssd.train", "--out", str(out), "--resume", "--quiet"]
    done = subprocess.run(
        [*again, "--device", "cpu"],
        env=kill_resume.ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    data = load("features", tmp_path, tmp_path / "f.npz")
    run(config, data, expected, CPU)
    assert not kill_resume.differences(expected, out)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
