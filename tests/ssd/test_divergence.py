"""Training that leaves the finite numbers: one line, a sound checkpoint, JSON without NaN."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_resume import write_features

from ssd import sweep, train
from ssd.config import Config, option
from ssd.data import load
from ssd.errors import Diverged, UserError
from ssd.learner import Learner
from ssd.metrics import finite
from ssd.runs import RunOptions, make_learner, make_tasks, run
from ssd.storage.checkpoint import load_checkpoint
from ssd.storage.files import dumps
from ssd.storage.run_folder import CHECKPOINT, DIVERGED, METRICS, SUMMARY
from ssd.study import Run, train_batch
from ssd.trainer import Event, Trainer

CPU = torch.device("cpu")
SIZES = {"tasks": 2, "neurons": 32, "k": 3, "epochs": 3, "batch_size": 64, "anneal_samples": 150}
CONFIG = Config(dataset="features", features="f.npz", method="naive", **SIZES)
HUGE = {"lr": 1e30, "max_norm": 1e30}
OPTIONS = [
    "--features=f.npz",
    *(f"{option(name)}={value}" for name, value in SIZES.items() if name != "k"),
    *("-k", "3", "--device", "cpu", "--quiet"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a feature file f.npz in it; no figures are drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw", lambda folder: None)
    write_features(Path("f.npz"), 256)
    return tmp_path


def strictly(path: Path) -> list[Any]:
    """The JSON lines of a file, NaN and infinity refused."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def poison(monkeypatch: pytest.MonkeyPatch, step: int, seed: int = 0) -> None:
    """After so many steps a weight of the run with this seed is NaN."""
    original = Trainer.step

    def step_and_spoil(self: Trainer, samples: Any) -> None:
        original(self, samples)
        if self.steps == step:
            for learner in self.learners:
                if learner.config.seed == seed:
                    learner.parameters[0].data[0, 0] = torch.nan

    monkeypatch.setattr(Trainer, "step", step_and_spoil)


@pytest.mark.parametrize("method", ["naive", "topk-mlp", "sdmlp", "ssd+ewc", "relu-mlp+si"])
def test_one_line_and_a_checkpoint_from_before(
    folder: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    arguments = [*OPTIONS, "--method", method, "--out", "r", "--lr", "1e30", "--max-norm", "1e30"]
    for more in ([], ["--resume"], ["--resume"]):  # the same comes of it every time
        assert train.main([*arguments, *more]) == 2
        printed, said = capsys.readouterr()
        assert printed == ""
        assert said.count("\n") == 1
        assert said.startswith("error: training diverged: ")
        assert "the loss is " in said or "every address is 0" in said
        for part in (" in task 1, epoch 1, step ", "--lr 1e+30", "--max-norm 1e+30"):
            assert part in said
        assert f"r/{CHECKPOINT} is from before, and --resume" in said
        assert strictly(Path("r", METRICS)) == []
        assert not Path("r", SUMMARY).exists()
        tensors, state = load_checkpoint(Path("r", CHECKPOINT), CPU)
        assert state["numbers"] == {"task": 0, "epoch": 0, "position": 0, "steps": 0}
        assert all(finite(t) for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize("step", [5, 6, 9, 12])
def test_every_checkpoint_is_sound(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """A weight that becomes NaN at any point is found before it is saved or evaluated."""
    poison(monkeypatch, step)
    data = load("features", folder, Path("f.npz"))
    every_step = RunOptions(CPU, checkpoint_every=0.0)
    with pytest.raises(Diverged, match=r"a weight is not finite|model/\S+ is not finite|the loss"):
        run(replace(CONFIG, method="sdmlp"), data, Path("r"), every_step)
    tensors, state = load_checkpoint(Path("r", CHECKPOINT), CPU)
    assert state["numbers"]["steps"] == step - 1
    assert all(finite(t) for t in tensors.values() if t.is_floating_point())
    # Two steps an epoch: what was logged is of sound epochs.
    assert len(strictly(Path("r", METRICS))) == (step - 1) // 2


def test_a_penalty_that_overflows_is_named(folder: Path) -> None:
    config = replace(CONFIG, method="relu-mlp+ewc", ewc_coefficient=1e38, ewc_beta=1e3, lr=0.1)
    with pytest.raises(
        Diverged, match=r"regularizer0/\S* is not finite in task 1; .*--ewc-coefficient 1e\+38"
    ):
        run(config, load("features", folder, Path("f.npz")), Path("r"), RunOptions(CPU))


def test_without_a_look_at_every_step_the_epoch_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the host reads nothing during an epoch."""
    data = load("features", folder, Path("f.npz"))
    config = replace(CONFIG, **HUGE)
    trainer = Trainer([make_learner(config, make_tasks(config, data), data.classes, CPU)])
    monkeypatch.setattr(trainer, "device", torch.device("meta"))
    kinds = []
    with pytest.raises(Diverged, match="the loss is nan in task 1, epoch 1, step 2"):
        kinds.extend(event.kind for event in trainer.run())
    assert trainer.epoch == 0


@pytest.mark.parametrize("lr", ["1e3", "1e20"])
def test_a_network_that_is_dead_for_good(
    folder: Path, capsys: pytest.CaptureFixture[str], lr: str
) -> None:
    """Too large a step clamps every address to 0; the loss is then log C for ever."""
    arguments = [*OPTIONS, "--method", "sdmlp", "--batch-size", "16"]
    assert train.main([*arguments, "--out", "r", "--lr", lr, "--max-norm", lr]) == 2
    assert "every address is 0 for good in task 1, epoch " in capsys.readouterr().err


def test_seeds_name_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 3, seed=2)
    arguments = [*OPTIONS, "--method", "sdmlp", "--out", "r", "--seed", "1"]
    assert train.main([*arguments, "--seeds", "3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the run with --seed 2 diverged: ")
    assert said.count("\n") == 1


SWEEP = """
features = "f.npz"
seeds = 2
[base]
tasks = 2
neurons = 32
k = 3
epochs = 3
batch_size = 64
method = "relu-mlp"
validation = 0.25
[grid]
"""


def test_a_sweep_goes_on_without_the_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(SWEEP + "lr = [0.05, 1e30, 0.2]\nmax_norm = [1e30]\n")
    Path("only.toml").write_text(SWEEP + "lr = [0.05, 0.2]\nmax_norm = [1e30]\n")
    for name in ("s", "only"):
        assert sweep.main([f"{name}.toml", "--device", "cpu", "--out", name, "--quiet"]) == 0
    printed, said = capsys.readouterr()
    assert "best of 3" in printed
    notes = [line for line in said.splitlines() if "diverged" in line]
    assert [line.split(": ")[1] for line in notes] == [
        f"lr=1e+30 max_norm=1e+30 seed {seed}" for seed in (0, 1)
    ]
    table, alone = (
        list(csv.DictReader(Path(n, "sweep.csv").read_text().splitlines())) for n in ("s", "only")
    )
    assert [row["lr"] for row in table][-1] == "1e+30"
    assert table[-1]["mean_accuracy"] == table[-1]["bwt"] == ""
    for row, expected in zip(table, alone, strict=False):  # the others' bits are their own
        assert all(row[n] == expected[n] for n in row if not n.startswith("seconds"))
    assert "| diverged |" in Path("s", "sweep.md").read_text()
    for file in Path("s").glob(f"*/{METRICS}"):
        strictly(file)
    assert len(list(Path("s").glob(f"*/{DIVERGED}"))) == 2
    assert not list(Path("s").glob("together-*"))
    # What diverged is found again, not trained again.
    before = {p: p.stat().st_mtime_ns for p in Path("s").glob("*/*")}
    assert sweep.main(["s.toml", "--device", "cpu", "--out", "s", "--quiet"]) == 0
    assert "seed 1: the run with" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("s").glob("*/*")} == before


def test_a_sweep_of_which_every_row_diverges(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.toml").write_text(SWEEP + "lr = [1e30]\nmax_norm = [1e30]\n")
    assert sweep.main(["s.toml", "--device", "cpu", "--out", "s", "--quiet"]) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.splitlines()[-1].startswith("error: every row diverged")
    for file in Path("s").glob(f"*/{DIVERGED}"):  # a row that diverged was made by a commit too
        assert f"commit {json.loads(file.read_text())['commit']}." in Path("s/sweep.md").read_text()


def test_companions_go_on_from_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that was done is not trained again, and the bits are those of runs of their own."""
    data = load("features", folder, Path("f.npz"))
    alone, jobs = (
        [Run("", replace(CONFIG, method="ssd", seed=seed), data, Path(root)) for seed in range(3)]
        for root in ("alone", "jobs")
    )
    train_batch([alone[0], alone[2]], RunOptions(CPU))
    poison(monkeypatch, 8, seed=1)  # in the second task
    steps: list[int] = []

    def watch(trainer: Trainer, event: Event) -> None:
        if event.kind == "task":
            steps.append(len(trainer.learners))

    train_batch(jobs, RunOptions(CPU, watch=watch))
    assert steps == [3, 2]
    assert "--seed 1" in (jobs[1].outcome() or {})["diverged"]
    assert not (jobs[1].folder / SUMMARY).exists()
    for ours, theirs in ((jobs[0], alone[0]), (jobs[2], alone[2])):
        assert (ours.outcome() or {})["accuracy_matrix"] == (theirs.outcome() or {})[
            "accuracy_matrix"
        ]
    assert strictly(jobs[2].folder / METRICS) == strictly(alone[2].folder / METRICS)


def test_scores_that_are_not_finite_are_no_accuracy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("features", folder, Path("f.npz"))
    learner = make_learner(CONFIG, make_tasks(CONFIG, data), data.classes, CPU)
    assert isinstance(learner, Learner)
    learner.parameters[-1].data.fill_(torch.nan)
    with pytest.raises(Diverged, match="samples have scores that are not finite"):
        learner.evaluate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product(
            ("lr", "alpha", "max_norm", "temperature", "ewc_coefficient"),
            (float("nan"), float("inf"), -1.0, 1e39, 1e-46, 10**400),
        ),
        *product(("temperature",), (0.0, 1e-20, 1e20)),
        ("lr", 0.0),
        ("si_coefficient", 3e38),
    ],
)
def test_settings_that_no_step_can_use(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} \S+ must be [^\n]*$"):
        replace(CONFIG, **{name: value}).validate()


def test_json_has_no_nan() -> None:
    content = {"a": float("nan"), "b": [1.5, float("-inf"), (float("inf"), None)], "c": {"d": True}}
    assert dumps(content) == '{"a": null, "b": [1.5, null, [null, null]], "c": {"d": true}}'
    assert dumps({"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'


def test_no_other_writer_of_json() -> None:
    root = Path(train.__file__).parent
    found = [p.name for p in root.rglob("*.py") if "json.dump" in p.read_text(encoding="utf-8")]
    assert found == ["files.py"]


def test_a_worker_can_raise_it() -> None:
    error = pickle.loads(pickle.dumps(Diverged("lost", 3)))
    assert (str(error), error.number) == ("lost", 3)
