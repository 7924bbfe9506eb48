"""Tables and figures for few and many tasks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from rich.console import Console

from ssd.errors import UserError
from ssd.folder import FREQUENCY, METRICS, SUMMARY
from ssd.report import accuracy_table, seeds_table, write_figures

FIGURES = ("accuracy_over_time", "accuracy_matrix", "activation_heatmap", "entropy_histogram")


def finished(folder: Path, tasks: int) -> dict:
    """Writes what the figures are drawn from."""
    matrix = np.tril(np.random.default_rng(0).random((tasks, tasks))).tolist()
    summary = {
        "method": "ssd", "dataset": "mnist", "accuracy_matrix": matrix, "mean_accuracy": 0.5,
        "bwt": -0.1, "config": {"epochs": 2},
    }  # fmt: skip
    records = [{"task": t, "epoch": 1, "test_accuracy": row} for t, row in enumerate(matrix)]
    (folder / SUMMARY).write_text(json.dumps(summary))
    (folder / METRICS).write_text("".join(json.dumps(r) + "\n" for r in records))
    np.save(folder / FREQUENCY, np.random.default_rng(1).random((tasks, 20)))
    return summary


def shown(table: object, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(table)
    return stream.getvalue()


@pytest.mark.parametrize("tasks", [1, 2, 10, 50])
def test_figures(tmp_path: Path, tasks: int) -> None:
    finished(tmp_path, tasks)
    write_figures(tmp_path)
    for name in FIGURES:
        pixels = plt.imread(tmp_path / f"{name}.png")
        assert pixels.shape[:2] == (630, 960)
        assert pixels[..., :3].std() > 0.05  # something is drawn
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not plt.get_fignums()


@pytest.mark.parametrize("file", [SUMMARY, METRICS, FREQUENCY])
def test_damaged_results(tmp_path: Path, file: str) -> None:
    finished(tmp_path, 2)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged"):
        write_figures(tmp_path)


@pytest.mark.parametrize(("tasks", "width"), [(1, 80), (5, 80), (7, 80), (10, 104), (50, 424)])
def test_table_shows_every_accuracy_that_fits(tmp_path: Path, tasks: int, width: int) -> None:
    summary = finished(tmp_path, tasks)
    text = shown(accuracy_table(summary, width), width)
    assert max(map(len, text.splitlines())) <= width
    for row in summary["accuracy_matrix"]:
        for value in row:
            assert f"{value:.3f}" in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_of_many_tasks_fits(tmp_path: Path, width: int) -> None:
    summary = finished(tmp_path, 50)
    text = shown(accuracy_table(summary, width), width)
    assert "of 50 tasks shown" in text
    assert "…" not in text
    for corner in (summary["accuracy_matrix"][0][0], summary["accuracy_matrix"][-1][-1]):
        assert f"{corner:.3f}" in text


def test_seeds_table() -> None:
    measure = {"mean": 0.25, "std": 0.125}
    names = ("mean_accuracy", "bwt", "forgetting")
    text = shown(seeds_table({"method": "ssd", "dataset": "mnist", "seeds": [0, 1, 2],
                              **dict.fromkeys(names, measure)}))  # fmt: skip
    for name in names:
        line = next(line for line in text.splitlines() if name in line)
        assert "0.2500" in line
        assert "0.1250" in line
        assert " 3 " in line
