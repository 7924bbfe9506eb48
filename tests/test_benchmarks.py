"""The benchmark's schema, its gate, and that it runs where there is no GPU."""

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import (
    bench,
    cases,
    gate,
    peers,
    record,
    report,
    sae_bench,
    sae_peers,
    sae_targets,
    step_cases,
    step_targets,
    timing,
    topk_bench,
    train_bench,
)
from benchmarks.cases import QUICK
from benchmarks.previous import Previous
from benchmarks.providers import Shape, captured
from benchmarks.record import Row
from benchmarks.targets import SHAPES, TARGETS
from ssd.cli import exit_status
from ssd.config import Config
from ssd.errors import UserError
from ssd.learner import Learner, build_model
from ssd.storage.provenance import commit, installed
from ssd.trainer import Trainer
from ssd_kernels import _dispatch
from ssd_kernels.sae import TopKSAE
from tests.ssd.storage.test_lock import held

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHAPE = {"B": 2, "R": 8}
ROW = Row("topk", "ours", "forward", "float32", SHAPE, "time", 1.0, 2.0, 3.0, "ms", 0.5)


def bench_of(writer: record.Writer, console: Console | None = None, **options: Any) -> bench.Bench:
    """A run on the CPU without a command line."""
    options = {"quick": True, "no_compile": True, "previous": None, "budget": 60.0} | options
    given = argparse.Namespace(**options)
    return bench.Bench(given, CPU, "a title", Path("rows.csv"), console or Console(), writer)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    wrong = replace(ROW, p20=None, p50=None, p80=None, roofline_fraction=None, correct=False)
    with record.writing(tmp_path / "rows.csv", "a device, with a comma") as writer:
        writer.write(ROW)
        writer.write(wrong)
        # Rows are on disk before the file is closed: a killed run keeps them.
        assert record.read(tmp_path / "rows.csv") == writer.rows
        writer.write(replace(ROW, provider="previous", commit="abc"))
    assert [row.correct for row in writer.rows] == [True, False, True]
    assert [row.commit for row in writer.rows] == [commit()] * 2 + ["abc"]
    assert "(previous: abc)" in report.medians(writer.rows)
    assert writer.rows[0].device == "a device, with a comma"
    assert writer.rows[0].torch == torch.__version__


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("op,time\ntopk,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="columns"):
        record.read(tmp_path / "rows.csv")


@pytest.mark.parametrize("shape", QUICK, ids=lambda shape: f"{shape.op}-{shape.mode}")
def test_gate_passes_every_provider(shape: Shape) -> None:
    case = cases.build(shape, CPU)
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
    case = cases.build(shape, CPU)
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
    built = cases.build(shape, CPU)
    wrong = {"wrong": lambda scores: torch.topk(-scores, 10), "raises": raises}
    case = replace(built, providers=built.providers | wrong)
    with (tmp_path / "log").open("w") as log, record.writing(tmp_path / "rows.csv", "cpu") as rows:
        kernels = topk_bench.Kernels(bench_of(rows, Console(file=log, width=200)))
        kernels.measure(case, timing.Roofline(1e9, {torch.float32: 1e9}))
    assert kernels.wrong == 0  # of ours
    said = (tmp_path / "log").read_text()
    assert "no such kernel [R, d]" in said
    assert "wrong is wrong" in said
    failed = [row for row in record.read(tmp_path / "rows.csv") if not row.correct]
    assert [row.provider for row in failed] == ["wrong", "raises"]
    assert all(row.p50 is None and row.roofline_fraction is None for row in failed)
    assert {row.provider for row in rows.rows if row.correct} == set(built.providers)


TINY = step_cases.Problem(B=16, d=20, R=200, k=3)
# What the hidden layer is in each phase, and the range of the mean of g.
PHASES = {
    step_cases.INHIBITED: ("code", 1.0, 1.0),
    step_cases.LATE: ("active", 0.9, 1.0),
    step_cases.SWITCHING: ("all", 0.4, 0.6),
    step_cases.EXCITED: ("all", -1.0, -0.99),
}


@pytest.mark.parametrize("phase", PHASES)
def test_timed_steps_are_those_of_the_phase(phase: str) -> None:
    """And equal the plain ones: make the same step from the same weights."""
    path, low, high = PHASES[phase]
    for make in (step_cases.epoch_runs, step_cases.step_runs):
        trainer = step_cases.make_trainer(TINY, "ssd", CPU, phase=phase)
        assert low <= trainer.stacks[0].encoders[0].gaba().mean() <= high
        runs = make(trainer, compiled=False)
        assert set(runs) == {"ours", "plain"}
        for run in runs.values():
            run()
    counts = trainer.stacks[0].counts.clone()
    run, found, firing = step_cases.products(trainer)
    run()
    assert found == path
    assert (firing == 200) == (path == "all")
    assert firing > 3
    assert torch.equal(trainer.stacks[0].counts, counts)


@pytest.mark.parametrize("phase", PHASES)
def test_replayed_steps_are_those_of_the_phase(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncaptured here: a code that does not hold what fires is no step."""
    monkeypatch.setattr(step_cases, "Trainer", partial(Trainer, graphs=True))
    problem = replace(TINY, R=1000)
    trainer = step_cases.make_trainer(problem, "ssd", CPU, phase=phase)
    step_cases.repeated(trainer)()
    form = {step_cases.INHIBITED: "exact", step_cases.LATE: "graded"}.get(phase, "dense")
    assert step_cases.products(trainer)[1] == form


@pytest.mark.skipif(not _dispatch.NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("before", [None, "reference"])
def test_without_numba(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    if before is not None:
        monkeypatch.setenv(_dispatch.ENVIRONMENT, before)

    def serving() -> str:
        return _dispatch.choose("row_update", None, torch.ones(1)).__name__

    assert serving() == ("_numba" if before is None else "_reference")
    assert step_cases.without_numba(serving)() == "_torch"
    assert serving() == ("_numba" if before is None else "_reference")


def test_a_checkout_times_its_own_steps() -> None:
    """Here it is this one; what it cannot do it says."""
    sizes = {"B": 16, "d": 20, "R": 200, "k": 3, "N": None}
    with Previous(ROOT) as previous:
        for mode in ("step", "epoch"):
            previous.prepare(mode, sizes, step_cases.INHIBITED)
            runs = {"previous": timing.SelfTimed(previous.sample)}
            times, errors = timing.alternate(runs, 0.0, CPU)
            assert not errors
            assert times["previous"].p50 > 0
        with pytest.raises(RuntimeError, match="k=300"):
            previous.prepare("step", {**sizes, "k": 300}, step_cases.INHIBITED)
        with pytest.raises(RuntimeError, match="TypeError: 'NoneType'"):
            previous.sample()
        previous._child.kill()
        previous._child.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            previous.sample()


def test_a_run_that_times_itself_is_believed() -> None:
    times, _ = timing.alternate({"there": timing.SelfTimed(lambda: [7.0])}, 0.0, CPU)
    assert times["there"] == timing.Quantiles(7.0, 7.0, 7.0)


@pytest.mark.parametrize(("seconds", "epochs"), [(0.0, 1), (1e6, 3)])
def test_a_protocol_is_cut_to_its_time(
    seconds: float, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [step_cases.make_task(TINY, CPU, 0, c) for c in (range(5), range(5, 10))]
    assert [task.y_train.unique().tolist() for task in tasks] == [list(t.classes) for t in tasks]
    config = Config(tasks=2, epochs=3, neurons=200, k=3)
    learner = Learner(config, tasks, build_model(config, 20, 10))
    monkeypatch.setattr(step_cases, "protocol", lambda *_: Trainer([learner]))
    with record.writing(tmp_path / "rows.csv", "cpu") as writer:
        train_bench.Steps(bench_of(writer), None).protocol(seconds)
    found = {row.metric: row for row in writer.rows}
    assert found["epochs"].p50 == epochs
    assert found["an epoch"].p50 < found["time"].p50
    assert learner.accuracy[1].sum() >= 0
    said = step_targets.verdicts(writer.rows)
    assert f"5 x {epochs} of 2,000 epochs" in said[-1][0]


def test_the_whole_protocol_is_the_papers() -> None:
    config = step_cases.protocol(1000, CPU).config
    assert (config.tasks, config.epochs, config.neurons) == (5, step_targets.EPOCHS, 1000)
    assert config.method == "ssd"


@pytest.mark.parametrize("quick", [True, False])
def test_a_quick_run_leaves_the_kept_rows_alone(quick: bool, tmp_path: Path) -> None:
    path = record.results_path(None, quick, CPU, "train_bench")
    kept = ROOT / "benchmarks" / "results" / "cpu" / "train_bench.csv"
    assert (path == kept) == (not quick)
    assert path.parent.is_dir()
    assert record.results_path(tmp_path, quick, CPU, "train_bench") == tmp_path


def test_curves_of_growth() -> None:
    rows = [
        *(replace(ROW, op="growth R", shape={"R": n}, p50=float(n)) for n in (2, 8)),
        *(replace(ROW, op="growth S", provider=n, p50=3.0) for n in ("1", "4", "1 on the rows of")),
        replace(ROW, op="ssd inhibited"),
    ]
    grown = train_bench.curves(rows)
    assert list(grown) == ["R", "S"]
    assert list(grown["R"]["ours"]) == [2, 8]
    assert {part: list(points) for part, points in grown["S"].items()} == {"step": [1, 4]}
    assert train_bench.exponent(grown["R"]["ours"]) == "1.00"
    assert train_bench.exponent(grown["S"]["step"]) in ("0.00", "-0.00")
    assert train_bench.exponent({2: rows[0]}) == ""


def test_a_step_that_is_not_the_plain_one_is_not_timed() -> None:
    trainer = step_cases.make_trainer(TINY, "ssd", CPU)
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


AUTOENCODERS = [(op, name) for op, libraries in sae_peers.LIBRARIES.items() for name in libraries]
SAE_CASE = sae_bench.Case(B=32, d=16, R=128, k=4)


@pytest.mark.parametrize(("op", "name"), AUTOENCODERS)
def test_an_installed_library_trains_what_ours_does(op: str, name: str) -> None:
    library = sae_peers.LIBRARIES[op][name]
    if not installed(library.package):
        pytest.skip(f"{library.package} is not installed")
    sae, x = sae_bench.autoencoder(op, SAE_CASE, CPU, None), sae_bench.samples(SAE_CASE, 32, CPU)
    assert sae_bench.wrong(library.build, sae, x) == ""
    library.build(sae, 32, torch.arange(128) < 64 if library.auxk else None).step(x)


@pytest.mark.parametrize("op", sae_peers.CLASSES)
def test_another_autoencoder_is_not_timed(op: str) -> None:
    sae, x = sae_bench.autoencoder(op, SAE_CASE, CPU, None), sae_bench.samples(SAE_CASE, 32, CPU)

    def other_k(given: TopKSAE, rows: int, dead: sae_peers.Dead) -> sae_peers.Peer:
        peer = sae_peers.ours(given, rows, dead)
        peer.model.k = 3
        return peer

    def other_gradient(given: TopKSAE, rows: int, dead: sae_peers.Dead) -> sae_peers.Peer:
        peer = sae_peers.ours(given, rows, dead)
        return replace(peer, encoder_gradient=lambda: peer.encoder_gradient().roll(1, 0))

    assert sae_bench.wrong(sae_peers.ours, sae, x) == ""
    assert "its FVU is" in sae_bench.wrong(other_k, sae, x)
    assert "a cosine of" in sae_bench.wrong(other_gradient, sae, x)


def test_bytes_that_autograd_keeps() -> None:
    model, x = torch.nn.Linear(4, 8), torch.randn(10, 4)
    kept = {
        "nothing": lambda x: model(x).sum(),
        "one result": lambda x: model(x).relu().sum(),
        "once": lambda x: model(x).relu().square().sum(),  # both keep the same tensor
        "two results": lambda x: model(x).relu().exp().sum(),
    }
    found = {
        name: sae_bench.saved_bytes(sae_peers.Peer(model, loss, model, lambda: x), x)
        for name, loss in kept.items()
    }
    one = 10 * 8 * 4
    assert found == {"nothing": 0, "one result": one, "once": one, "two results": 2 * one}


def test_dead_neurons_stay_dead_and_are_trained() -> None:
    dead = torch.arange(128) < 64
    sae, x = (
        sae_bench.autoencoder("TopK", SAE_CASE, CPU, dead),
        sae_bench.samples(SAE_CASE, 32, CPU),
    )
    peer = sae_peers.ours(sae, 32, dead)
    for _ in range(3):
        peer.gradients(x)
        assert torch.equal(peer.model.dead, dead)
        assert peer.encoder_gradient()[dead].any()
        peer.constrain()


@pytest.mark.parametrize(("device", "bound"), [("CPU: a", 1), ("NVIDIA", 2)])
def test_targets_of_autoencoders(device: str, bound: int) -> None:
    shape = {"B": 8, "d": 4, "R": 4096, "k": 2}
    case = Row("TopK", "ours", "step", "float32", shape, "time", 2.0, 2.0, 2.0, "ms", device=device)
    wrong = replace(case, provider="e", p50=None, correct=False)
    rows = [
        case,
        replace(case, metric="saved", p50=5.0),
        replace(case, provider="a 1.0", p50=3.0),
        replace(case, provider="a 1.0", metric="saved", p50=4.0),
        replace(case, provider="b 2.0", p50=9.0),
        replace(case, provider=sae_targets.OPTIMIZER, p50=1.0),
        wrong,
    ]
    name = "TopK float32 B=8 d=4 R=4,096 k=2"
    speed = f"1.50 (a 1.0) of >= {bound}", "met" if bound == 1 else "missed"
    memory = "1.25 (a 1.0) of <= 1", "missed"
    assert sae_targets.verdicts(rows) == [
        (f"{name}: fastest library over ours", *speed),
        (f"{name}: memory saved for backward, ours over the least", *memory),
    ]
    assert sae_targets.verdicts(rows[:2]) == []
    assert sae_targets.verdicts([replace(r, shape={**shape, "R": 4095}) for r in rows]) == []
    cells = [line[2:] for line in sae_targets.lines(rows)]
    assert cells == [
        ("ours", "2.0", "1.00", "5.0", ""),
        ("a 1.0", "3.0", "1.50", "4.0", ""),
        ("b 2.0", "9.0", "4.50", "", ""),
        (sae_targets.OPTIMIZER, "1.0", "0.50", "", ""),
        ("e", "not timed", "", "", ""),
    ]


def test_targets_are_ratios_of_medians() -> None:
    name = "topk fp32 B=8,192 R=131,072 k=64: x torch.topk"
    target = next(t for t in TARGETS if t.line([])[0] == name)
    mine = replace(ROW, shape={"B": 8192, "R": 131072, "k": 64}, p50=2.0)
    other = replace(mine, provider="torch.topk", p50=9.0)
    assert target.line([mine, other]) == (name, ">= 4", "4.5", "met")
    assert target.line([mine, replace(other, p50=7.0)])[2:] == ("3.5", "missed")
    assert target.line([mine])[2:] == ("", "not measured")
    assert target.line([replace(mine, correct=False), other])[2:] == ("", "not measured")


def test_the_first_cases_hold_every_target() -> None:
    providers = (
        "ours",
        "ours+counts",
        "ours (graph)",
        "torch.topk",
        "flashinfer",
        "F.linear + torch.topk",
        "F.linear + torch.topk (graph)",
        "F.linear alone",
        "16-bit GEMM alone",
        "eai-sparsify",
        "dense matmul",
    )
    rows = [
        replace(
            ROW,
            op=shape.op,
            mode=shape.mode,
            dtype=shape.dtype_name,
            shape=shape.sizes,
            provider=provider,
            metric=metric,
        )
        for shape in SHAPES
        for provider in providers
        for metric in ("time", "bandwidth", "memory")
    ]

    def unmeasured(rows: list[Row]) -> bool:
        return "not measured" in {target.line(rows)[-1] for target in TARGETS}

    assert not unmeasured(rows)
    for shape in SHAPES:  # every one is needed
        own = shape.op, shape.mode, shape.sizes
        assert unmeasured([row for row in rows if (row.op, row.mode, row.shape) != own])


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
    assert [run(given) for given in "aba"] == [f"result of {given}" for given in "aba"]
    assert calls == ["a", "a", "b", "b"]
    assert len(replays) == 3
    assert replays[0] is replays[2] is not replays[1]


@pytest.mark.parametrize(
    ("folder", "name", "page"),
    [
        ("cpu", "topk_bench", "performance"),
        ("cpu", "train_bench", "performance"),
        ("cpu", "sae_bench", "autoencoders"),
        ("nvidia-h100-80gb-hbm3", "topk_bench", "performance"),
        ("nvidia-h200", "topk_bench", "performance"),
    ],
)
def test_documented_figures_are_those_of_the_file(folder: str, name: str, page: str) -> None:
    document = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = record.read(ROOT / "benchmarks" / "results" / folder / f"{name}.csv")
    title = name if folder == "cpu" else f"{name} {folder}"
    assert report.fill(document, rows, title) == document
    assert (title == "topk_bench") != (f"<!-- targets {title} -->" in document)


def step_rows(
    op: str,
    medians: dict[str, float],
    metric: str = "time",
    mode: str = "step",
    neurons: int = 10_000,
    device: str = "CPU: a",
) -> list[Row]:
    """A row for each provider."""
    shape = {"B": 128, "R": neurons}
    return [
        Row(op, provider, mode, "float32", shape, metric, p50, p50, p50, "ms", device=device)
        for provider, p50 in medians.items()
    ]


def test_step_targets_on_a_cpu() -> None:
    op, half, apart = "ssd inhibited", step_targets.BACKWARD, step_targets.APART
    rows = [
        *step_rows(op, {"products": 800}, "neurons that fire"),
        *step_rows(op, {"ours": 1}, "code"),
        *step_rows(op, {"ours": 8.0, "plain": 32.0, "previous": 12.0, "products": 4.0}),
        *step_rows(op, {"ours": 10.0, "plain": 41.0}, mode="epoch"),
        *step_rows(op, {"ours": 10.0, "plain": 24.0}, mode="epoch", neurons=1000),
        *step_rows("ssd excited", {"ours": 9.0, "plain": 18.0}, mode="epoch"),
        *step_rows("ssd", {"ours": 90e3}, mode="protocol"),
        *step_rows("ssd", {"ours": 2000}, "epochs", mode="protocol"),
        *step_rows("growth R", {half: 4.0}),
        *step_rows("growth R", {half: 5.0}, neurons=1_000_000),
        *step_rows("growth tasks", {"1": 10.0, "50": 12.0}),
        *step_rows("growth S", {"1": 10.0, "10": 85.0}),
    ]
    step, epoch = "SSD step, inhibited, R = 10,000", "SSD epoch, inhibited, R ="
    growth = "backward + update, R = 1,000,000 over R = 10,000"
    # Tasks have no line before the rows that carry importance are counted.
    assert step_targets.verdicts(rows) == [
        (f"{step} (code: 800 neurons fire): others over ours", "plain 4.00, previous 1.50", ""),
        (f"{step}: ours over its products", "2.00 of <= 1.5", "missed"),
        (f"{epoch} 10,000: others over ours", "plain 4.10", ""),
        (f"{epoch} 10,000: plain over ours", "4.10 of >= 4", "met"),
        (f"{epoch} 1,000: others over ours", "plain 2.40", ""),
        (f"{epoch} 1,000: plain over ours", "2.40 of >= 2.5", "missed"),
        ("SSD epoch, excited, R = 10,000: others over ours", "plain 2.00", ""),
        ("whole protocol, R = 10,000, 5 x 2,000 of 2,000 epochs: s", "90.00", ""),
        (growth, "1.25 of <= 1.3", "met"),
        ("step of 10 learners at once over 1", "8.50", ""),
    ]
    rows += [
        *step_rows("growth R", {half: 800, apart: 1280}, "touched rows"),
        *step_rows("growth R", {half: 1100, apart: 1280}, "touched rows", neurons=1_000_000),
        *step_rows("growth R", {apart: 4.0}),
        *step_rows("growth R", {apart: 5.6}, neurons=1_000_000),
        *step_rows("growth tasks", {"1": 2000, "50": 9000}, "important rows"),
        *step_rows("growth tasks", {f"{step_targets.SAME_ROWS} 50": 12.0}),
    ]
    one = "step with 50 EWC tasks (9,000 rows with importance) over 1 task"
    assert step_targets.verdicts(rows)[8:12] == [
        (f"{growth} (touched rows: 1,100 over 800)", "1.25 of <= 1.3", "met"),
        (f"{growth} (touched rows: 1,280 over 1,280)", "1.40 of <= 1.3", "missed"),
        (f"{one} (2,000 rows)", "1.20", ""),
        (f"{one} on the same rows", "1.00", ""),
    ]


def test_step_targets_on_a_gpu() -> None:
    rows_of = partial(step_rows, device="NVIDIA")
    early, late = "ssd inhibited", "ssd late switch"
    rows = [
        *rows_of(early, {"products": 800}, "neurons that fire"),
        *rows_of(late, {"products": 900}, "neurons that fire"),
        *rows_of(early, {"ours": 0.025, "plain": 1.0}),
        *rows_of(late, {"ours": 0.041, "plain": 1.0}),
        *rows_of(early, {"ours": 0.2}, neurons=100_000),  # has no target
        *rows_of("ssd", {"ours": 40e3}, mode="protocol"),
        *rows_of("ssd", {"ours": 2000}, "epochs", mode="protocol"),
        *rows_of("ssd", {"ours": 60e3}, mode="protocol", neurons=1000),
        *rows_of("ssd", {"ours": 1200}, "epochs", mode="protocol", neurons=1000),
        *rows_of("growth S", {"1": 0.030, "10": 0.045}),
    ]
    assert [line for line in step_targets.verdicts(rows) if "others" not in line[0]] == [
        ("SSD step, inhibited, R = 10,000: us", "25.00 of <= 30", "met"),
        ("SSD step, inhibited, R = 10,000: plain over ours", "40.00 of >= 25", "met"),
        ("SSD step, late switch, R = 10,000: us", "41.00 of <= 40", "missed"),
        ("SSD step, late switch, R = 10,000: plain over ours", "24.39 of >= 25", "missed"),
        ("whole protocol, R = 10,000, 5 x 2,000 of 2,000 epochs: s", "40.00 of <= 45", "met"),
        ("whole protocol, R = 1,000, 5 x 1,200 of 2,000 epochs: s", "60.00", ""),
        ("step of 10 learners at once over 1", "1.50 of <= 2", "met"),
    ]


OPS = {
    "sae_bench": set(sae_peers.CLASSES),
    "topk_bench": {"roofline", *cases.BUILDERS},
    "train_bench": {
        "ssd",
        *(f"ssd {phase}" for phase in PHASES),
        *(f"growth {axis}" for axis in ("R", "B", "k", "d", "tasks", "S")),
    },
}


@pytest.mark.parametrize(
    "name", ["topk_bench", "sae_bench", pytest.param("train_bench", marks=pytest.mark.slow)]
)
def test_quick_run_without_gpu(name: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(out)]
    if name == "train_bench":
        command += ["--protocol", "1", "--previous", str(ROOT)]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CPU FIGURES" in done.stdout
    assert "target" in done.stdout.lower()
    rows = record.read(out)
    assert {row.op for row in rows} >= OPS[name]
    assert all(row.correct and row.p50 for row in rows)
    if name == "train_bench":
        cases = {(row.op, row.mode) for row in rows if row.provider == "previous"}
        assert cases == {(f"ssd {phase}", m) for phase in PHASES for m in ("step", "epoch")}
    if name == "sae_bench":
        libraries = sae_peers.LIBRARIES["TopK"].values()
        missing = [library.package for library in libraries if not installed(library.package)]
        assert all(f"{package} is not installed" in done.stdout for package in missing)
        assert {row.metric for row in rows} == {"time", "saved", "FVU"}
        return
    assert out.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    out = tmp_path / "bench.csv"
    command = [sys.executable, "benchmarks/parallel_bench.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = record.read(out)
    found = {(row.provider, row.shape["processes"], row.metric) for row in rows}
    splits = {name for name, _, _ in found}
    assert splits == {"neurons split", "samples split"}
    for split in splits:
        for world in (1, 2, 4):
            assert (split, world, "time") in found
            assert (split, world, "memory") in found
            assert ((split, world, "exchanged") in found) == (split == "neurons split")


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
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with record.writing(Path("rows.csv"), "cpu") as writer:
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
            record.writing(tmp_path / "rows.csv", "cpu").__enter__()
        assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    "name", ["command_bench", "train_bench", "topk_bench", "sae_bench", "tune"]
)
def test_benchmarks_refuse_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--bogus"])
    assert exit_status(module.main) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --bogus (see --help)\n"
