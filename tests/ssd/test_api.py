"""ssd.run: the same numbers as the command line, data and networks of one's own, results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

import ssd
from ssd.errors import UserError
from ssd.models import Network
from ssd.storage.run_folder import read_summary
from ssd.train import main
from ssd_kernels.nn import TopK

SMALL = {"epochs": 2, "neurons": 40, "k": 4, "device": "cpu"}


def blobs(classes: int = 4) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    y = np.arange(200) % classes
    x = (random.random((200, 20)) + 2 * np.eye(20)[y]).astype(np.float32)
    return x, y, x[:40], y[:40]


def stream() -> list[tuple[np.ndarray, ...]]:
    """Two tasks of different size."""
    x, y, *_ = blobs()
    parts = [(x[own], y[own]) for own in (y < 3, y == 3)]
    return [(*part, *part) for part in parts]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), TopK(8), nn.Linear(32, 4))


def test_equals_the_command_line(tmp_path: Path) -> None:
    """Seeds side by side, with a preset and settings."""
    arguments = "--dataset mnist-5k --method ssd+ewc --seeds 2 --epochs 1 --neurons 50 --quiet"
    assert main([*arguments.split(), "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    expected = [read_summary(tmp_path / "run" / f"seed{seed}") for seed in (0, 1)]
    result = ssd.run("mnist-5k", "ssd+ewc", seeds=2, epochs=1, neurons=50, device="cpu")
    for got, want in zip(result.summaries, expected, strict=True):
        assert {**got, "seconds": 0, "steps_per_second": 0} == {
            **want,
            "seconds": 0,
            "steps_per_second": 0,
        }


def test_result() -> None:
    result = ssd.run(blobs(), "sdmlp", seeds=3, tasks=2, **SMALL)
    assert result.accuracies.shape == (3, 2, 2)
    assert result.frequency.shape == (3, 2, 40)
    assert [len(records) for records in result.records] == [4] * 3
    np.testing.assert_array_equal(result.accuracy, result.accuracies.mean(0))
    assert result.mean_accuracy == pytest.approx(result.accuracy[-1].mean())
    assert result.bwt == pytest.approx(result.accuracy[1, 0] - result.accuracy[0, 0])
    assert result.forgetting == pytest.approx(-result.bwt, abs=1)
    spread = result.accuracies[:, -1].mean(1).std(ddof=1)
    line = f"mean accuracy {result.mean_accuracy:.4f} ± {spread:.4f}"
    assert repr(result).startswith(f"<sdmlp on features, 3 seeds: {line}, bwt ")
    console = Console(width=80)
    with console.capture() as shown:
        console.print(result.table())
    assert f"{result.mean_accuracy:.4f} ± {spread:.4f}" in shown.get()
    markup = result._repr_html_()
    assert line in markup
    assert re.findall(r"<td>([\d.]+)</td>", markup) == [
        f"{value:.3f}" for value in result.accuracy.ravel()
    ]


def test_plot() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    results = [ssd.run(blobs(), method, seeds=2, tasks=2, **SMALL) for method in ("sdmlp", "lwf")]
    for result in results:
        assert result.plot(axes, linewidth=3) is axes
    for line, result in zip(axes.lines, results, strict=True):
        matrix = result.accuracy
        np.testing.assert_allclose(line.get_ydata(), [matrix[0, 0], matrix[1].mean()])
        assert line.get_linewidth() == 3
    assert all(tick == round(tick) for tick in axes.get_xticks())
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sdmlp", "lwf"]


def test_frame() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    result = ssd.run(blobs(), "sdmlp", seeds=2, seed=5, tasks=2, **SMALL)
    frame = result.frame()
    assert frame.seed.tolist() == [5] * 4 + [6] * 4
    chosen = frame[(frame.seed == 6) & (frame.after_task == 1) & (frame.on_task == 0)]
    assert chosen.accuracy.item() == result.accuracies[1, 1, 0]


def test_arrays_in_any_form() -> None:
    x, y, *test = blobs()
    expected = ssd.run((x, y, *test), tasks=2, **SMALL).accuracy
    forms: list[Any] = [
        [torch.from_numpy(array) for array in (x, y, *test)],
        dict(zip(("x_train", "y_train", "x_test", "y_test"), (x, y, *test), strict=True)),
        [TensorDataset(*map(torch.from_numpy, pair)) for pair in ((x, y), test)],
    ]
    for form in forms:
        np.testing.assert_array_equal(ssd.run(form, tasks=2, **SMALL).accuracy, expected)


def test_feature_file(tmp_path: Path) -> None:
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "blobs.npz", **dict(zip(names, blobs(), strict=True)))
    result = ssd.run(tmp_path / "blobs.npz", tasks=2, **SMALL)
    expected = ssd.run(blobs(), tasks=2, **SMALL)
    np.testing.assert_array_equal(result.accuracy, expected.accuracy)
    assert result.config.features == str(tmp_path / "blobs.npz")


@pytest.mark.parametrize("method", ["ssd+ewc", "lwf", "joint"])
def test_stream_of_tasks(method: str) -> None:
    """Of unequal numbers of classes and samples; as arrays and as torch data sets."""
    result = ssd.run(tasks=stream(), method=method, **SMALL)
    assert result.summaries[0]["classes_per_task"] == [[0, 1, 2], [3]]
    assert result.accuracy.shape == (2, 2)
    sets = [
        [TensorDataset(*map(torch.from_numpy, pair)) for pair in (t[:2], t[2:])] for t in stream()
    ]
    again = ssd.run(tasks=sets, method=method, **SMALL)
    np.testing.assert_array_equal(result.accuracy, again.accuracy)
    if method == "joint":
        assert result.accuracy[1, 0] > 0.5


@pytest.mark.parametrize("method", ["ssd", "lwf+ewc"])
def test_own_module(method: str) -> None:
    """Sizes come from its Top-K layer, and each run has its own copy or call."""
    torch.manual_seed(0)
    module = network()
    before = [p.clone() for p in module.parameters()]
    result = ssd.run(blobs(), method, tasks=2, model=module, seeds=2, epochs=30, device="cpu")
    assert (result.config.neurons, result.config.k) == (32, 8)
    assert (result.config.lr, result.config.protection) == (0.05, "none")
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert result.accuracy[0, 0] > 0.9
    made = []

    def make() -> nn.Module:
        made.append(network())
        return made[-1]

    ssd.run(blobs(), method, tasks=2, model=make, seeds=2, epochs=1, device="cpu")
    assert len(made) == 3  # the first one is measured


def test_own_network() -> None:
    class Two(Network):
        layer = "first"

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(20, 16), nn.Linear(16, 4)

        def respond(self, address: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(address).relu())

    result = ssd.run(blobs(), "ewc", tasks=2, model=Two, lr=0.1, epochs=5, device="cpu")
    assert (result.config.neurons, result.config.lr) == (16, 0.1)
    assert result.frequency.shape == (1, 2, 16)
    assert "ewc on features" in repr(result)
    alone = ssd.run(blobs(), "sdmlp", tasks=2, model=Two, lr=0.1, epochs=1, device="cpu")
    assert "Two on features" in repr(alone)


def test_callbacks() -> None:
    seen = []
    result = ssd.run(
        blobs(), tasks=2, callbacks=[lambda trainer, event: seen.append(event)], **SMALL
    )
    assert [e.task for e in seen if e.kind == "task"] == [0, 1]
    epochs = [event for event in seen if event.kind == "epoch"]
    logged = [record["loss"] for record in result.records[0]]
    assert [event.records[0]["loss"] for event in epochs] == logged


def test_callbacks_that_are_context_managers_are_left() -> None:
    class Log:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __enter__(self) -> None:
            self.seen.append("begun")

        def __exit__(self, kind: Any, *_: object) -> None:
            self.seen.append(kind)

        def __call__(self, trainer: Any, event: Any) -> None:
            if event.kind == "task":
                self.seen.append(event.task)

    log = Log()
    ssd.run(blobs(), tasks=2, callbacks=[log], **SMALL)
    assert log.seen == ["begun", 0, 1, None]
    log = Log()

    def fail(trainer: Any, event: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ssd.run(blobs(), tasks=2, callbacks=[log, fail], **SMALL)
    assert log.seen == ["begun", ZeroDivisionError]


def test_folder_is_kept_and_goes_on(tmp_path: Path) -> None:
    def stop(trainer: Any, event: Any) -> None:
        if event.kind == "task":
            raise KeyboardInterrupt

    expected = ssd.run(blobs(), tasks=2, seeds=2, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        ssd.run(blobs(), tasks=2, seeds=2, out=tmp_path / "runs", callbacks=[stop], **SMALL)
    result = ssd.run(blobs(), tasks=2, seeds=2, out=tmp_path / "runs", **SMALL)
    np.testing.assert_array_equal(result.accuracies, expected.accuracies)
    np.testing.assert_array_equal(result.frequency, expected.frequency)
    assert sorted(path.name for path in (tmp_path / "runs").glob("seed*")) == ["seed0", "seed1"]
    again = ssd.run(blobs(), tasks=2, seeds=2, out=tmp_path / "runs", **SMALL)
    assert again.summaries == result.summaries
    with pytest.raises(UserError, match="another configuration"):
        ssd.run(blobs(), tasks=2, seeds=2, out=tmp_path / "runs", **{**SMALL, "epochs": 3})


def test_quiet_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    ssd.run(blobs(), tasks=2, **SMALL)
    assert capsys.readouterr() == ("", "")
    ssd.run(blobs(), tasks=2, quiet=False, **SMALL)
    assert "task 2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learning_rate": 1}, TypeError, "no setting 'learning_rate'"),
        ({"data": "mnist-6k"}, UserError, "'mnist-6k' is neither a file nor one of mnist"),
        ({"data": (1, 2, 3)}, UserError, "x_train, y_train, x_test, y_test"),
        ({"data": 7}, UserError, "not int"),
        ({"data": blobs(), "tasks": stream()}, UserError, "exclude each other"),
        ({"tasks": []}, UserError, "list of tasks"),
        ({"tasks": [stream()[0], [a[:, :3] if a.ndim > 1 else a for a in stream()[1]]]},
         UserError, "differ in the shape"),
        ({"tasks": [[[1], [2]]]}, UserError, r"task 0: a set must hold pairs"),
        ({"tasks": stream(), "validation": 0.1}, UserError, "validation needs data"),
        ({"data": blobs(), "tasks": 3}, UserError, "does not divide"),
        ({"data": blobs(), "seeds": 0}, UserError, "seeds 0"),
        ({"data": blobs(), "lr": -1}, UserError, "lr -1"),
        ({"data": blobs(), "device": "abacus"}, UserError, "abacus"),
        ({"data": blobs(), "model": nn.Linear(20, 4)}, ValueError, "no TopK or TopKLinear"),
    ],
)  # fmt: skip
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ssd.run(**arguments)


def test_import_is_light() -> None:
    """`import ssd` alone imports no torch, and ssd.run leaves matplotlib's backend alone."""
    code = (
        "import sys, ssd; assert 'torch' not in sys.modules; assert 'run' in dir(ssd); ssd.run;"
        " assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
