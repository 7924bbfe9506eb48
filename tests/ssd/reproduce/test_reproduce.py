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
from ssd.config import Config
from ssd.data import Task
from ssd.errors import Diverged
from ssd.metrics import estimate
from ssd.reproduce import __main__ as reproduce
from ssd.reproduce import experiments, reproduction
from ssd.reproduce.claims import differences, paired, verdicts
from ssd.reproduce.experiments import (
    METHODS,
    PAPER_SSD,
    PAPER_SSD_EWC,
    PUBLISHED,
    RESULTS,
    Method,
    Peer,
    Row,
)
from ssd.reproduce.figures import COLORS, draw
from ssd.reproduce.lines import Line, overlaps
from ssd.reproduce.tables import markdown_text, provenance, records, task_records
from ssd.runs import Interrupted, RunOptions
from ssd.study import Run
from ssd.trainer import Event

TINY = {
    "tasks": 2,
    "epochs": 8,
    "k": 4,
    "batch_size": 16,
    "anneal_samples": 40,
    "lr": 1.0,
    "ewc_coefficient": 10.0,
}
UNKNOWN = "unheard-of"  # a method that no version trains
RUN = ["naive", "sdmlp", PAPER_SSD, "ssd", "ssd+ewc", "joint"]


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
    # MNIST is no feature file.
    benchmarks = tuple(replace(b, short=TINY) for b in experiments.BENCHMARKS[1:])
    monkeypatch.setattr("ssd.storage.run_folder.commit", lambda: "c0ffee")  # never dirty
    monkeypatch.setattr(experiments, "SEEDS", (0, 1))
    monkeypatch.setattr(experiments, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(experiments, "SIZES", (24, 32))
    monkeypatch.setattr(experiments, "SHORT_SEEDS", (0, 1))
    few = {PAPER_SSD: {"subnetwork": (2.0, "R/k")}, "ssd": {"alpha": (0.5,)}}
    monkeypatch.setattr(experiments, "ABLATIONS", few)
    settings = {name: {"share": 0.5} for name in ("cifar10", "cifar100")}
    monkeypatch.setattr(experiments, "PEERS", {"majority": Peer(majority, settings=settings)})
    monkeypatch.setattr(experiments, "LINEAR", ("majority",))
    methods = {name: replace(METHODS[name], own={}) for name in RUN}
    monkeypatch.setattr(experiments, "METHODS", {UNKNOWN: Method(UNKNOWN), **methods})
    monkeypatch.setattr(experiments, "LARGE", ("sdmlp", "ssd"))
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
    assert {r["method"] for r in rows if r["neurons"] == ""} == {"majority"}
    runs = table(out / "table1_runs.csv")
    for row in rows:
        found = [r for r in runs if all(r[n] == row[n] for n in ("benchmark", "neurons", "method"))]
        assert [r["seed"] for r in found] == row["seeds"].split()
        if found:
            values = [float(r["mean_accuracy"]) for r in found]
            assert np.mean(values) == pytest.approx(float(row["mean_accuracy"]))
    tested = table(out / "table1_differences.csv")
    assert {(r["method"], r["less"]) for r in tested} >= {("ssd", "sdmlp"), ("ssd+ewc", "ssd")}
    shown = (out / "ablations.md").read_text()
    assert "| ssd, alpha = 0.5 less ssd |" in shown
    assert all(("refused" in r["note"]) == (r["method"] == UNKNOWN) for r in rows)
    # Two seeds: two benchmarks, and the ablations.
    assert len(trained) == 2 * 2 * len(RUN) + 2 * 3
    assert f"{len(trained) + 4} runs trained" in printed  # with the peer's
    took = entry("all")
    assert took["runs_needed"] == took["runs_trained"] == len(trained) + 4
    assert took["finished"]
    assert took["seconds"] > 0
    structure = table(out / "structure.csv")
    for row in structure:
        assert (row["jaccard"] == row["kl_bits"] == "") == (row["method"] == UNKNOWN)
        # Address and coverage are of an SDMLP.
        found = [row[m] != "" for m in ("address_cosine", "effective_rank", "used_fraction")]
        assert found == [row["method"] not in (UNKNOWN, "naive")] * 3
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
    wild = {**TINY, "lr": 1e30, "max_norm": 1e30}
    benchmarks = [replace(b, short=wild) for b in experiments.BENCHMARKS]
    monkeypatch.setattr(experiments, "BENCHMARKS", benchmarks)
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
    needed = 2 * len(RUN) + 2  # with the peer's
    assert (before["runs_needed"], before["runs_trained"]) == (needed, 2)
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
    assert after["runs_needed"] == after["runs_trained"] == needed
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
    first, second = experiments.BENCHMARKS
    second = replace(second, short={**TINY, "anneal_samples": 10_000})
    monkeypatch.setattr(experiments, "BENCHMARKS", (first, second))
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
    sdmlp = line("sdmlp", [0.70, 0.72, 0.74], 0.20, row)
    best = line("ssd+ewc", [0.85, 0.87, 0.91], 0.10, row)
    good = judged(sdmlp, line("ssd", [0.80, 0.82, 0.84], 0.13, row), best)
    over = "over 3 class orders"
    # Differences 0.05, 0.05, 0.07: t = 8.5 with two degrees of freedom.
    assert good == [
        "yes (0.7200 ± 0.0115 / 0.8200 ± 0.0115 / 0.8767 ± 0.0176; "
        f"paired +0.1000 ± 0.0000 {over}, p 0 and paired +0.0567 ± 0.0067 {over}, p 0.014)",
        "yes (-0.2000 ± 0.0115 / -0.1300 ± 0.0115 / -0.1000 ± 0.0115; "
        f"paired +0.0700 ± 0.0000 {over}, p 0 and paired +0.0300 ± 0.0000 {over}, p 0)",
        f"yes (paired +0.1000 ± 0.0000 {over}, p 0)",
        f"yes (paired +0.0567 ± 0.0067 {over}, p 0.014)",
        f"yes (0.2000 to 0.1300, -35%; paired -0.0700 ± 0.0000 {over}, p 0)",
    ]
    assert judged(sdmlp, best) == []  # without SSD there is nothing to judge
    worse = line("ssd", [0.68, 0.78, 0.70], 0.19, row)
    bad = judged(sdmlp, worse, line("ssd+ewc", [0.7], 0.3, row))
    assert [verdict.split()[0] for verdict in bad] == ["undecided,", "undecided,", "no", "no", "no"]
    noisy = judged(sdmlp, worse, line("ssd+ewc", [0.76, 0.78, 0.72], 0.185, row))
    assert [verdict.split()[0] for verdict in noisy] == ["no", "yes", "no", "no", "no"]
    none = judged(sdmlp, line("ssd", [], 0.1, row), best)
    assert none == ["not run"] * 5


def test_claims_are_judged_of_the_papers_ssd_and_of_ours(row: Row) -> None:
    lines = [line(m, [0.5, 0.6], 0.2, row) for group in experiments.CLAIMS for m in group[1:]]
    found = list(verdicts([line("sdmlp", [0.5, 0.6], 0.2, row), *lines]))
    for method in ("ssd", PAPER_SSD):
        assert sum(f": {method} - sdmlp >= 0.05" in claim for claim in found) == 1


def test_differences(row: Row) -> None:
    """Of the pairs in PAIRS, and of an ablated row and its method's default."""
    default = line("ssd", [0.5, 0.6, 0.8], 0.1, replace(row, factor=experiments.DEFAULT))
    changed = line("ssd", [0.6, 0.6, 0.9], 0.1, replace(row, factor="alpha", value="0.5"))
    [found, bwt] = differences(RESULTS["ablations"], [default, changed])
    assert (found["method"], found["less"]) == ("ssd, alpha = 0.5", "ssd")
    assert found["difference"] == pytest.approx(0.2 / 3)
    assert found["standard_error"] == pytest.approx(0.1 / 3)
    assert found["p"] == pytest.approx(1 - 2 / sqrt(2 + 4))  # t = 2, two degrees of freedom
    assert (bwt["measure"], bwt["difference"]) == ("bwt", pytest.approx(0, abs=1e-12))
    before, after = experiments.PAIRS[0]
    lines = [line(before, [0.5, 0.6], 0.1, row), line(after, [0.6], 0.1, row)]
    [alone] = differences(RESULTS["table1"], lines)
    assert (alone["difference"], alone["standard_error"], alone["p"]) == (
        pytest.approx(0.1),
        None,
        None,
    )
    assert alone["class_orders"] == 1


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
        *others, third = experiments.CLAIMS[0]
        rest = [line(m, [0.5, 0.6], 0.2, replace(row, benchmark=mnist)) for m in others]
        best = line(third, accuracy, 0.1, replace(row, benchmark=mnist))
        found = list(verdicts([*rest, best]))
        assert len(found) == 6
        assert f"{PAPER_SSD_EWC} reaches 0.86 in accuracy: " + verdict in found[-1]


def test_differences_are_paired_by_seed(row: Row) -> None:
    """Of seeds that both have, however they are listed."""
    first = line("sdmlp", [0.1, 0.5, 0.9], 0.2, row)
    second = line("ssd", [0.2, 0.7], 0.2, row)
    swapped = Line(second.row, second.summaries[::-1])
    assert paired(first, swapped, "mean_accuracy") == pytest.approx([0.1, 0.2])
    assert paired(first, Line(row, []), "mean_accuracy") == []


def test_published_figures(row: Row) -> None:
    result = RESULTS["table1"]
    [record] = records(result, [line(PAPER_SSD, [0.80, 0.84], 0.1, row)])
    assert record["paper"] == 0.81
    assert record["difference"] == pytest.approx(0.01)
    assert record["paper_inferred"] is False
    [record] = records(RESULTS["bwt"], [line("sdmlp", [0.80, 0.84], 0.1, row)])
    assert record["difference"] == pytest.approx(0.0828)
    methods = {*METHODS, "FlyModel"}
    for benchmark, neurons, method, measure in PUBLISHED:
        assert benchmark in {b.name for b in experiments.BENCHMARKS}
        assert neurons in experiments.SIZES
        assert method in methods
        assert measure in ("mean_accuracy", "bwt")


def test_inferred_is_explained_where_it_is_shown(row: Row) -> None:
    small = replace(row, config=replace(row.config, neurons=1000))
    for name, shows in (("table1", True), ("bwt", False)):
        lines = [line("sdmlp", [0.7], 0.1, row), line(PAPER_SSD_EWC, [0.7], 0.1, small)]
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
    """A method's own settings hold on their benchmark alone; nothing in full."""
    own = {"mnist": {"epochs": 3, "lr": 1.25}}
    changed = {"lwf": replace(METHODS["lwf"], own=own)}
    monkeypatch.setattr(experiments, "METHODS", {**METHODS, **changed})
    for short in (True, False):
        found = {
            (r.benchmark.name, r.neurons): r.config
            for r in experiments.table1(short, {})
            if r.method == "lwf"
        }
        small, other = found["mnist", 1_000], found["cifar10", 1_000]
        assert ((small.epochs, small.lr) == (3, 1.25)) is short
        assert other.lr != 1.25
        assert other.epochs != 3
        assert (small.eval_every == 3) is short


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_controls_have_the_best_settings_of_their_sweep(name: str) -> None:
    """The first row of each control in results/sweeps, which rank by validation accuracy."""
    sweep = Path(__file__).parents[3] / f"results/sweeps/controls-{name}.csv"
    best: dict[str, dict[str, str]] = {}
    for record in sorted(table(sweep), key=lambda r: -float(r["mean_accuracy"])):
        kind = {"kl": " (paper)", "mse": " without protection"}[record["hidden_loss"]]
        method = record["method"]
        best.setdefault(method + kind if method.startswith("ssd") else method, record)
    assert set(best) >= {PAPER_SSD, PAPER_SSD_EWC, "ssd without protection", "ewc", "lwf", "sdmlp"}
    found = {r.method: r.config for r in experiments.table1(True, {}) if r.benchmark.name == name}
    for method, record in best.items():
        matters = {"lr"} | set(config.penalty_settings(*METHODS[method].parts.split("+")))
        if METHODS[method].parts.split("+")[0] in ("ssd", "lwf"):
            matters |= {"alpha", "temperature"}
        for setting in matters & record.keys():
            assert getattr(found[method], setting) == float(record[setting]), (method, setting)


def test_ours_is_the_everyday_preset_and_the_papers_is_the_papers() -> None:
    """The terms of `ssd` at --short are those of ssd.train; those of the paper, its presets'."""
    features = {b.name: "f.npz" for b in experiments.BENCHMARKS}
    found = {
        (short, r.benchmark.name, r.method): r.config
        for short in (True, False)
        for r in experiments.table1(short, features)
        if r.neurons == 1_000
    }
    for name in ("mnist", "cifar10"):
        given = {"dataset": "mnist"} if name == "mnist" else {"features": "f.npz"}
        samples = next(b.samples for b in experiments.BENCHMARKS if b.name == name)
        usual = config.resolve({**given, "method": "ssd+ewc"}, samples)
        ours = found[True, name, "ssd+ewc"]
        assert replace(ours, eval_every=usual.eval_every, features=usual.features) == usual
        paper = config.resolve({**given, "method": "ssd", "preset": "paper-1k"})
        assert replace(found[False, name, PAPER_SSD], features=paper.features) == paper


@pytest.mark.parametrize("short", [False, True])
def test_class_orders(short: bool) -> None:
    """All of them where a claim or a pair is judged, and none of those that chose settings."""
    judged = {m for group in (*experiments.CLAIMS, *experiments.PAIRS) for m in group}
    assert not judged & set(experiments.ASIDE)
    assert judged <= METHODS.keys()
    assert set(experiments.COMPARED) <= METHODS.keys()
    assert len(experiments.COMPARED) <= len(COLORS)
    for row in experiments.table1(short, {}):
        assert not {11, 12} & set(row.seeds)
        if row.neurons == experiments.SIZES[0] and row.method in judged:
            few = short and row.benchmark.name == experiments.LONGEST
            assert row.seeds == (experiments.SHORT_SEEDS if few else experiments.SEEDS)
    assert {r.neurons for r in experiments.table1(short, {})} == {0, *experiments.SIZES}


def test_large_adds_the_large_size(folder: Path, no_figures: None) -> None:
    command = ["bwt", "--short", "--only", "cifar10", "sdmlp"]
    for more, count in (([], 2), (["--large"], 4)):
        assert reproduce.main([*command, *more]) == 0
        assert len(list(folder.glob("runs/*/*/config.json"))) == count
    assert reproduce.main(["bwt", "--large"]) == 2
    assert reproduce.main(["bwt", "--short", "--only", "32"]) == 2


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
    """Each method has its own marks, its rows bear its name, and its default is a line."""
    rows = [
        replace(row, method=method, factor=factor, value=value)
        for method, factor, value in (
            ("ssd", experiments.DEFAULT, ""),
            ("ssd", "alpha", "0.5"),
            (PAPER_SSD, experiments.DEFAULT, ""),
            (PAPER_SSD, "alpha", "0.5"),
        )
    ]
    lines = [Line(row, [{"seed": 0, "mean_accuracy": 0.5, "bwt": -0.1}]) for row in rows]
    labels = [f"{PAPER_SSD}, alpha = 0.5", "ssd, alpha = 0.5"]
    for shown, defaults in ((lines, 2), (lines[1:], 1)):  # or a default was not run
        [(stem, figure)] = draw("ablations", RESULTS["ablations"], shown)
        assert stem == "ablations"
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == labels
        marks = [container.lines[0] for container in axes.containers]
        assert len({mark.get_color() for mark in marks}) == 2
        assert len({mark.get_marker() for mark in marks}) == 2
        vertical = [
            x for x in axes.lines if len(x.get_xdata()) == 2 and len(set(x.get_xdata())) == 1
        ]
        assert len(vertical) == defaults
        plt.close(figure)


def test_figures_of_accuracy_show_chance_and_references(row: Row) -> None:
    def measured(method: str, accuracy: float) -> Line:
        return Line(replace(row, method=method), [{"seed": 0, "mean_accuracy": accuracy}])

    lines = [measured("sdmlp", 0.4), measured("joint", 0.7), measured("ridge probe", 0.65)]
    [(_, figure)] = draw("table1", RESULTS["table1"], lines)
    vertical = {x.get_xdata()[0] for x in figure.axes[0].lines if x.get_linestyle() != "None"}
    assert vertical >= {0.1, 0.7, 0.65}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"chance", "joint", "ridge probe"} <= set(names)
    assert "streaming LDA" not in names  # it was not run
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
    rows = experiments.ablations(short, features)
    for method, factors in experiments.ABLATIONS.items():
        _, *own = [row for row in rows if row.method == method]
        assert {row.factor for row in own} == set(factors)
        # Every value but the method's; --short two at most. The paper's rate is no value of lr.
        others = [
            len(values) - 1 + (name == "lr" and not short) for name, values in factors.items()
        ]
        assert len(own) == (sum(min(n, 2) for n in others) if short else sum(others))
    configs = [row.config for row in rows]
    assert all(config not in configs[:number] for number, config in enumerate(configs))


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
