"""A run in its folder: what it writes, whose the folder is, and when it starts anew."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_resume import write_features

from ssd.config import Config
from ssd.data import Dataset, load
from ssd.errors import UserError
from ssd.runs import Interrupted, RunOptions, run
from ssd.storage import provenance, run_folder
from ssd.storage.lock import LOCK
from ssd.storage.run_folder import (
    CHECKPOINT,
    CONFIG,
    FREQUENCY,
    MATRIX,
    METRICS,
    STRUCTURE,
    SUMMARY,
    claimed,
    describe,
)

CPU = RunOptions(torch.device("cpu"), checkpoint_every=1e9)
AGAIN = replace(CPU, resume=True)
CONFIG_SMALL = Config(
    dataset="features", method="ssd+ewc", tasks=2, epochs=2, neurons=32, k=3, anneal_samples=300
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("features") / "f.npz"
    write_features(path, 256)
    return load("features", path.parent, path)


def interrupt(config: Config, data: Dataset, folder: Path, after: int = 3) -> None:
    """Leaves a run that was stopped at its `after`-th event."""
    events = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        run(config, data, folder, replace(CPU, stopped=lambda: next(events) >= after))


def test_files_of_a_run(tmp_path: Path, data: Dataset) -> None:
    summary = run(CONFIG_SMALL, data, tmp_path / "a" / "run", CPU)
    folder = tmp_path / "a" / "run"
    names = {CONFIG, METRICS, CHECKPOINT, MATRIX, FREQUENCY, STRUCTURE, SUMMARY}
    assert {file.name for file in folder.iterdir()} == names
    assert json.loads((folder / SUMMARY).read_text()) == summary
    assert summary["dataset"] == "features"
    assert summary["method"] == "ssd+ewc"
    assert summary["seed"] == 0
    assert summary["classes_per_task"] == [[0, 1], [2, 3]]
    matrix = np.array(summary["accuracy_matrix"])
    assert matrix.shape == (2, 2)
    assert summary["mean_accuracy"] == pytest.approx(matrix[-1].mean())
    assert summary["bwt"] == pytest.approx(matrix[1, 0] - matrix[0, 0])
    assert summary["forgetting"] == pytest.approx(matrix[0, 0] - matrix[1, 0])
    assert summary["seconds"] > 0
    assert summary["steps_per_second"] == pytest.approx(2 * 2 * 1 / summary["seconds"])
    assert summary["device"].startswith("cpu")
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert summary["commit"]
    assert Config(**summary["config"]) == CONFIG_SMALL
    described = json.loads((folder / CONFIG).read_text())
    assert Config(**described["config"]) == CONFIG_SMALL
    assert described["data_crc32"] == data.checksum()
    assert described["commit"] == summary["commit"]
    assert described["versions"] == summary["versions"]
    header, *rows = (folder / MATRIX).read_text().splitlines()
    assert header == "after_task,task_0,task_1"
    assert [[float(a) for a in row.split(",")[1:]] for row in rows] == summary["accuracy_matrix"]
    assert np.load(folder / FREQUENCY).shape == (2, 32)
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    assert [(r["task"], r["epoch"]) for r in records] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert records[-1]["test_accuracy"] == summary["accuracy_matrix"][-1]


def test_validation_runs_leave_the_test_set_alone(tmp_path: Path, data: Dataset) -> None:
    config = replace(CONFIG_SMALL, validation=0.25)
    blind = replace(data, x_test=torch.zeros_like(data.x_test))
    seeing, unseeing = (run(config, d, tmp_path / d.checksum(), CPU) for d in (data, blind))
    assert seeing["evaluated_on"] == "validation"
    assert seeing["accuracy_matrix"] == unseeing["accuracy_matrix"]


def test_torn_log_of_a_run_killed_before_its_first_checkpoint(
    tmp_path: Path, data: Dataset
) -> None:
    expected = run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    with claimed(tmp_path / "b", describe(CONFIG_SMALL, data), resume=False):
        pass
    (tmp_path / "b" / METRICS).write_text('{"task": 0, "epoch": 0}\n{"ta')
    found = run(CONFIG_SMALL, data, tmp_path / "b", AGAIN)
    assert found["accuracy_matrix"] == expected["accuracy_matrix"]
    assert (tmp_path / "b" / METRICS).read_bytes() == (tmp_path / "a" / METRICS).read_bytes()


def test_torn_log_of_a_run_killed_after_a_checkpoint(tmp_path: Path, data: Dataset) -> None:
    run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    interrupt(CONFIG_SMALL, data, tmp_path / "b")
    with open(tmp_path / "b" / METRICS, "a") as log:
        log.write('{"task": 0, "epo')
    run(CONFIG_SMALL, data, tmp_path / "b", AGAIN)
    assert (tmp_path / "b" / METRICS).read_bytes() == (tmp_path / "a" / METRICS).read_bytes()


def test_log_shorter_than_the_checkpoint_says(tmp_path: Path, data: Dataset) -> None:
    interrupt(CONFIG_SMALL, data, tmp_path / "a")
    (tmp_path / "a" / METRICS).write_text("")
    with pytest.raises(UserError, match="lacks lines"):
        run(CONFIG_SMALL, data, tmp_path / "a", AGAIN)


def test_finished_run_is_not_trained_again(tmp_path: Path, data: Dataset) -> None:
    summary = run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    events: list[object] = []
    watched = replace(AGAIN, watch=lambda *event: events.append(event))
    again = run(CONFIG_SMALL, data, tmp_path / "a", watched)
    assert again == summary
    assert not events


def test_folder_left_by_a_kill_at_the_start(tmp_path: Path, data: Dataset) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".{CONFIG}.tmp").write_text('{"con')
    run(CONFIG_SMALL, data, tmp_path / "a", AGAIN)
    assert not (tmp_path / "a" / f".{CONFIG}.tmp").exists()


OTHERS = {
    "seed": ({"seed": 1}, "seed 0, now 1"),
    "order seed": ({"order_seed": 0}, "order_seed None, now 0"),
    "weight seed": ({"weight_seed": 3}, "weight_seed None, now 3"),
    "method": ({"method": "sdmlp"}, r"method ssd\+ewc, now sdmlp"),
    "neurons": ({"neurons": 33}, "neurons 32, now 33"),
    "k": ({"k": 4}, "k 3, now 4"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_folder_and_checkpoint_of_another_configuration(
    tmp_path: Path, data: Dataset, case: str
) -> None:
    changes, message = OTHERS[case]
    other = replace(CONFIG_SMALL, **changes)
    interrupt(CONFIG_SMALL, data, tmp_path / "a")
    before = {file: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    with pytest.raises(UserError, match=message):
        run(other, data, tmp_path / "a", AGAIN)
    interrupt(other, data, tmp_path / "b")
    (tmp_path / "b" / CHECKPOINT).write_bytes(before[tmp_path / "a" / CHECKPOINT])
    with pytest.raises(UserError, match=f"of another run .*{message}"):
        run(other, data, tmp_path / "b", AGAIN)
    assert before == {file: file.read_bytes() for file in (tmp_path / "a").iterdir()}


def test_folder_of_other_data(tmp_path: Path, data: Dataset) -> None:
    interrupt(CONFIG_SMALL, data, tmp_path / "a")
    with pytest.raises(UserError, match="data_crc32"):
        run(CONFIG_SMALL, replace(data, x_test=data.x_test + 1), tmp_path / "a", AGAIN)


def test_model_that_does_not_fit_leaves_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Dataset
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("ssd.runs.build_model", fail)
    with pytest.raises(UserError, match="--neurons 32 does not fit into the memory of cpu"):
        run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    assert not (tmp_path / "a").exists()


def test_commit_is_of_this_package_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    provenance._git("init", folder=tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "folder.py"))
    assert provenance.commit() == "unknown"  # a checkout, of something else
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "absent" / "folder.py"))
    assert provenance.commit() == "unknown"


def test_a_run_of_another_algorithm_is_not_gone_on_with(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(CONFIG_SMALL, data, tmp_path / "a")
    monkeypatch.setattr(run_folder, "ALGORITHM", 0)
    with pytest.raises(UserError, match=r"\(algorithm \d+, now 0\); use another"):
        run(CONFIG_SMALL, data, tmp_path / "a", AGAIN)


def test_a_lock_that_a_kill_left_is_nothing(tmp_path: Path, data: Dataset) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK).write_text("123")
    run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    assert not (tmp_path / "a" / LOCK).exists()


def test_config_with_a_byte_order_mark(tmp_path: Path, data: Dataset) -> None:
    summary = run(CONFIG_SMALL, data, tmp_path / "a", CPU)
    for name in (CONFIG, SUMMARY):
        path = tmp_path / "a" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert run(CONFIG_SMALL, data, tmp_path / "a", AGAIN) == summary
