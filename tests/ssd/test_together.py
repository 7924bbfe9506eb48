"""Learners trained side by side: equal to separate runs, and blind to their companions."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import kill_resume
import pytest
import torch
from rich.console import Console

from ssd.config import Config
from ssd.data import Dataset, class_order, load, split
from ssd.learner import Learner, build_model
from ssd.progress import Display
from ssd.runs import Interrupted, RunOptions, run
from ssd.study import Run, Study
from ssd.trainer import Trainer
from tests.ssd.test_step import watch

CPU = RunOptions(torch.device("cpu"), checkpoint_every=1e9)
SMALL = Config(
    dataset="features",
    method="ssd+ewc",
    tasks=2,
    epochs=3,
    batch_size=32,
    neurons=32,
    k=3,
    anneal_samples=300,
    eval_every=1,
)
BASE = Config(
    dataset="features",
    features="none",
    tasks=3,
    epochs=7,
    batch_size=15,
    neurons=200,
    k=5,
    anneal_samples=300,
    lr=0.3,
    temperature=2.0,
    lam=0.4,
    subnetwork=2.0,
    eval_every=7,
    ewc_coefficient=3.0,
    ewc_beta=0.5,
    si_coefficient=1.0,
    si_beta=0.5,
    mas_coefficient=30.0,
)
OWN: list[dict[str, Any]] = [
    {"seed": 0},
    {"seed": 4, "alpha": 0.5, "lr": 0.2, "anneal_samples": 200, "si_coefficient": 0.5},
    {"seed": 9, "lam": 0.0, "temperature": 5.0, "max_norm": 0.05, "mas_coefficient": 10.0},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "ssd": {},
    "sdmlp": {"method": "sdmlp"},
    "lwf+ewc": {"method": "lwf+ewc"},
    "seen, forward, mask": {"logits": "seen", "kl": "forward", "inhibition": "mask"},
    "before": {"hidden": "before"},
    "flat": {"schedule": "flat"},
    "momentum": {"momentum": 0.9},
    "mse, protected": {"hidden_loss": "mse", "selection": "activation", "protection": "use"},
    "mse of all, before": {"hidden_loss": "mse", "selection": "all", "hidden": "before"},
    "topk-mlp": {"method": "topk-mlp+lwf"},
    "ssd+si": {"method": "ssd+si"},
    # So many neurons that the penalty pulls few of them.
    "ssd+mas, flat": {"method": "ssd+mas", "schedule": "flat", "neurons": 1000, "k": 2},
}
PENALTY_ON = {"ssd+si": "penalty on all", "ssd+mas, flat": "penalty on some"}


def make_data(dtype: torch.dtype) -> Dataset:
    """Classes of different sizes, so that the learners' epochs differ in length."""
    draw = torch.Generator().manual_seed(3)
    y = torch.cat([torch.full((40 + 6 * c,), c) for c in range(6)])
    centres = torch.randn(6, 20, generator=draw, dtype=dtype)
    x = centres[y] + 0.7 * torch.randn(len(y), 20, generator=draw, dtype=dtype)
    return Dataset("features", x, y, x, y)


def make_learner(config: Config, dtype: torch.dtype) -> Learner:
    data = make_data(dtype)
    tasks = split(data, config.tasks, class_order(6, config.seed))
    model = build_model(config, 20, 6).to(dtype)
    model.constrain()  # in the dtype of the steps, so that a row that rests need not be scaled
    return Learner(config, tasks, model)


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.model.parameters()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_to_separate_runs_step_by_step(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, three tasks, more than 150 steps, through the GABA switch."""
    configs = [replace(BASE, **{"method": "ssd", **VARIANTS[variant], **own}) for own in OWN]
    batched = Trainer([make_learner(config, torch.float64) for config in configs])
    alone = [Trainer([make_learner(config, torch.float64)]) for config in configs]
    streams = [trainer.run() for trainer in alone]
    taken = watch(monkeypatch)
    steps = 0
    for event in batched.run():
        for number, (trainer, stream) in enumerate(zip(alone, streams, strict=True)):
            if event.kind != "step" or event.step <= trainer.steps_per_epoch()[event.task]:
                assert next(stream).kind == event.kind
            ours, theirs = weights(batched.learners[number]), weights(trainer.learners[0])
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        steps += event.kind == "step"
    assert steps > 150
    if variant in PENALTY_ON:
        assert taken[PENALTY_ON[variant]] > 3 * steps  # of 3 learners, twice, in 2 of 3 tasks
    for together, trainer in zip(batched.learners, alone, strict=True):
        assert torch.equal(together.accuracy, trainer.learners[0].accuracy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bit_depends_on_the_companions(variant: str) -> None:
    configs = [replace(BASE, **{"method": "ssd", **VARIANTS[variant], **own}) for own in OWN]
    ends = []
    for companions in ([0, 1, 2], [1], [2, 1]):
        trainer = Trainer([make_learner(configs[c], torch.float32) for c in companions])
        for _ in trainer.run():
            pass
        ends.append(weights(trainer.learners[companions.index(1)]))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


def test_learners_of_another_shape_are_refused() -> None:
    learners = [make_learner(replace(BASE, k=k), torch.float32) for k in (5, 6)]
    with pytest.raises(ValueError, match="may differ in seed"):
        Trainer(learners)


def test_jobs_equal_single_runs_and_survive_interruption(tmp_path: Path) -> None:
    """Two programs, of three and one runs, stopped at every tenth event."""
    kill_resume.write_features(tmp_path / "f.npz", 256)
    data = load("features", tmp_path, tmp_path / "f.npz")
    configs = [replace(SMALL, seed=s, alpha=0.5 + s / 10) for s in range(3)]
    configs.append(replace(SMALL, k=2))
    stops = 0
    runs = [Run("", config, data, tmp_path / "jobs") for config in configs]
    while not all(study_run.outcome() for study_run in runs):
        events = chain([False] * 9, repeat(True))
        try:
            study = Study(runs, CPU.device, Display(Console(), quiet=True))
            study.train(runs, events.__next__)
        except Interrupted:
            stops += 1
    assert stops > 3
    assert not list((tmp_path / "jobs").glob("*.safetensors"))
    for number, (config, study_run) in enumerate(zip(configs, runs, strict=True)):
        summary = study_run.outcome() or {}
        single = run(config, data, tmp_path / f"single{number}", CPU)
        for name in ("accuracy_matrix", "bwt", "mean_active", "config"):
            assert single[name] == summary[name]
        log = (tmp_path / f"single{number}" / "metrics.jsonl").read_text()
        assert (study_run.folder / "metrics.jsonl").read_text() == log
