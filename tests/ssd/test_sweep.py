"""A sweep: what its file may say, which runs it trains, and how it ranks them."""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from kill_resume import write_features

from ssd import sweep
from ssd.config import Config, resolve
from ssd.data import class_order
from ssd.runs import RunOptions, run
from ssd.storage.run_folder import DIVERGED, METRICS, SUMMARY
from ssd.sweep import ORDERS, SPREAD, cells, header, markdown_text, rank, read_sweep, with_gradients
from ssd.tables import csv_text

BASE = """
features = "f.npz"
seeds = 2
[base]
tasks = 2
neurons = 32
k = 3
epochs = 2
batch_size = 64
anneal_samples = 150
validation = 0.25
"""
GRID = (
    BASE
    + """
[grid]
method = ["sdmlp", "ssd"]
lr = [0.05, 1]
"""
)
SWEPT = ["s.toml", "--device", "cpu", "--out", "out"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a feature file f.npz and a sweep s.toml in it."""
    monkeypatch.chdir(tmp_path)
    write_features(Path("f.npz"), 256)
    Path("s.toml").write_text(GRID)
    return tmp_path


def summaries() -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in Path("out").glob(f"*/{SUMMARY}")}


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a sweep is refused, leaving everything as it was."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert sweep.main(arguments) == 2
    assert sorted(Path().rglob("*")) == before
    printed, said = capsys.readouterr()
    assert printed == ""
    assert re.fullmatch(r"error: .*\n", said)
    return said


def test_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(SWEPT) == 0
    found = summaries()
    assert len(found) == 8
    table = rows()
    assert len(table) == 4
    for row in table:
        group = [
            s
            for s in found.values()
            if s["method"] == row["method"] and s["config"]["lr"] == float(row["lr"])
        ]
        assert sorted(s["seed"] for s in group) == [0, 1]
        for measure in ("mean_accuracy", "bwt", "forgetting", "seconds"):
            share = "trained_together" if measure == "seconds" else None
            values = [s[measure] / s.get(share, 1) for s in group]
            assert float(row[measure]) == pytest.approx(mean(values))
            assert float(row[f"{measure}_standard_error"]) == pytest.approx(stdev(values) / sqrt(2))
        assert row["seeds"] == "2"
        assert row["evaluated_on"] == "validation"
        with Path("out/runs.csv").open(newline="") as file:
            lines = [
                line
                for line in csv.DictReader(file)
                if line["method"] == row["method"] and float(line["lr"]) == float(row["lr"])
            ]
        assert [line["seed"] for line in lines] == ["0", "1"]
        for line, seed in zip(lines, (0, 1), strict=True):
            (own,) = (s for s in group if s["seed"] == seed)
            for measure in ("mean_accuracy", "bwt", "forgetting"):
                assert float(line[measure]) == own[measure]
            assert line["commit"] == own["commit"]
    accuracies = [float(row["mean_accuracy"]) for row in table]
    assert accuracies == sorted(accuracies, reverse=True)
    printed = capsys.readouterr().out
    assert printed.count("seed 0") == printed.count("seed 1") == 4
    assert "run 8 of 8: method=ssd lr=1 seed 1: accuracy " in printed
    best = f"best of 4 (validation): method={table[0]['method']} lr={table[0]['lr']}"
    assert printed.splitlines()[-1].startswith(best)
    marked = [line for line in printed.splitlines() if "*" in line]
    assert len(marked) == 1
    assert f"{accuracies[0]:.4f}" in marked[0]
    markdown = Path("out/sweep.md").read_text().splitlines()
    assert "validation" in markdown[0]
    assert "Mean ± standard error of the mean over seeds, each its own class order." in markdown
    assert "TEST" not in "".join(markdown)
    assert markdown[4].startswith(f"| **{table[0]['method']}** |")


def test_only_what_is_new_is_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("out").glob("*/*")}
    Path("s.toml").write_text(GRID.replace("lr = [0.05, 1]", "lr = [0.05, 0.2, 1]"))
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(summaries()) == 12
    assert len(rows()) == 6


def test_interrupted_in_the_middle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    whole = {name: s["accuracy_matrix"] for name, s in summaries().items()}
    logs = {p.parent.name: p.read_bytes() for p in Path("out").glob(f"*/{METRICS}")}
    Path("out").rename("whole")
    events = iter(range(1, 1000))

    @contextmanager
    def after_a_few() -> Iterator[Any]:
        yield lambda: next(events) > 20

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "stop_on_interrupt", after_a_few)
        assert sweep.main([*SWEPT, "--quiet"]) == 130
    assert 0 < len(summaries()) < 8
    assert not Path("out/sweep.csv").exists()
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    assert {name: s["accuracy_matrix"] for name, s in summaries().items()} == whole
    assert {p.parent.name: p.read_bytes() for p in Path("out").glob(f"*/{METRICS}")} == logs


def test_interruption_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssd.study.train_batch", stop)
    assert sweep.main(SWEPT) == 130
    said = capsys.readouterr().err
    assert said == ("interrupted; go on with: python -m ssd.sweep s.toml --device cpu --out out\n")


def test_a_run_is_the_one_of_the_command_line(folder: Path) -> None:
    """The sweep changes nothing of a run: same settings, same numbers."""
    Path("s.toml").write_text(BASE.replace("seeds = 2", "") + 'method = "ssd"\n')
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    (summary,) = summaries().values()
    config = Config(**summary["config"])
    data, _ = sweep._load(read_sweep(Path("s.toml")), Path())
    alone = run(config, data, Path("alone"), RunOptions(torch.device("cpu")))
    assert alone["accuracy_matrix"] == summary["accuracy_matrix"]
    (row,) = rows()
    assert row["mean_accuracy_standard_error"] == ""


def test_hints_of_all_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once each, before anything is trained."""
    paper = 'k = 1\nhidden_loss = "kl"\nselection = "frequency"'
    base = BASE.replace("k = 3", paper).replace("= 150", "= 300")
    Path("s.toml").write_text(base + "[grid]\nmax_norm = [1.0, 2.0]")
    sweep._load(read_sweep(Path("s.toml")), Path())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("note: a subnetwork of one neuron has nothing to distil")
    assert said[1].startswith("note: anneal_samples 300 is more than the 192 that the first task")


def test_ranked_on_the_test_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = BASE.replace("validation = 0.25\n", "").replace("seeds = 2", "")
    Path("s.toml").write_text(content + "[grid]\nlr = [0.5, 1.0]\n")
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    printed, said = capsys.readouterr()
    assert said == "note: without validation in [base] the rows are ranked on the test set\n"
    assert printed.startswith("best of 2 (test): ")
    assert "**Ranked on the TEST set**" in Path("out/sweep.md").read_text()


def test_runs_are_crossed_with_the_grid(folder: Path) -> None:
    path = Path("s.toml")
    runs = '[[runs]]\nmethod = "ssd"\nlam = 0.5\n[[runs]]\nmethod = "ewc"\n'
    path.write_text(f"{BASE}[grid]\nmax_norm = [1.0, 2.0]\n{runs}")
    found = read_sweep(path)
    assert found.rows == [
        {"method": "ssd", "lam": 0.5, "max_norm": 1.0},
        {"method": "ssd", "lam": 0.5, "max_norm": 2.0},
        {"method": "ewc", "max_norm": 1.0},
        {"method": "ewc", "max_norm": 2.0},
    ]
    assert found.varied == ["method", "lam", "max_norm"]
    config = found.config(found.rows[2])
    assert (config.method, config.max_norm, config.lam) == ("ewc", 1.0, resolve({}).lam)
    assert config.lr == resolve({"features": "f.npz"}).lr != Config().lr  # of the preset


def test_seeds_in_the_grid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row has its own class order and weights; seeds change the batches alone."""
    grid = "[grid]\norder_seed = [1, 2]\nweight_seed = [3, 4]\n"
    Path("s.toml").write_text(BASE + grid)
    assert sweep.main(SWEPT) == 0
    found = list(summaries().values())
    assert {s["trained_together"] for s in found} == {8}
    lines = list(csv.DictReader(Path("out/runs.csv").read_text().splitlines()))
    seeds = ("order_seed", "weight_seed", "seed")
    assert [tuple(line)[:3] for line in lines] == [seeds] * 8
    assert [tuple(line[n] for n in seeds) for line in lines] == [
        (order, weight, seed) for order in "12" for weight in "34" for seed in "01"
    ]
    for line in lines:
        (own,) = (s for s in found if all(str(s["config"][n]) == line[n] for n in seeds))
        assert own["mean_accuracy"] == float(line["mean_accuracy"])
        assert list(chain(*own["classes_per_task"])) == class_order(4, int(line["order_seed"]))
    assert {(row["order_seed"], row["weight_seed"]) for row in rows()} == {
        (line["order_seed"], line["weight_seed"]) for line in lines
    }
    markdown = Path("out/sweep.md").read_text()
    assert f"\n{SPREAD.capitalize()}.\n" in markdown
    assert ORDERS not in markdown
    assert "order_seed=1 weight_seed=3 seed 0" in capsys.readouterr().out


def test_rank_of_single_runs() -> None:
    found = sweep.Sweep({}, [{"k": 1}, {"k": 2}], 1)
    summary = {"bwt": -0.5, "forgetting": 0.5, "seconds": 8.0, "evaluated_on": "test"}
    summary["trained_together"] = 4
    records = rank(
        found,
        [Config(k=1), Config(k=2)],
        [[{**summary, "mean_accuracy": 0.25}], [{**summary, "mean_accuracy": 0.75}]],
    )
    assert [r["k"] for r in records] == [2, 1]
    assert all(r["bwt_standard_error"] is None for r in records)
    assert cells(records[0], ["k"]) == ["2", "0.7500", "-0.5000", "0.5000", "2.0"]
    assert csv_text(records).splitlines()[1] == "2,0.75,,-0.5,,0.5,,2.0,,,,,,,,,,1,test"
    made = [{"commit": c, "versions": {"torch": "2.6"}} for c in ("b", "a", "b")]
    lines = markdown_text("title", ["k"], records, made, "what ± is").splitlines()
    assert "What ± is." in lines
    assert "torch 2.6; commit a, b." in lines
    assert "Warning: runs of 2 commits." in lines
    assert lines[2] == "| k | mean accuracy | bwt | forgetting | seconds |"
    assert lines[4] == "| **2** | **0.7500** | **-0.5000** | **0.5000** | **2.0** |"
    assert lines[5] == "| 1 | 0.2500 | -0.5000 | 0.5000 | 2.0 |"
    assert "**Ranked on the TEST set**: nothing may be chosen by this table." in lines


def test_gradient_norms_are_columns_where_a_row_has_them() -> None:
    found = sweep.Sweep({}, [{"method": "ssd"}, {"method": "sdmlp"}], 1)
    summary = {"bwt": -0.5, "forgetting": 0.5, "seconds": 8.0, "evaluated_on": "test"}
    summary |= {"cross_entropy_gradient": [0.5, 0.25], "hidden_gradient": [None, None]}
    taught = {"hidden_gradient": [None, 0.125], "mean_accuracy": 0.75}
    records = rank(
        found,
        [Config(method="ssd"), Config(method="sdmlp")],
        [[summary | taught], [summary | {"mean_accuracy": 0.25}]],
    )
    measures = with_gradients(records)
    assert header([], measures)[4:] == ["cross entropy gradient", "hidden gradient"]
    rows = [cells(record, [], measures)[4:] for record in records]
    assert rows == [["0.3750", "0.1250"], ["0.3750", ""]]


FILES = {
    "not TOML": ("seeds = = 2", "not valid TOML: .*line 1"),
    "unknown section": ("sedes = 2", "sedes in the file is unknown; did you mean seeds?"),
    "strange section": ("zzz = 2", "zzz in the file is unknown; choose from dataset,"),
    "seeds of a wrong type": ('seeds = "2"', "seeds must be an integer, not '2'"),
    "seeds true": ("seeds = true", "seeds must be an integer, not True"),
    "no seeds": ("seeds = 0", "seeds 0 must be in 1..10000"),
    "too many seeds": ("seeds = 1000000000", "seeds 1000000000 must be in 1..10000"),
    "too many rows": (
        "seeds = 101\n[grid]\n" + "\n".join(f"{n} = {[1.0] * 99}" for n in ("lr", "alpha", "lam")),
        "the file names 98000199 runs, but at most 10000",
    ),
    "empty": ("", "bad.toml names nothing to sweep"),
    "a comment": ("# lr = [1]", "bad.toml names nothing to sweep"),
    "base of a wrong type": ("base = 3", "base must be a table, not 3"),
    "runs of a wrong type": ("runs = [3]", r"runs must be \[\[runs\]\] tables"),
    "no runs": ("runs = []", r"runs must be \[\[runs\]\] tables"),
    "unknown setting": ("[base]\nepoch = 2", r"epoch in \[base\] is unknown; did you mean epochs"),
    "unknown in the grid": ("[grid]\nalhpa = [1.0]", r"alhpa in \[grid\] is unknown; .* alpha"),
    "unknown in a run": ("[[runs]]\nlamda = 1", r"lamda in \[\[runs\]\] is unknown; did .* lam"),
    "wrong type": ('[base]\nepochs = "20"', ": epochs 20 must be of type int"),
    "wrong type in the grid": ('[grid]\nlr = [0.1, "a"]', ": lr a must be of type float"),
    "wrong value": ("[grid]\nalpha = [0.5, 1.5]", ": alpha 1.5 must be in 0..1"),
    "empty list": ("[grid]\nalpha = []", "alpha must be a list of values, not \\[\\]"),
    "no list": ("[grid]\nalpha = 0.5", "alpha must be a list of values, not 0.5"),
    "in two tables": ("[base]\nk = 3\n[grid]\nk = [3]", r"k is in both \[base\] and \[grid\]"),
    "no integer for a seed": (
        '[grid]\norder_seed = [1, "a"]',
        ": order_seed a must be of type int",
    ),
    "seed in the grid": ("[grid]\nseed = [1]", r"seed belongs in \[base\], with seeds = N"),
    "data set in the base": ('[base]\ndataset = "mnist"', "dataset belongs in the top of the"),
    "unknown data set": ('dataset = "mnits"', ": dataset mnits is unknown"),
    "unknown preset": ('preset = "fast"', ": preset fast is unknown"),
    "too large a seed": ("seeds = 2\n[base]\nseed = 9223372036854775807", ": seed 92233720368547"),
    "indivisible": ('features = "f.npz"\n[base]\ntasks = 3', "error: tasks 3 does not divide"),
    "NUL": ('features = "a\\u0000b.npz"', r": features 'a\\x00b.npz' must be a path"),
    "absent features": ('features = "g.npz"', ": features g.npz is not a file"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_file(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, message = FILES[case]
    Path("bad.toml").write_text(content)
    assert re.search(message, refused(capsys, ["bad.toml", "--device", "cpu"]))


def test_bad_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "g.toml cannot be read: No such file" in refused(capsys, ["g.toml"])
    assert "/dev/zero cannot be read: it is a device" in refused(capsys, ["/dev/zero"])
    assert "f.npz cannot be read: not UTF-8" in refused(capsys, ["f.npz"])
    assert "arguments are required: FILE.toml" in refused(capsys, [])
    assert "--device gpu is not a device" in refused(capsys, ["s.toml", "--device", "gpu"])
    outs = ["s.toml", "--device", "cpu", "--out", "f.npz"]
    assert "--out f.npz is not a folder" in refused(capsys, outs)


ONE = BASE.replace("seeds = 2", "") + "[grid]\nlr = [1]\n"
ENCODINGS = {
    "a byte-order mark": (b"\xef\xbb\xbf" + ONE.encode(), ""),
    "lines of Windows": (ONE.replace("\n", "\r\n").encode(), ""),
    "UTF-16": (ONE.encode("utf-16"), "s.toml cannot be read: not UTF-8; save it as UTF-8"),
    "UTF-16 without a mark": (ONE.encode("utf-16-le"), "s.toml cannot be read: not UTF-8"),
    "Latin-1": (f"# caf\xe9\n{ONE}".encode("latin-1"), "s.toml cannot be read: not UTF-8"),
    "a second mark": (b"\xef\xbb\xbf\xef\xbb\xbf" + ONE.encode(), "s.toml is not valid TOML"),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_encodings(folder: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    content, message = ENCODINGS[case]
    Path("s.toml").write_bytes(content)
    if message:
        assert message in refused(capsys, SWEPT)
    else:
        assert sweep.main([*SWEPT, "--quiet"]) == 0
        assert rows()[0]["lr"] == "1.0"


def test_equal_settings_are_one_run_however_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = '[[runs]]\nmethod = "{}"\n'
    Path("s.toml").write_text(ONE + runs.format("ssd+ewc"))
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")}
    Path("s.toml").write_text(ONE.replace("[1]", "[1.0]") + runs.format("sdmlp+ewc+ssd"))
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")} == before
    twice = {
        "lr=1.0": ONE.replace("[1]", "[1, 1.0]") + runs.format("ssd+ewc"),
        "method=ewc+ssd lr=1": ONE + runs.format("ssd+ewc") + runs.format("ewc+ssd"),
    }
    for shown, content in twice.items():
        Path("s.toml").write_text(content)
        capsys.readouterr()
        assert sweep.main([*SWEPT, "--quiet"]) == 0
        assert f"{shown} is listed twice; it is trained once" in capsys.readouterr().err
        assert len(rows()) == 1
        assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")} == before


def test_damaged_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.toml").write_text(ONE)
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    (path,) = Path("out").glob(f"*/{SUMMARY}")
    path.write_text("{}")
    assert f"{path} is damaged" in refused(capsys, SWEPT)
    path.rename(path.with_name(DIVERGED))
    assert f"{DIVERGED} is damaged" in refused(capsys, SWEPT)


def test_another_file_of_the_same_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub").mkdir()
    for path in (Path("s.toml"), Path("sub/s.toml")):
        path.write_text(ONE)
    assert sweep.main(["s.toml", "--device", "cpu", "--quiet"]) == 0
    said = refused(capsys, ["sub/s.toml", "--device", "cpu", "--quiet"])
    assert "sweep-s is of s.toml, not of sub/s.toml; name another --out" in said
    assert sweep.main(["./s.toml", "--device", "cpu", "--quiet"]) == 0


def test_the_same_data_by_another_name_are_the_same_runs(folder: Path) -> None:
    Path("s.toml").write_text(ONE)
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")}
    Path("f.npz").rename("g.npz")
    Path("s.toml").write_text(ONE.replace("f.npz", str(Path("g.npz").resolve())))
    assert sweep.main([*SWEPT, "--quiet"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")} == before


def test_runs_of_another_algorithm_or_of_other_data_are_trained_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("s.toml").write_text(ONE)
    for number, change in enumerate(
        (
            lambda: None,
            lambda: monkeypatch.setattr("ssd.storage.run_folder.ALGORITHM", 0),
            lambda: write_features(Path("f.npz"), 260),  # under the same name
        ),
        1,
    ):
        change()
        assert sweep.main([*SWEPT, "--quiet"]) == 0
        assert len(summaries()) == number


def test_runs_of_several_commits_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, made in enumerate(("c0ffee", "decaf")):
        monkeypatch.setattr("ssd.storage.run_folder.commit", lambda made=made: made)
        Path("s.toml").write_text(ONE.replace("[1]", str([1, 2][: number + 1])))
        assert sweep.main([*SWEPT, "--quiet"]) == 0
    assert capsys.readouterr().err == "note: the table shows runs of 2 commits\n"
    assert "commit c0ffee, decaf." in Path("out/sweep.md").read_text()


def test_settings_that_differ_look_different() -> None:
    values = [0.1, 0.1234567, 0.12345678, 1e-7, 2.0, 3, "ssd"]
    assert sweep._text(None) == ""
    texts = [sweep._text(value) for value in values]
    assert texts == ["0.1", "0.1234567", "0.12345678", "1e-07", "2", "3", "ssd"]
