"""What TensorBoard and Weights & Biases are given are the numbers of the runs' records."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ssd
from ssd.api import Result
from ssd.callbacks import TensorBoard, WandB
from ssd.errors import Diverged
from ssd.trainer import Event, Trainer

STEPS = 2  # an epoch: 200 samples in batches of 50, two tasks

tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def blobs() -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    y = np.arange(200) % 4
    x = (random.random((200, 20)) + 2 * np.eye(20)[y]).astype(np.float32)
    return x, y, x[:40], y[:40]


def run(*callbacks: Any, **settings: Any) -> Result:
    """Two seeds of three epochs; test accuracy is measured in the second and third."""
    small = {"epochs": 3, "eval_every": 2, "batch_size": 50, "neurons": 40, "k": 4}
    return ssd.run(
        blobs(),
        "ssd+ewc",
        tasks=2,
        device="cpu",
        callbacks=callbacks,
        **{"seeds": 2, **small, **settings},
    )


def expected(result: Result, seed: int) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of all that is to be logged of a run."""
    found: dict[str, list[tuple[int, float]]] = {}
    for number, record in enumerate(result.records[seed]):
        step = STEPS * (number + 1)
        values = {name: record[name] for name in ("loss", "train_accuracy")}
        if "test_accuracy" in record:
            first, second = record["test_accuracy"]
            values |= {"test_accuracy/task_0": first, "test_accuracy/task_1": second}
            norms = record["gradient_norms"]
            values |= {f"gradient_norm/{term}": norm for term, norm in norms.items()}
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    matrix = result.accuracies[seed]
    so_far = [matrix[0, 0], matrix[1].mean()]
    found["mean_accuracy"] = list(zip((3 * STEPS, 6 * STEPS), so_far, strict=True))
    return found


def test_expected() -> None:
    """What the tests compare with has each kind of number, and they differ."""
    found = expected(run(), 1)
    terms = ("cross_entropy", "logits", "hidden", "penalty")
    tests = ("test_accuracy/task_0", "test_accuracy/task_1")
    norms = [f"gradient_norm/{term}" for term in terms]
    assert found.keys() == {"loss", "train_accuracy", "mean_accuracy", *tests, *norms}
    assert [step for step, _ in found["loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in found[norms[0]]] == [4, 6, 10, 12]
    assert [step for step, _ in found[norms[1]]] == [10, 12]
    assert len({tuple(values) for values in found.values()}) == len(found)
    assert expected(run(), 0) != found


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def wait() -> None:
    """Until the next second, since readers order event files by the second of their begin."""
    time.sleep(1 - time.time() % 1)


def same(folder: Path, result: Result) -> None:
    """The event files of both seeds hold what the result does, rounded to fp32."""
    for seed in (0, 1):
        rounded = {
            name: [(step, float(np.float32(value))) for step, value in pairs]
            for name, pairs in expected(result, seed).items()
        }
        assert read(folder / f"seed{seed}") == rounded


@tensorboard
def test_tensorboard(tmp_path: Path) -> None:
    log = TensorBoard(tmp_path)
    same(tmp_path, run(log))
    assert log.runs == []  # closed


@tensorboard
@pytest.mark.parametrize(("kind", "step"), [("epoch", 10), ("step", 9), ("task", 6)])
def test_tensorboard_after_an_interruption(tmp_path: Path, kind: str, step: int) -> None:
    """What is trained anew replaces what was logged of it."""

    def stop(trainer: Trainer, event: Event) -> None:
        if (event.kind, trainer.steps) == (kind, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(TensorBoard(tmp_path / "log"), stop, out=tmp_path / "runs")
    wait()
    assert max(step for step, _ in read(tmp_path / "log" / "seed0")["loss"]) == step // 2 * 2
    same(tmp_path / "log", run(TensorBoard(tmp_path / "log"), out=tmp_path / "runs"))


@tensorboard
def test_tensorboard_keeps_the_last_epoch_before_a_task_event(tmp_path: Path) -> None:
    """A training may go on just before the end of a task, whose epochs are all logged."""
    log, result = TensorBoard(tmp_path), run()
    seen: list[tuple[Trainer, Event, int]] = []

    def relog(trainer: Trainer, event: Event) -> None:
        if event.kind == "task" and event.task == 1:
            log.__exit__(None)  # the next call begins anew, in the same folder
            wait()
        log(trainer, event)
        seen.append((trainer, event, trainer.steps))

    run(relog)
    log.__exit__(None)
    same(tmp_path, result)


class StandIn:
    """Takes the place of the module wandb, and keeps all calls."""

    def __init__(self) -> None:
        self.runs: list[SimpleNamespace] = []

    def init(self, **given: Any) -> Any:
        own = SimpleNamespace(given=given, logged=[], codes=[])
        own.log = lambda values, step: own.logged.append((step, dict(values)))
        own.finish = lambda exit_code: own.codes.append(exit_code)
        self.runs.append(own)
        return own


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return module


def test_wandb(wandb: StandIn) -> None:
    result = run(WandB("project", mode="offline"))
    assert len(wandb.runs) == 2
    for seed, own in enumerate(wandb.runs):
        found: dict[str, list[tuple[int, float]]] = {}
        for step, values in own.logged:
            for name, value in values.items():
                found.setdefault(name, []).append((step, value))
        assert found == expected(result, seed)
        assert own.codes == [0]
        assert own.given == {
            "project": "project",
            "group": "ssd+ewc",
            "name": f"seed{seed}",
            "config": {**result.config.to_dict(), "seed": seed},
            "reinit": "create_new",
            "mode": "offline",
        }


def test_wandb_is_told_of_a_failure(wandb: StandIn) -> None:
    with pytest.raises(Diverged):
        run(WandB("project", group="mine"), lr=1e30)
    assert [own.codes for own in wandb.runs] == [[1], [1]]
    assert [own.given["group"] for own in wandb.runs] == ["mine", "mine"]


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: two runs side by side, each with its own values."""
    import wandb

    found = []
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = WandB("project", mode="offline", dir=str(tmp_path))

    def last(trainer: Trainer, event: Event) -> None:
        if event.kind == "task" and event.task == 1:
            found.extend((own.name, dict(own.summary)) for own in log.runs)

    result = run(log, last)
    wandb.teardown()
    assert [name for name, _ in found] == ["seed0", "seed1"]
    for seed, (_, summary) in enumerate(found):
        for name, pairs in expected(result, seed).items():
            # A summary has the values of a step once another step follows.
            assert summary[name] == [value for step, value in pairs if step < 6 * STEPS][-1], name
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2


@pytest.mark.parametrize(("module", "make"), [("tensorboard", TensorBoard), ("wandb", WandB)])
def test_error_without_the_library(
    module: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'cannot import {module} .*"ssd-kernels\[{module}\]"'):
        make(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []
