"""Tables and figures for few and many tasks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from rich.console import Console
from summaries import summary_of

from ssd.errors import UserError
from ssd.figures import write_figures
from ssd.storage.run_folder import FREQUENCY, METRICS, SUMMARY, read_summary
from ssd.tables import accuracy_table, seeds_table

FIGURES = ("accuracy_over_time", "accuracy_matrix", "activation_heatmap", "entropy_histogram")


def finished(folder: Path, tasks: int) -> dict:
    """Writes what the figures are drawn from."""
    matrix = np.tril(np.random.default_rng(0).random((tasks, tasks))).tolist()
    summary = summary_of(matrix, neurons=20, epochs=2)
    records = [
        record
        for t, row in enumerate(matrix)
        for record in ({"task": t, "epoch": 0}, {"task": t, "epoch": 1, "test_accuracy": row})
    ]
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


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in summary_of([[0.5]])),
        {"accuracy_matrix": []},
        {"accuracy_matrix": [[0.5, 0.5], [0.5]]},
        {"bwt": "0.5"},
        {"mean_accuracy": float("nan")},
        {"config": {"k": "3"}},
        {"config": {"tasks": 3}},
        {"config": []},
        {"versions": "2"},
        {"structure": [1]},
        {"structure": {"jaccard": [0.5]}},
        {"dead_fraction": [0.5]},
    ],
    ids=str,
)
def test_damaged_values_of_a_summary(tmp_path: Path, change: dict) -> None:
    summary = finished(tmp_path, 2)
    read_summary(tmp_path)
    (tmp_path / SUMMARY).write_text(json.dumps({**summary, **change}))
    with pytest.raises(UserError, match=rf"{SUMMARY} is damaged \({next(iter(change))} is missing"):
        read_summary(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", "1", "first line", "half the lines", "no accuracy", "of other tasks", "NUL"],
)
def test_damaged_log(tmp_path: Path, content: str) -> None:
    finished(tmp_path, 2)
    path = tmp_path / METRICS
    lines = path.read_text().splitlines()
    accuracy = '"test_accuracy": ['
    path.write_text(
        {
            "first line": lines[0],
            "half the lines": "\n".join(lines[:2]),
            "no accuracy": "\n".join([*lines[:3], lines[2].replace("0}", "1}")]),
            "of other tasks": path.read_text().replace(accuracy, accuracy + "1,"),
            "NUL": "\0" * 9,
        }.get(content, content)
    )
    with pytest.raises(UserError, match=rf"{METRICS} (is damaged|cannot be read)"):
        write_figures(tmp_path)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 19)), np.full((2, 20), np.nan), "npz"])
def test_damaged_frequency(tmp_path: Path, array: object) -> None:
    finished(tmp_path, 2)
    with open(tmp_path / FREQUENCY, "wb") as stream:
        if isinstance(array, str):
            np.savez(stream, a=np.zeros((2, 20)))
        else:
            np.save(stream, array)
    with pytest.raises(UserError, match=f"{FREQUENCY} is damaged"):
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
    text = shown(
        seeds_table(
            {
                "method": "ssd",
                "dataset": "mnist",
                "seeds": [0, 1, 2],
                **dict.fromkeys(names, measure),
            }
        )
    )
    for name in names:
        line = next(line for line in text.splitlines() if name in line)
        assert "0.2500" in line
        assert "0.1250" in line
        assert " 3 " in line
