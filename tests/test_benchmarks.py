"""The benchmark's schema, its gate, and that it runs where there is no GPU."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import (
    cases,
    gate,
    peers,
    providers,
    record,
    report,
    step_cases,
    step_targets,
    targets,
    timing,
    topk_bench,
)
from benchmarks.cases import QUICK, Shape
from benchmarks.common import captured
from benchmarks.record import Row
from ssd.cli import exit_status
from ssd.errors import UserError
from tests.ssd.test_lock import held

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ROW = Row("topk", "ours", "forward", "float32", {"B": 2, "R": 8}, "time", 1.0, 2.0, 3.0, "ms", 0.5,
          True)  # fmt: skip


def test_rows_survive_the_file(tmp_path: Path) -> None:
    wrong = replace(ROW, p20=None, p50=None, p80=None, roofline_fraction=None, correct=False)
    with record.Writer(tmp_path / "rows.csv", "a device, with a comma") as writer:
        writer.write(ROW)
        writer.write(wrong)
        # Rows are on disk before the file is closed: a killed run keeps them.
        assert record.read(tmp_path / "rows.csv") == writer.rows
    assert [row.correct for row in writer.rows] == [True, False]
    assert writer.rows[0].device == "a device, with a comma"
    assert writer.rows[0].torch == torch.__version__


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("op,time\ntopk,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="columns"):
        record.read(tmp_path / "rows.csv")


@pytest.mark.parametrize("shape", QUICK, ids=lambda shape: f"{shape.op}-{shape.mode}")
def test_gate_passes_every_provider(shape: Shape) -> None:
    case = providers.build(shape, CPU)
    given = case.inputs()
    found = {name: case.check(name, given, run(given)) for name, run in case.providers.items()}
    assert len(found) >= 2
    assert set(found.values()) == {""}


def test_gate_rejects_wrong_selections() -> None:
    scores = torch.randn(4, 50)
    values, indices = scores.topk(5)
    assert gate.topk(scores, values.flip(1), indices.flip(1)) == ""  # any order will do
    second = scores.topk(6).indices[:, 1:]
    assert "below" in gate.topk(scores, scores.gather(1, second), second)
    assert "off by" in gate.topk(scores, values + 1e-6, indices)
    assert "off by" in gate.topk(scores, values * torch.nan, indices)
    assert "twice" in gate.topk(scores, values, indices[:, :1].expand(-1, 5))
    assert "range" in gate.topk(scores, values, indices + 50)


def test_gate_tells_fp32_from_tf32() -> None:
    x, weight, bias = torch.randn(64, 256), torch.randn(2000, 256), torch.randn(2000)
    fine = torch.topk(torch.addmm(bias, x, weight.T).relu(), 10)
    assert gate.linear_topk(x, weight, bias, *fine, rounded=False) == ""
    # TF32 keeps 10 of the 23 bits of each operand's mantissa.
    x32, w32 = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, weight))
    coarse = torch.topk(torch.addmm(bias, x32, w32.T).relu(), 10)
    assert gate.linear_topk(x, weight, bias, *coarse, rounded=False) != ""


def test_gate_rejects_wrong_gradients() -> None:
    shape = next(s for s in QUICK if (s.op, s.mode) == ("linear_topk", "full"))
    case = providers.build(shape, CPU)
    given = case.inputs()
    right = case.providers["ours"](given)
    for wrong in (2, 3, 4):  # dx, dW, db
        result = [t * 1.01 if n == wrong else t for n, t in enumerate(right)]
        assert case.check("ours", given, result) != ""


def test_a_run_that_raises_is_reported() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    times, errors = timing.alternate({"good": lambda: None, "bad": broken}, 0.0, CPU)
    assert set(times) == {"good"}
    assert times["good"].p20 <= times["good"].p50 <= times["good"].p80
    assert str(errors["bad"]) == "no such kernel"


def test_wrong_and_raising_providers_get_no_time(tmp_path: Path) -> None:
    def raises(given: object) -> None:
        raise RuntimeError("no such kernel [R, d]")

    shape = QUICK[0]
    built = providers.build(shape, CPU)
    wrong = {"wrong": lambda scores: torch.topk(-scores, 10), "raises": raises}
    case = replace(built, providers=built.providers | wrong)
    options = argparse.Namespace(quick=True, budget=60.0, no_compile=True)
    with (tmp_path / "log").open("w") as log, record.Writer(tmp_path / "rows.csv", "cpu") as rows:
        bench = topk_bench.Bench(rows, CPU, Console(file=log, width=200), options)
        bench.measure(case, timing.Roofline(1e9, {torch.float32: 1e9}))
    said = (tmp_path / "log").read_text()
    assert "no such kernel [R, d]" in said
    assert "wrong is wrong" in said
    failed = [row for row in record.read(tmp_path / "rows.csv") if not row.correct]
    assert [row.provider for row in failed] == ["wrong", "raises"]
    assert all(row.p50 is None and row.roofline_fraction is None for row in failed)
    assert {row.provider for row in rows.rows if row.correct} == set(built.providers)


PHASES = ((step_cases.INHIBITED, "code"), (step_cases.SWITCHING, "all"),
          (step_cases.EXCITED, "all"))  # fmt: skip


@pytest.mark.parametrize(("phase", "path"), PHASES)
def test_timed_steps_are_those_of_the_phase(phase: str, path: str) -> None:
    """And equal the plain ones: make the same step from the same weights."""
    problem = step_cases.Problem(B=16, d=20, R=200, k=3)
    trainer = step_cases.make_trainer(problem, "ssd", CPU, phase=phase)
    assert (step_cases.graded_share(trainer) > 0.5) == (phase == step_cases.SWITCHING)
    runs = step_cases.step_runs(trainer, compiled=False)
    runs["ours"]()
    assert step_cases.path_of(trainer) == path


def test_a_step_that_is_not_the_plain_one_is_not_timed() -> None:
    trainer = step_cases.make_trainer(step_cases.Problem(B=16, d=20, R=200, k=3), "ssd", CPU)
    plain = step_cases.plain_step(trainer)
    plain.model.k = 4
    with pytest.raises(SystemExit, match="train_bench"):
        step_cases.check(trainer, plain)


def test_past_tasks_spread_importance() -> None:
    """Each has data of its own; the same importance can be had as that of one task."""
    problem = step_cases.Problem(B=16, d=20, R=2000, k=3)
    one, many = (step_cases.make_trainer(problem, "ssd+ewc", CPU, past=n) for n in (1, 4))
    few, rows = step_cases.important_rows(one), step_cases.important_rows(many)
    assert 0 < 1.5 * few < rows < 2000
    run = step_cases.as_one_task(many)
    (learner,) = many.learners
    before = [p.detach().clone() for p in learner.parameters]
    run()
    after = [p.detach().clone() for p in learner.parameters]
    for p, old in zip(learner.parameters, before, strict=True):
        p.data.copy_(old)
    step_cases.step_of(many, 0)()
    assert all(torch.equal(p, other) for p, other in zip(learner.parameters, after, strict=True))


def test_a_peer_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"no-such-package": ("a", "b"), "pytest": ("no.such.module", "f")}
    monkeypatch.setattr(peers, "PEERS", broken)
    peers.load.cache_clear()
    assert peers.load("no-such-package") == (None, "no-such-package: not installed")
    function, why = peers.load("pytest")
    assert function is None
    assert "cannot be imported" in why


@pytest.mark.parametrize(
    ("name", "encode"),
    [("sae-lens", peers._sae_lens), ("dictionary-learning", peers._dictionary_learning)],
)
def test_an_installed_autoencoder_passes_the_gate(
    name: str, encode: Callable[..., torch.Tensor]
) -> None:
    autoencoder, why = peers.load(name)
    if autoencoder is None:
        pytest.skip(why)
    x, weight, bias = torch.randn(8, 16), torch.randn(200, 16), torch.randn(200)
    for _ in range(2):  # other weights of the same shape the second time
        values, indices = encode(autoencoder, 5, x, weight, bias).topk(5)
        assert gate.linear_topk(x, weight, bias, values, indices, rounded=True) == ""
        weight = torch.randn(200, 16)


def test_targets_are_ratios_of_medians() -> None:
    name = "topk fp32 B=8,192 R=131,072 k=64: x torch.topk"
    target = next(t for t in targets.targets() if t.what == name)
    sizes = {"B": 8192, "R": 131072, "k": 64}
    mine = replace(ROW, shape=sizes, p50=2.0)
    other = replace(mine, provider="torch.topk", p50=9.0)
    assert target.verdict([mine, other]) == ("4.5", "met")
    assert target.verdict([mine, replace(other, p50=7.0)]) == ("3.5", "missed")
    assert target.verdict([mine]) == ("", "not measured")
    assert target.verdict([replace(mine, correct=False), other]) == ("", "not measured")


def test_the_first_cases_hold_every_target() -> None:
    providers = (
        "ours", "ours+counts", "ours (graph)", "torch.topk", "flashinfer", "F.linear + torch.topk",
        "F.linear + torch.topk (graph)", "F.linear alone", "16-bit GEMM alone", "eai-sparsify",
        "dense matmul",
    )  # fmt: skip
    rows = [
        replace(
            ROW, op=shape.op, mode=shape.mode, dtype=str(shape.dtype).removeprefix("torch."),
            shape=shape.sizes, provider=provider, metric=metric, p50=1.0, roofline_fraction=1.0,
        )
        for shape in cases.TARGETS
        for provider in providers
        for metric in ("time", "bandwidth", "memory")
    ]  # fmt: skip
    every = list(targets.targets())
    assert all(target.verdict(rows)[1] != "not measured" for target in every)
    for shape in cases.TARGETS:  # none is there for nothing
        fewer = [
            row
            for row in rows
            if (row.op, row.mode, row.shape) != (shape.op, shape.mode, shape.sizes)
        ]
        assert any(target.verdict(fewer)[1] == "not measured" for target in every)


def test_a_captured_provider_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for each input set; the provider itself runs to warm up and to be captured."""
    replays: list[object] = []

    class Graph:
        def replay(self) -> None:
            replays.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    calls: list[str] = []

    def provider(given: str) -> str:
        calls.append(given)
        return f"result of {given}"

    assert captured(CPU, "ours", provider) == {}
    run = captured(torch.device("cuda"), "ours", provider)["ours (graph)"]
    assert [run(given) for given in ("a", "b", "a")] == [
        "result of a", "result of b", "result of a",
    ]  # fmt: skip
    assert calls == ["a", "a", "b", "b"]
    assert len(replays) == 3
    assert replays[0] is replays[2] is not replays[1]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("cpu", "topk_bench"), ("cpu", "train_bench"),
     ("nvidia-h100-80gb-hbm3", "topk_bench"), ("nvidia-h200", "topk_bench")],
)  # fmt: skip
def test_documented_figures_are_those_of_the_file(folder: str, name: str) -> None:
    document = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = record.read(ROOT / "benchmarks" / "results" / folder / f"{name}.csv")
    title = name if folder == "cpu" else f"{name} {folder}"
    assert report.fill(document, rows, title) == document
    assert (title == "topk_bench") != (f"<!-- targets {title} -->" in document)


def test_step_targets_are_ratios_of_medians() -> None:
    def row(op: str, provider: str, p50: float, metric: str = "time", neurons: int = 10_000) -> Row:
        shape = {"B": 128, "R": neurons}
        return replace(ROW, op=op, provider=provider, metric=metric, p50=p50, shape=shape)

    product, fastest = step_targets.PRODUCTS
    rows = [
        *(row("ssd", p, t) for p, t in (("ours", 8.0), ("plain", 32.0), (product, 10.0))),
        row("ssd", fastest, 5.0),
        row("ssd and sdmlp", "ssd", 11.0),
        row("ssd and sdmlp", "sdmlp", 10.0),
        row("growth R", "backward + update", 4.0),
        row("growth R", "backward + update", 5.0, neurons=1_000_000),
        *(row("growth tasks", p, t) for p, t in (("1", 10.0), ("50", 12.0))),
    ]
    found = {what: said for what, *said in step_targets.verdicts(rows)}
    assert found == {
        "SSD step, R = 10,000: plain over ours": ["4.00 of >= 5", "missed"],
        "SSD step, R = 10,000: ours over the float32 product `x @ W.T`": ["0.80 of <= 1", "met"],
        "SSD step, R = 10,000: ours over the float32 product `torch.mm(W, x.T, out=kept)`": [
            "1.60 of <= 1", "missed",
        ],
        "SSD step over SDMLP step, R = 10,000": ["1.10 of <= 1.15", "met"],
        "backward + update, R = 1,000,000 over R = 10,000": ["1.25 of <= 1.3", "met"],
    }  # fmt: skip
    rows += [
        *(
            row("growth R", "backward + update", n, "touched rows", r)
            for n, r in ((800, 10_000), (1100, 1_000_000))
        ),
        row("growth R", step_targets.APART, 4.0),
        row("growth R", step_targets.APART, 4.4, neurons=1_000_000),
        row("growth R", step_targets.APART, 1280, "touched rows"),
        row("growth R", step_targets.APART, 1280, "touched rows", 1_000_000),
    ]
    growth = [line for line in step_targets.verdicts(rows) if line[0].startswith("backward")]
    assert growth == [
        (
            "backward + update, R = 1,000,000 over R = 10,000 (touched rows: 1,100 over 800)",
            "1.25 of <= 1.3",
            "met",
        ),
        (
            "backward + update, R = 1,000,000 over R = 10,000 (touched rows: 1,280 over 1,280)",
            "1.10 of <= 1.3",
            "met",
        ),
    ]
    # Of tasks nothing is said before the rows that carry importance are counted.
    rows += [
        row("growth tasks", "1", 2000, "important rows"),
        row("growth tasks", "50", 9000, "important rows"),
        row("growth tasks", f"{step_targets.SAME_ROWS} 50", 12.0),
    ]
    plain, same = (said for what, *said in step_targets.verdicts(rows) if "50 EWC tasks" in what)
    assert plain == ["1.20 of <= 1.05", "missed"]
    assert same == ["1.00 of <= 1.05", "met"]


OPS = {
    "topk_bench": {"roofline", *providers.BUILDERS},
    "train_bench": {
        "ssd",
        "sdmlp",
        "ssd and sdmlp",
        "ssd mid-switch",
        "ssd excited",
        "ssd epoch",
        "growth R",
        "growth B",
        "growth k",
        "growth d",
        "growth tasks",
        "growth S",
    },
}


@pytest.mark.parametrize(
    "name", ["topk_bench", pytest.param("train_bench", marks=pytest.mark.slow)]
)
def test_quick_run_without_gpu(name: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(out)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CPU FIGURES" in done.stdout
    assert "target" in done.stdout.lower()
    rows = record.read(out)
    assert {row.op for row in rows} >= OPS[name]
    assert all(row.correct and (row.p50 or row.metric == "graded") for row in rows)
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_whole_command(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    command = [sys.executable, "benchmarks/command_bench.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone, both = record.read(out)
    assert [row.shape["at once"] for row in (alone, both)] == [1, 2]
    for row in (alone, both):
        assert row.correct
        assert row.p20 == row.p50 == row.p80
        assert row.p50
        assert row.p50 > 1000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the following arguments are required: NAME.csv, FILE.md"),
        (["rows.csv", "absent.md"], "No such file or directory (absent.md)"),
        (["file.md", "file.md"], "file.md: columns ['# A file'] are not ['op', "),
        (["rows.csv", "file.md"], "the document has no <!-- medians rows "),
        (["rows.csv", "file.md", "x"], "unrecognized arguments: x"),
    ],
)
def test_report_refuses_in_one_line(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with record.Writer(Path("rows.csv"), "cpu") as writer:
        writer.write(ROW)
    Path("file.md").write_text("# A file\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report", *given])
    assert exit_status(report.main, place="") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_a_table_is_written_by_one_process(tmp_path: Path) -> None:
    with held(tmp_path / "rows.csv", "file_lock"):
        with pytest.raises(UserError, match="in use by another process"):
            record.Writer(tmp_path / "rows.csv", "cpu")
        assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("name", ["command_bench", "train_bench", "topk_bench", "tune"])
def test_benchmarks_refuse_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--bogus"])
    assert exit_status(module.main) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --bogus (see --help)\n"
