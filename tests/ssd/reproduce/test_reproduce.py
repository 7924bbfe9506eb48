"""Reproduction: end to end on tiny data, resumed, with parts missing, and right by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_resume import write_features
from matplotlib import pyplot as plt
from torch import Tensor

from ssd import config, progress, study
from ssd.config import Config, Protocol
from ssd.data import Task
from ssd.errors import Diverged
from ssd.metrics import estimate
from ssd.reproduce import __main__ as reproduce
from ssd.reproduce import experiments, reproduction
from ssd.reproduce.claims import paired, verdicts
from ssd.reproduce.experiments import PAPER, RESULTS, TABLE1, Peer, Row
from ssd.reproduce.figures import draw
from ssd.reproduce.lines import Line, overlaps
from ssd.reproduce.tables import markdown_text, provenance, records, task_records
from ssd.run import Interrupted, RunOptions
from ssd.study import Run
from ssd.trainer import Event

TINY = {"epochs": 8, "neurons": 24, "k": 4, "batch_size": 16, "anneal_samples": 40, "lr": 1.0}
UNKNOWN = "unheard-of"  # a method that no version trains
RUN = ["naive", "sdmlp", "ssd", "ssd+ewc", "joint"]


def majority(
    tasks: Sequence[Task], classes: int, neurons: int, config: Config, share: float
) -> Tensor:
    """A peer that answers the first class of each task, for `share` of its accuracy."""
    right = torch.tensor([(t.y_test == t.classes[0]).double().mean() for t in tasks])
    return share * right.double().expand(len(tasks), -1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with tiny feature files of two benchmarks and a tiny protocol."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSD_DATA", "data")
    Path("data/features").mkdir(parents=True)
    write_features(Path("data/features/cifar10.npz"), 96)
    write_features(Path("data/features/cifar100.npz"), 120)
    benchmarks = experiments.BENCHMARKS[1:]  # MNIST is no feature file
    monkeypatch.setattr("ssd.storage.run_folder.commit", lambda: "c0ffee")  # never dirty
    monkeypatch.setattr(experiments, "SEEDS", (0, 1))
    monkeypatch.setattr(experiments, "SHORT_OWN", {})
    monkeypatch.setattr(experiments, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(experiments, "SIZES", (24, 32))
    for name in ("features", "cifar100"):
        monkeypatch.setitem(config.PROTOCOLS, name, Protocol({}, {"tasks": 2, **TINY}))
    monkeypatch.setattr(experiments, "SHORT_SEEDS", (0, 1))
    few = {"subnetwork": (2.0, "R/k"), "kl": ("forward",)}
    monkeypatch.setattr(experiments, "ABLATIONS", few)
    settings = {name: {"share": 0.5} for name in ("cifar10", "cifar100")}
    monkeypatch.setattr(experiments, "PEERS", {"majority": Peer(majority, settings=settings)})
    monkeypatch.setattr(experiments, "TABLE1", (UNKNOWN, *RUN))
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of something else: drawing takes longer than tiny runs."""
    monkeypatch.setattr(reproduction, "draw", lambda *result: [])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were trained."""
    names: list[str] = []

    def count(batch: Sequence[Run], options: RunOptions) -> None:
        names.extend(run.name for run in batch if run.evaluation is None)
        original(batch, options)

    original = study.train_batch
    monkeypatch.setattr(study, "train_batch", count)
    return names


def table(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def call(*arguments: str) -> int:
    return reproduce.main([*arguments, "--short", "--device", "cpu"])


def summaries() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in Path("runs").glob("*/*/summary.json")]


@pytest.mark.slow
def test_everything(
    folder: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("all") == 0
    out = folder / "results" / "reproduction-short"
    printed, said = capsys.readouterr()
    for name in RESULTS:
        assert f"{name}: {RESULTS[name].title}" in printed
        text = (out / f"{name}.md").read_text()
        assert "--short: scaled down" in text
        for fact in ("command: python -m ssd.reproduce all", "machine:", "torch ", "seeds: 0, 1"):
            assert fact in text
            assert fact in (out / f"{name}.csv").read_text()
        assert "± is the standard error of the mean over seeds" in text
        assert "warning" not in text
        spread = (out / f"{name}.csv").read_text().splitlines()[0]
        assert spread.startswith("# spread: standard error of the mean over seeds")
    for stem in (
        "table1",
        "bwt",
        "table2",
        "ablations",
        "structure_cifar10_24",
        "structure_heat_maps_cifar10_24",
    ):
        assert plt.imread(out / f"{stem}.png")[..., :3].std() > 0.02
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    assert not plt.get_fignums()
    assert said.count("\n") == 1
    assert said.startswith(f"note: left out, refused: method {UNKNOWN} must be any of ")
    rows = table(out / "table1.csv")
    assert [r["method"] for r in rows if r["neurons"] == "24"] == 2 * [UNKNOWN, *RUN]
    assert all(("refused" in r["note"]) == (r["method"] == UNKNOWN) for r in rows)
    # Two benchmarks, two seeds; three methods of one at the large size; the ablations, and two
    # methods at another learning rate.
    assert len(trained) == 2 * 2 * len(RUN) + 2 * 3 + 2 * 3 + 2 * 2
    assert f"{len(trained) + 4} runs trained" in printed  # with the peer's
    took = entry("all")
    assert took["runs_needed"] == took["runs_trained"] == len(trained) + 4
    assert took["finished"]
    assert took["seconds"] > 0
    structure = table(out / "structure.csv")
    for row in structure:
        assert (row["jaccard"] == row["kl_bits"] == "") == (row["method"] == UNKNOWN)
        # Address and coverage are of an SDMLP; at the large size three methods are run.
        found = [row[m] != "" for m in ("address_cosine", "effective_rank", "used_fraction")]
        assert found == [row["method"] in ("sdmlp", "ssd", "ssd+ewc")] * 3
    assert {r["measure"] for r in table(out / "structure_tasks.csv")} == {
        "mean_entropy_bits",
        "dead_fraction",
        "mean_active",
        "jaccard",
        "kl_bits",
        "address_cosine",
        "effective_rank",
        "used_fraction",
    }
    # The second time nothing is trained, and the tables are the same but for their origin.
    trained.clear()
    monkeypatch.setattr(reproduction, "draw", lambda *result: [])
    assert call("all") == 0
    assert trained == []
    assert "0 runs trained" in capsys.readouterr().out
    assert table(out / "table1.csv") == rows
    assert entry("all") == took


def entry(arguments: str) -> dict[str, Any]:
    """What command.json says of a command."""
    path = Path("results/reproduction-short/command.json")
    return json.loads(path.read_text())[f"python -m ssd.reproduce {arguments} --short --device cpu"]


@pytest.mark.usefixtures("no_figures")
def test_table_is_what_the_summaries_say(folder: Path) -> None:
    assert call("table1", "bwt", "table2", "--only", "cifar10", "24", "ssd", "majority") == 0
    ours = [s for s in summaries() if s["method"] == "ssd"]
    assert sorted(s["seed"] for s in ours) == [0, 1]
    distances: list[float] = []
    for name, measure in (("table1", "mean_accuracy"), ("bwt", "bwt"), ("bwt", "forgetting")):
        rows = table(folder / "results" / "reproduction-short" / f"{name}.csv")
        [row] = [r for r in rows if (r["neurons"], r["method"]) == ("24", "ssd") and r["seeds"]]
        first, second = (s[measure] for s in ours)
        distances.append(abs(first - second))
        assert float(row[measure]) == pytest.approx((first + second) / 2, abs=1e-15)
        # The standard error of two values is half their distance.
        assert float(row[f"{measure}_standard_error"]) == pytest.approx(abs(first - second) / 2)
        assert row["seeds"].split() == ["0", "1"]
    assert max(distances) > 0
    rows = table(folder / "results" / "reproduction-short" / "table2.csv")
    [row] = [r for r in rows if (r["benchmark"], r["method"]) == ("cifar10", "majority")]
    assert float(row["mean_accuracy"]) == 0.25  # half of each task's two classes, halved
    [other] = [r for r in rows if (r["benchmark"], r["method"]) == ("cifar100", "majority")]
    assert other["mean_accuracy"] == ""
    assert other["note"] == "2 of 2 seeds not run (left out by --only)"


@pytest.mark.parametrize("entry", ["1", "{}", '{"commits": 3, "runs_trained": 1, "seconds": 2}'])
def test_damaged_record(folder: Path, capsys: pytest.CaptureFixture[str], entry: str) -> None:
    path = Path("results/reproduction-short/command.json")
    path.parent.mkdir(parents=True)
    path.write_text(f'{{"a command": {entry}}}')
    assert call("table1") == 2
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_what_diverges_leaves_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def singular(tasks: Sequence[Task], *rest: Any, **settings: Any) -> Tensor:
        calls.append(len(tasks))
        raise Diverged("no solution")

    peer = Peer(singular, settings={"cifar10": {"share": 0.5}})
    monkeypatch.setattr(experiments, "PEERS", {"majority": peer})
    monkeypatch.setitem(
        config.PROTOCOLS,
        "features",
        Protocol({}, {"tasks": 2, **TINY, "lr": 1e30, "max_norm": 1e30}),
    )
    for trained in (2, 0):  # the second time it is known
        assert call("table1", "table2", "--only", "cifar10", "24", "majority", "sdmlp") == 0
        printed = capsys.readouterr().out
        assert printed.count(": diverged; left") == 2 * trained
        assert len(calls) == 2
    for name, method in (("table1", "sdmlp"), ("table2", "majority")):
        rows = table(folder / "results" / "reproduction-short" / f"{name}.csv")
        [row] = [
            r
            for r in rows
            if (r["benchmark"], r["method"]) == ("cifar10", method)
            and r["neurons"] in ("24", "0", "")
        ]
        assert row["mean_accuracy"] == ""
        assert "2 of 2 seeds diverged" in row["note"]


@pytest.mark.usefixtures("no_figures")
def test_interrupted_and_resumed(
    folder: Path,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = study.train_batch

    def stop(*arguments: Any) -> None:
        if trained:
            raise Interrupted
        train(*arguments)

    arguments = ["table1", "bwt", "--only", "cifar10", "24"]
    monkeypatch.setattr(study, "train_batch", stop)
    assert call(*arguments) == 130
    said = capsys.readouterr().err
    assert "go on with: python -m ssd.reproduce table1 bwt --only cifar10 24 --short" in said
    assert len(trained) == 2
    before = entry(" ".join(arguments))
    assert (before["runs_needed"], before["runs_trained"]) == (2 * len(RUN), 2)
    assert not before["finished"]
    out = folder / "results" / "reproduction-short"
    for name in ("table1", "bwt"):
        rows = [r for r in table(out / f"{name}.csv") if r["benchmark"] == "cifar10"]
        notes = {r["method"]: r["note"] for r in rows if r["neurons"] == "24"}
        assert notes.pop(UNKNOWN).startswith("refused")
        expected = {RUN[0]: "", **dict.fromkeys(RUN[1:], "2 of 2 seeds not run")}
        if name == "bwt":  # of joint training there is none
            del expected["joint"]
        assert notes == expected
    monkeypatch.setattr(study, "train_batch", train)
    assert call(*arguments) == 0
    assert len(trained) == len(set(trained)) == 2 * len(RUN)
    after = entry(" ".join(arguments))
    assert after["runs_needed"] == after["runs_trained"] == 2 * len(RUN)
    assert after["finished"]
    assert after["seconds"] > before["seconds"]
    assert "not run" not in {
        r["note"]
        for r in table(out / "table1.csv")
        if r["benchmark"] == "cifar10" and r["neurons"] == "24" and r["method"] in RUN
    }


@pytest.mark.usefixtures("no_figures")
def test_interrupt_within_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C: the run stops at its next step, leaves a checkpoint, and ends as if undisturbed."""
    import os
    import signal

    is_due, steps = progress.is_due, []

    def hit(event: Event) -> bool:
        steps.append(event)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return is_due(event)

    arguments = ["table1", "--only", "cifar10", "24", "ssd"]
    monkeypatch.setattr(progress, "is_due", hit)
    assert call(*arguments) == 130
    assert len(steps) == 2
    assert summaries() == []
    monkeypatch.setattr(progress, "is_due", is_due)
    assert call(*arguments) == 0
    assert call(*arguments, "--runs", "runs/undisturbed") == 0
    for seed in (0, 1):
        first, second = (
            s["accuracy_matrix"] for s in summaries() if (s["method"], s["seed"]) == ("ssd", seed)
        )
        assert first == second


@pytest.mark.usefixtures("no_figures")
def test_missing_features(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data/features/cifar100.npz").unlink()
    assert call("table1", "--only", "sdmlp", "24") == 0
    said = capsys.readouterr().err
    assert said.count("cifar100.npz is not a file") == 1
    rows = table(folder / "results" / "reproduction-short" / "table1.csv")
    for row in rows:
        if row["benchmark"] == "cifar100":
            assert "no data: features data/features/cifar100.npz is not a file" in row["note"]
            assert row["mean_accuracy"] == ""
        elif (row["method"], row["neurons"]) == ("sdmlp", "24"):
            assert (row["note"], row["seeds"]) == ("", "0 1")


@pytest.mark.usefixtures("no_figures")
def test_hints_of_what_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Protocol({}, {"tasks": 2, **TINY, "anneal_samples": 10_000})
    monkeypatch.setitem(config.PROTOCOLS, "cifar100", tiny)
    assert call("table1", "--only", "cifar100", "sdmlp", "24") == 0
    assert call("table1", "--only", "cifar10", "sdmlp", "24") == 0
    said = [text for text in capsys.readouterr().err.splitlines() if "left out" not in text]
    assert len(said) == 1
    assert said[0].startswith(
        "note: Split CIFAR-100 features (50 tasks): anneal_samples 10,000 is more than the "
    )


BAD = {
    "unknown result": (["table9"], "table9 is unknown; choose from table1, "),
    "unknown name": (["table1", "--only", "cifar11"], "--only cifar11 is unknown; choose from"),
    "no device": (["--device", "gpu"], "--device gpu is not a device"),
    "out is a file": (["--out", "file"], "--out file is not a folder"),
    "runs is a file": (["--runs", "file"], "--runs file is not a folder"),
    "no data at all": (["--features-folder", "absent"], "no data: features absent/cifar10.npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    Path("file").write_text("")
    arguments, message = BAD[case]
    assert reproduce.main(["--short", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (folder / "runs").exists()
    assert not (folder / "results").exists()


@pytest.mark.usefixtures("no_figures")
def test_features_of_another_shape(folder: Path) -> None:
    """A file that the stream cannot be cut from costs its own rows alone."""
    write_features(folder / "data/features/cifar100.npz", 60, classes=3)
    assert call("table1", "--only", "sdmlp", "24") == 0
    rows = table(folder / "results" / "reproduction-short" / "table1.csv")
    notes = {
        r["benchmark"]: r["note"] for r in rows if (r["neurons"], r["method"]) == ("24", "sdmlp")
    }
    assert notes["cifar10"] == ""
    assert notes["cifar100"].startswith("no data: tasks 2 does not divide the 3 classes")


def line(method: str, accuracy: Sequence[float], forgetting: float, row: Row) -> Line:
    """Forgetting differs by 0.02 from seed to seed; BWT is its negative."""
    return Line(
        replace(row, method=method),
        [
            {"seed": n, "mean_accuracy": a, "forgetting": lost, "bwt": -lost}
            for n, a in enumerate(accuracy)
            for lost in [forgetting + 0.01 * (2 * n - len(accuracy) + 1)]
        ],
    )


@pytest.fixture
def row() -> Row:
    benchmark = next(b for b in experiments.BENCHMARKS if b.name == "cifar10")
    return Row(benchmark, "sdmlp", Config(neurons=10_000), (0, 1))


def judged(*lines: Line) -> list[str]:
    return [verdict.rpartition(": ")[2] for verdict in verdicts(lines)]


def test_claims(row: Row) -> None:
    sdmlp = line("sdmlp", [0.70, 0.72], 0.20, row)
    best = line("ssd+ewc", [0.85, 0.89], 0.10, row)
    good = judged(sdmlp, line("ssd", [0.80, 0.82], 0.13, row), best)
    over = "over 2 class orders"
    assert good == [
        "yes (0.7100 ± 0.0100 / 0.8100 ± 0.0100 / 0.8700 ± 0.0200; "
        f"paired +0.1000 ± 0.0000 {over} and paired +0.0600 ± 0.0100 {over})",
        "yes (-0.2000 ± 0.0100 / -0.1300 ± 0.0100 / -0.1000 ± 0.0100; "
        f"paired +0.0700 ± 0.0000 {over} and paired +0.0300 ± 0.0000 {over})",
        f"yes (paired +0.1000 ± 0.0000 {over})",
        f"yes (paired +0.0600 ± 0.0100 {over})",
        f"yes (0.2000 to 0.1300, -35%; paired -0.0700 ± 0.0000 {over})",
    ]
    assert judged(sdmlp, best) == []  # without SSD there is nothing to judge
    bad = judged(sdmlp, line("ssd", [0.68, 0.78], 0.19, row), line("ssd+ewc", [0.7], 0.3, row))
    assert [verdict.split()[0] for verdict in bad] == ["undecided,", "undecided,", "no", "no", "no"]
    close = judged(
        sdmlp, line("ssd", [0.68, 0.78], 0.19, row), line("ssd+ewc", [0.76, 0.78], 0.185, row)
    )
    assert [verdict.split()[0] for verdict in close] == ["no"] * 5
    none = judged(sdmlp, line("ssd", [], 0.1, row), best)
    assert none == ["not run"] * 5


def test_claims_hold_at_their_bounds(row: Row) -> None:
    found = judged(
        line("sdmlp", [0.70, 0.70], 0.20, row),
        line("ssd", [0.75, 0.75], 0.14, row),
        line("ssd+ewc", [0.80, 0.80], 0.10, row),
    )
    assert [verdict.split()[0] for verdict in found] == ["yes"] * 5


def test_claim_of_the_best_figure(row: Row) -> None:
    mnist = next(b for b in experiments.BENCHMARKS if b.name == "mnist")
    for accuracy, verdict in (([0.85, 0.87], "yes"), ([0.85, 0.86], "no"), ([], "not")):
        rest = [line(m, [0.5, 0.6], 0.2, replace(row, benchmark=mnist)) for m in ("sdmlp", "ssd")]
        best = line("ssd+ewc", accuracy, 0.1, replace(row, benchmark=mnist))
        found = list(verdicts([*rest, best]))
        assert len(found) == 6
        assert "SSD+EWC reaches 0.86 in accuracy: " + verdict in found[-1]


def test_differences_are_paired_by_seed(row: Row) -> None:
    """Of seeds that both have, however they are listed."""
    first = line("sdmlp", [0.1, 0.5, 0.9], 0.2, row)
    second = line("ssd", [0.2, 0.7], 0.2, row)
    swapped = Line(second.row, second.summaries[::-1])
    assert paired(first, swapped, "mean_accuracy") == pytest.approx([0.1, 0.2])
    assert paired(first, Line(row, []), "mean_accuracy") == []


def test_published_figures(row: Row) -> None:
    result = RESULTS["table1"]
    [record] = records(result, [line("ssd", [0.80, 0.84], 0.1, row)])
    assert record["paper"] == 0.81
    assert record["difference"] == pytest.approx(0.01)
    assert record["paper_inferred"] is False
    [record] = records(RESULTS["bwt"], [line("sdmlp", [0.80, 0.84], 0.1, row)])
    assert record["difference"] == pytest.approx(0.0828)
    methods = {*TABLE1, "FlyModel"}
    for benchmark, neurons, method, measure in PAPER:
        assert benchmark in {b.name for b in experiments.BENCHMARKS}
        assert neurons in experiments.SIZES
        assert method in methods
        assert measure in ("mean_accuracy", "bwt")


def test_inferred_is_explained_where_it_is_shown(row: Row) -> None:
    small = replace(row, config=replace(row.config, neurons=1000))
    for name, shows in (("table1", True), ("bwt", False)):
        lines = [line("sdmlp", [0.7], 0.1, row), line("ssd+ewc", [0.7], 0.1, small)]
        text = markdown_text("title", RESULTS[name], lines, {})
        assert "Published figures: Xue et al., AAAI 2026" in text
        assert ("inferred: which row it is of" in text) is shows
    # Where nothing was published there are no columns for it.
    text = markdown_text("title", RESULTS["bwt"], [line("ssd+ewc", [0.7], 0.1, row)], {})
    assert "| method | bwt | forgetting | seeds | note |" in text


@pytest.mark.parametrize(
    ("commits", "warning"),
    [
        (["a", "a"], ""),
        (["a", "b"], "runs of 2 commits"),
        (["a-dirty", "a-dirty"], "runs with uncommitted changes"),
        (["a", "a-dirty"], "runs of 2 commits, with uncommitted changes"),
        (["unknown"], "runs of an unknown commit"),
        ([], ""),
    ],
)
def test_runs_of_several_commits(row: Row, commits: list[str], warning: str) -> None:
    runs = [
        {
            "seed": n,
            "commit": c,
            "device": "cpu",
            "evaluated_on": "test",
            "seconds": 1.0,
            "versions": {"torch": "2.6"},
        }
        for n, c in enumerate(commits)
    ]
    origin = provenance("command", [Line(row, runs)])
    assert origin.get("warning", "") == warning
    assert ("warning" in origin) == bool(warning)


@pytest.mark.usefixtures("no_figures")
def test_warning_of_several_commits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("table1", "--only", "cifar10", "sdmlp", "24") == 0
    monkeypatch.setattr("ssd.storage.run_folder.commit", lambda: "decaf-dirty")
    assert call("table1", "--only", "cifar10", "ssd", "24") == 0
    said = capsys.readouterr().err
    warning = "runs of 2 commits, with uncommitted changes"
    assert said.count(f"note: table1 shows {warning}\n") == 1
    text = (folder / "results/reproduction-short/table1.md").read_text()
    assert f"- warning: {warning}" in text


def test_standard_error() -> None:
    values = [0.1, 0.4, 0.35, 0.8]
    center, error = estimate(values)
    assert center == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / sqrt(4))
    assert estimate([0.3]) == (0.3, None)


@pytest.mark.parametrize("short", [True, False])
def test_definitions(short: bool) -> None:
    for result in RESULTS.values():
        rows = result.rows(short, {"cifar10": "a.npz", "cifar100": "b.npz"})
        assert len(set(rows)) == len(rows)
        for row in rows:
            if set(row.config.method.split("+")) <= set(config.method_parts()):
                row.config.validate()
            tasks = 50 if row.benchmark.name == "cifar100" else 5
            assert row.config.tasks == (1 if row.method == "joint" else tasks)
    # The switch to inhibition can end within the first task: a neuron counts once a sample.
    first = {"mnist": 12_665, "cifar10": 10_000, "cifar100": 1_000}
    joint = {"mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}
    for row in RESULTS["table1"].rows(short, {}):
        samples = joint if row.method == "joint" else first
        counted = row.config.epochs * samples[row.benchmark.name]
        assert row.config.anneal_samples < counted


def test_short_settings_of_each_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own settings, epochs among them, hold at their size alone; nothing in full."""
    own = {"epochs": 3, "lr": 1.25, "alpha": 0.9}
    monkeypatch.setattr(experiments, "SHORT_OWN", {("mnist", 10_000, "ssd"): own})
    for short in (True, False):
        found = {
            (r.neurons, r.method): r.config
            for r in experiments.table1(short, {})
            if r.benchmark.name == "mnist"
        }
        changed, other = found[10_000, "ssd"], found[1_000, "ssd"]
        assert ({name: getattr(changed, name) for name in own} == own) is short
        assert other.epochs != own["epochs"]
        assert (changed.eval_every == own["epochs"]) is short


@pytest.mark.parametrize("large", [False, True])
def test_class_orders_of_the_rows_where_claims_are_judged(large: bool) -> None:
    rows = experiments.table1(True, {})
    if large:
        rows = experiments.over_all_orders(rows)
    for benchmark in experiments.BENCHMARKS:
        for neurons in experiments.SIZES:
            seeds = {
                r.method: r.seeds for r in rows if (r.benchmark, r.neurons) == (benchmark, neurons)
            }
            expected = experiments.SEEDS
            if neurons > experiments.SIZES[0]:
                if benchmark.name not in experiments.SHORT_LARGE_ON:
                    assert not seeds
                    continue
                expected = experiments.SEEDS if large else experiments.SHORT_SEEDS
            assert {seeds[m] for m in experiments.SHORT_LARGE} == {expected}
            others = {s for m, s in seeds.items() if m not in experiments.SHORT_LARGE}
            assert others <= {experiments.SHORT_SEEDS}


def test_large_adds_class_orders(
    folder: Path, no_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "SEEDS", (0, 1, 2))
    monkeypatch.setattr(experiments, "SHORT_LARGE_ON", ("cifar10",))
    command = ["bwt", "--short", "--only", "cifar10", "32", "sdmlp"]
    for more, count in (([], 2), (["--large"], 3)):
        assert reproduce.main([*command, *more]) == 0
        assert len(list(folder.glob("runs/*/*/config.json"))) == count
    assert reproduce.main(["bwt", "--large"]) == 2


def test_note_of_networks_that_are_trained_short() -> None:
    for short in (True, False):
        for row in experiments.table2(short, {}):
            noted = row.peer is not None and bool(row.peer.method) and not short
            assert bool(row.note) == noted
            assert Line(row, [], "not run").note == (f"{row.note}; " if noted else "") + "not run"


def test_overlaps() -> None:
    frequency = torch.tensor([[0.9, 0.8, 0.1, 0.0], [0.9, 0.0, 0.8, 0.1], [0.9, 0.0, 0.8, 0.1]])
    found = overlaps(frequency, 2)
    assert found["jaccard"] == [None, pytest.approx(1 / 3), 1.0]  # {0, 1}, {0, 2}, {0, 2}
    [first, second, third] = found["kl_bits"]
    assert first is None
    assert second > 0.5
    assert third == pytest.approx(0.0, abs=1e-12)


def test_structure_over_tasks(row: Row) -> None:
    """Comparisons begin with the second task; a measure that no run recorded is left out."""
    runs = [
        {"seed": n, "mean_entropy_bits": [0.4, 0.2], "structure": {"jaccard": [None, j]}}
        for n, j in enumerate((0.25, 0.75))
    ]
    measured = Line(replace(row, config=replace(row.config, tasks=2)), runs)
    found = {(r["measure"], r["task"]): r for r in task_records(RESULTS["structure"], [measured])}
    assert set(found) == {("mean_entropy_bits", 0), ("mean_entropy_bits", 1), ("jaccard", 1)}
    assert found["jaccard", 1]["mean"] == 0.5
    assert found["jaccard", 1]["standard_error"] == pytest.approx(0.25)
    [record] = records(RESULTS["structure"], [measured])
    assert record["mean_entropy_bits"] == pytest.approx(0.3)
    assert record["jaccard"] == 0.5
    assert record["kl_bits"] is None
    [(stem, figure)] = draw("structure", RESULTS["structure"], [measured])
    assert stem == "structure_cifar10_10000"
    assert len(figure.axes) == 2
    plt.close(figure)


def test_ablations_figure_tells_methods_apart(row: Row) -> None:
    """The title names the default's method; a row of another one bears its own."""
    rows = [
        replace(row, method=method, factor=factor, value=value)
        for method, factor, value in (
            ("ssd", experiments.DEFAULT, ""),
            ("ssd", "kl", "forward"),
            ("sdmlp", "lr", "0.5"),
            ("ssd", "lr", "0.5"),
        )
    ]
    lines = [Line(row, [{"seed": 0, "mean_accuracy": 0.5, "bwt": -0.1}]) for row in rows]
    for shown, labels in (
        (lines, ["lr = 0.5", "sdmlp, lr = 0.5", "kl = forward"]),
        (lines[1:], ["lr = 0.5", "sdmlp, lr = 0.5", "kl = forward"]),  # the default was not run
    ):
        [(stem, figure)] = draw("ablations", RESULTS["ablations"], shown)
        assert stem == "ablations"
        assert figure.get_suptitle() == "SSD on Split CIFAR-10 features, R = 10,000"
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == labels
        plt.close(figure)


@pytest.mark.usefixtures("no_figures")
def test_a_command_on_other_data_is_recorded_anew(folder: Path) -> None:
    arguments = ["table1", "--only", "cifar10", "24", "sdmlp"]
    for samples in (96, 100):
        write_features(Path("data/features/cifar10.npz"), samples)
        assert call(*arguments) == 0
        assert entry(" ".join(arguments))["runs_trained"] == 2
    assert len(summaries()) == 4


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("module", ["storage.run_folder", "peers.learners"])
def test_runs_of_another_algorithm_are_trained_anew(
    folder: Path, trained: list[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["table2", "--only", "cifar10", "24", "ssd", "majority"]
    assert call(*arguments) == 0
    first = len(summaries())
    monkeypatch.setattr(f"ssd.{module}.ALGORITHM", 0)
    assert call(*arguments) == 0
    assert len(trained) == (4 if module == "storage.run_folder" else 2)
    assert len(summaries()) == first + 2  # seeds of the method, or of the peer


def test_heat_maps(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every panel shows the same neurons in the same order, of a seed that all methods have."""
    monkeypatch.setattr("ssd.reproduce.figures.HEAT_MAP_NEURONS", 3)
    frequency = {
        "sdmlp": [[0.1, 0.0, 0.9, 0.0, 0.3], [0.1, 0.0, 0.0, 0.5, 0.9]],
        "ssd+ewc": [[0.1, 0.0, 0.9, 0.0, 0.1], [0.1, 0.0, 0.4, 0.5, 0.7]],
    }
    lines = []
    for method, seeds in (("ssd+ewc", (1, 2)), ("sdmlp", (0, 1)), ("l2", (0, 1)), ("ssd", (1,))):
        folders = [tmp_path / f"{method}{seed}" for seed in seeds]
        runs = [{"seed": seed, "mean_entropy_bits": [0.4, 0.2]} for seed in seeds]
        for folder, seed in zip(folders, seeds, strict=True):
            folder.mkdir()
            if method in frequency:  # nothing of ssd is left but its summary
                values = frequency[method] if seed == 1 else np.zeros((2, 5))
                np.save(folder / "activation_frequency.npy", values)
        config = replace(row.config, tasks=2, neurons=5)
        lines.append(Line(replace(row, method=method, config=config), runs, folders=folders))
    figures = dict(draw("structure", RESULTS["structure"], lines))
    assert list(figures) == ["structure_cifar10_5", "structure_heat_maps_cifar10_5"]
    panels = [axes for axes in figures["structure_heat_maps_cifar10_5"].axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["sdmlp", "ssd+ewc"]
    for axes, values in zip(panels, frequency.values(), strict=True):
        # Neurons 4, 2 and 3 are the most active; 2 serves task 0 most, 4 more than 3 task 1.
        np.testing.assert_array_equal(axes.images[0].get_array(), np.array(values)[:, [2, 4, 3]])
        assert axes.images[0].get_clim() == (1e-3, 1)
    for figure in figures.values():
        plt.close(figure)
    other = Line(lines[0].row, lines[0].summaries[1:], folders=lines[0].folders[1:])
    assert len(draw("structure", RESULTS["structure"], [lines[1], other])) == 1  # no common seed
    plt.close("all")


@pytest.mark.parametrize("short", [False, True])
def test_every_ablation_changes_something(short: bool) -> None:
    features = {benchmark.name: "features.npz" for benchmark in experiments.BENCHMARKS}
    default, *rows = experiments.ablations(short, features)
    assert {row.factor for row in rows} == set(experiments.ABLATIONS) | ({"lr"} if short else set())
    others = [len(values) - 1 for values in experiments.ABLATIONS.values()]
    # Every value but the default; --short two at most, and two methods at another learning rate.
    assert len(rows) == (sum(min(n, 2) for n in others) + 2 if short else sum(others))
    for number, row in enumerate(rows):
        assert row.config not in (default.config, *(other.config for other in rows[:number]))


@pytest.mark.usefixtures("no_figures")
def test_processes_train_what_one_would(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["table1", "--only", "cifar10", "24", "sdmlp", "ssd"]
    assert call(*arguments, "--runs", "runs/one") == 0
    one = {path.parent.name: path.read_text() for path in Path("runs/one").glob("*/*.csv")}
    monkeypatch.setattr(study, "processes_for", lambda *_: 2)
    assert call(*arguments, "--runs", "runs/several") == 0
    several = {path.parent.name: path.read_text() for path in Path("runs/several").glob("*/*.csv")}
    assert len(one) == 4
    assert one == several
    assert "run 4 of 4" in capsys.readouterr().out
