"""The peers against scikit-learn and by hand; the study that measures them."""

import copy
import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd.data import Task
from ssd.peers import __main__ as peers
from ssd.peers import learners
from ssd.peers import study as peer_study
from ssd.peers.learners import (
    FlyCL,
    FlyModel,
    NearestClassMean,
    RandomReLU,
    RanPAC,
    RidgeProbe,
    StreamingLDA,
    evaluate_stream,
)
from ssd.peers.readout import CodeReadout, RandomCode, ridge_solution
from ssd.peers.study import state_bytes

D, C = 6, 4


def data(per_class: int = 30) -> tuple[Tensor, Tensor]:
    """Overlapping classes with correlated inputs, labels in order."""
    y = torch.arange(C).repeat_interleave(per_class)
    mixing = torch.randn(D, D)
    return 1.5 * torch.randn(C, D)[y] + torch.randn(len(y), D) @ mixing, y


def stream(x: Tensor, y: Tensor, order: list[list[int]]) -> list[Task]:
    parts = [torch.isin(y, torch.tensor(classes)) for classes in order]
    return [
        Task(tuple(c), x[p], y[p], x[p][::2], y[p][::2]) for c, p in zip(order, parts, strict=True)
    ]


def fit(
    learner: learners.Learner, x: Tensor, y: Tensor, order: list[list[int]]
) -> learners.Learner:
    for task in stream(x, y, order):
        learner.fit_task(task.x_train, task.y_train)
    return learner


def test_nearest_class_mean_is_nearest_centroid() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    x, y = data()
    learner = fit(NearestClassMean(D, C), x, y, [[2], [0, 3], [1]])
    expected = neighbors.NearestCentroid().fit(x.double().numpy(), y.numpy())
    probe = 3 * torch.randn(200, D)
    found = learner.predict(probe).argmax(1)
    assert np.array_equal(found.numpy(), expected.predict(probe.double().numpy()))
    assert len(found.unique()) == C


@pytest.mark.parametrize("shrinkage", [0.01, 0.3])
def test_streaming_lda_is_lda(shrinkage: float) -> None:
    discriminant = pytest.importorskip(
        "sklearn.discriminant_analysis", reason="scikit-learn is not installed"
    )
    x, y = data()
    learner = fit(StreamingLDA(D, C, shrinkage), x, y, [[2], [0, 3], [1]])
    expected = discriminant.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    expected.fit(x.double().numpy(), y.numpy())
    probe = 3 * torch.randn(50, D)
    ours = learner.predict(probe)
    # Classes are equally many here, so sklearn's priors shift every score alike.
    theirs = torch.from_numpy(expected.decision_function(probe.double().numpy()))
    torch.testing.assert_close(
        ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    )


@pytest.mark.parametrize("of_input", [False, True])
def test_task_by_task_is_ridge(of_input: bool) -> None:
    """On a random hidden layer, or on the input and a constant."""
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    x, y = data()
    if of_input:
        learner: RandomReLU | RidgeProbe = RidgeProbe(D, C, ridge=1e-2)
    else:
        learner = RandomReLU(D, C, 40, torch.Generator().manual_seed(1), ridge=1e-2)
    fit(learner, x, y, [[3], [1], [0, 2]])
    assert learner._unit is not None
    hidden = learner._hidden(x / learner._unit).double()
    assert hidden.shape[1] == (D + 1 if of_input else 40)
    ridge = 1e-2 * hidden.square().sum(0).mean().item()
    expected = linear.Ridge(alpha=ridge, fit_intercept=False)
    expected.fit(hidden.numpy(), np.eye(C)[y])
    torch.testing.assert_close(
        learner.predict(x).double(),
        torch.from_numpy(expected.predict(hidden.numpy())),
        rtol=1e-4,
        atol=1e-5,
    )


def test_random_relu_is_acil() -> None:
    """Its recursive least squares, batch by batch, without a Gram matrix."""
    x, y = data()
    learner = RandomReLU(D, C, 40, torch.Generator().manual_seed(1), ridge=1e-3)
    fit(learner, x, y, [[3], [1], [0, 2]])
    penalty = 1e-3 * learner.gram.diagonal().mean()
    inverse = torch.eye(40, dtype=torch.float64) / penalty
    weight = torch.zeros(40, C, dtype=torch.float64)
    for task in stream(x, y, [[3], [1], [0, 2]]):
        hidden = (task.x_train / learner._unit @ learner.projection.T).relu().double()
        targets = torch.nn.functional.one_hot(task.y_train, C).double()
        projected = hidden @ inverse
        inner = torch.eye(len(hidden), dtype=torch.float64) + projected @ hidden.T
        inverse -= projected.T @ torch.linalg.solve(inner, projected)
        weight += inverse @ hidden.T @ (targets - hidden @ weight)
    found = ridge_solution(learner.gram, learner.cross, 1e-3)
    torch.testing.assert_close(found, weight, rtol=1e-9, atol=1e-9)


def chosen(learner: RandomReLU | FlyCL) -> float:
    """The penalty of a learner, in powers of ten."""
    return float(np.log10(learner.ridge * learner.gram.diagonal().mean().item()))


def test_ranpac_chooses_on_a_fifth_of_the_newest_task() -> None:
    x, y = data(50)
    tasks, seen = stream(x, y, [[1, 3], [0, 2]]), []
    learner = RanPAC(D, C, 40, torch.Generator().manual_seed(1))
    for task in tasks:
        learner.fit_task(task.x_train, task.y_train)
        hidden = (task.x_train / learner._unit @ learner.projection.T).relu().double()
        targets = torch.nn.functional.one_hot(task.y_train, C).double()
        order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
        errors = []
        for power in range(-8, 9):
            # Least squares with the penalty's rows below, without moments.
            rows = 10.0 ** (power / 2) * torch.eye(40, dtype=torch.float64)
            weight = torch.linalg.lstsq(
                torch.cat([hidden[order[:80]], rows]),
                torch.cat([targets[order[:80]], torch.zeros(40, C)]),
            ).solution
            errors.append((hidden[order[80:]] @ weight - targets[order[80:]]).square().mean())
        best = int(torch.stack(errors).argmin()) - 8
        assert chosen(learner) == pytest.approx(best)
        seen.append(hidden)
    hidden = torch.cat(seen)
    torch.testing.assert_close(learner.gram, hidden.T @ hidden)
    assert (learner.predict(x).argmax(1) == y).double().mean() > 0.8


@pytest.mark.parametrize("per_class", [12, 50])  # fewer samples than neurons, and more
def test_fly_cl_cross_validates_on_the_newest_task(per_class: int) -> None:
    x, y = data(per_class)
    tasks = stream(x, y, [[1, 3], [0, 2]])
    learner = FlyCL(D, C, 40, torch.Generator().manual_seed(1), share=0.25, connections=0.5)
    assert learner.projection.ne(0).sum(1).tolist() == [3] * 40
    seen = []
    for task in tasks:
        learner.fit_task(task.x_train, task.y_train)
        scores = task.x_train / learner._unit @ learner.projection.T
        kept = scores >= scores.topk(10).values[:, -1:]
        hidden = torch.where(kept, scores, 0.0).double()
        targets = torch.nn.functional.one_hot(task.y_train, C).double()
        n, points = len(hidden), []
        for power in range(-8, 9):
            # (I - A) = r (K + r I)^-1, which loses nothing where A is near I.
            kernel = hidden @ hidden.T + 10.0**power * torch.eye(n, dtype=torch.float64)
            left = 10.0**power * torch.linalg.inv(kernel)
            points.append((left @ targets).square().sum() / n / (left.trace() / n) ** 2)
        assert chosen(learner) == pytest.approx(int(torch.stack(points).argmin()) - 8)
        seen.append(hidden)
    hidden = torch.cat(seen)
    torch.testing.assert_close(learner.gram, hidden.T @ hidden)
    assert (learner.predict(x).argmax(1) == y).double().mean() > 0.5


def test_fly_model_is_its_one_pass_rule() -> None:
    """Sample by sample, clipped after each."""
    y = torch.arange(C).repeat_interleave(30)
    x = 2 * torch.randn(C, 80)[y] + torch.randn(len(y), 80)
    learner = FlyModel(80, C, 50, torch.Generator().manual_seed(2), share=0.1, lr=0.2)
    fit(learner, x, y, [[0, 1], [2, 3]])
    assert learner.projection.sum(1).tolist() == [8.0] * 50
    weight = torch.zeros(50, C, dtype=torch.float64)
    for sample, label in zip(x, y, strict=True):
        response = learner.projection @ (sample - sample.mean())
        kept = response.topk(5)
        code = kept.values.relu() / kept.values.max().clamp(min=1e-12)
        weight[kept.indices, label] += 0.2 * code.double()
        weight.clamp_(max=1.0)
    torch.testing.assert_close(learner.weight, weight, rtol=1e-5, atol=1e-5)
    assert (weight == 1).any()
    assert (learner.predict(x).argmax(1) == y).double().mean() > 0.5


LEARNERS = [
    NearestClassMean(D, C),
    StreamingLDA(D, C),
    FlyModel(D, C, 50, share=0.1),
    RidgeProbe(D, C),
    RandomReLU(D, C, 40),
    RanPAC(D, C, 40),
    FlyCL(D, C, 40),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_classes_not_seen_are_never_predicted(learner: learners.Learner) -> None:
    x, y = data()
    learner.fit_task(x[y == 2], y[y == 2])
    scores = learner.predict(x)
    assert scores.shape == (len(x), C)
    assert torch.isneginf(scores[:, [0, 1, 3]]).all()
    assert (scores.argmax(1) == 2).all()


class Lookup:
    """Knows the labels of the samples it was shown, and says 0 to any other."""

    def __init__(self) -> None:
        self.known: dict[float, int] = {}

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        # Of the second task it forgets the first one's class 0.
        self.known = {key: label for key, label in self.known.items() if label}
        self.known |= dict(zip(x[:, 0].tolist(), y.tolist(), strict=True))

    def predict(self, x: Tensor) -> Tensor:
        labels = [self.known.get(key, 1) for key in x[:, 0].tolist()]
        return torch.nn.functional.one_hot(torch.tensor(labels), C).double()


def test_evaluate_stream_fills_the_lower_triangle() -> None:
    x, y = data()
    accuracy = evaluate_stream(Lookup(), stream(x, y, [[0, 1], [2, 3]]))
    assert accuracy.dtype == torch.float64
    assert accuracy.tolist() == [[1.0, 0.0], [0.5, 1.0]]


def archive(path: Path) -> Path:
    x, y = data(40)
    with path.open("wb") as file:
        np.savez(file, x_train=x, y_train=y, x_test=x[::4], y_test=y[::4])
    return path


def test_a_study_chooses_on_validation_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [replace(e, early=e.early[:2], late=e.late[:2]) for e in learners.entries(D, 20)]
    monkeypatch.setattr(peers, "entries", lambda *_: some)
    out = tmp_path / "sub" / "tiny.csv"
    arguments = ["--features", str(archive(tmp_path / "tiny.npz")), "--tasks", "2"]
    arguments += ["--neurons", "20", "--seeds", "2", "--out", str(out)]
    assert peers.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tiny, 2 tasks, R = 20, 2 seeds" in printed
    assert "mean ± standard deviation over seeds" in printed
    rows = list(csv.DictReader(out.read_text().splitlines()))
    for entry in some:
        mine = [row for row in rows if row["learner"] == entry.name]
        tried = [row for row in mine if row["split"] == "validation"]
        tested = [row for row in mine if row["split"] == "test"]
        assert len(tried) == len(entry.early) * len(entry.late)
        # Late settings share a fit, so they report the same time for it.
        assert len({row["fit_seconds"] for row in tried}) <= len(entry.early)
        assert [row["seed"] for row in tested] == ["0", "1"]
        best = max(float(row["mean_accuracy"]) for row in tried)
        chosen = [row for row in tried if row["settings"] == tested[0]["settings"]]
        assert float(chosen[0]["mean_accuracy"]) == best
        assert json.loads(tested[0]["settings"]) is not None
    # A row that is missing is measured again, to the same figure; the others are kept.
    lost = next(row for row in rows if row["split"] == "test")
    text = out.read_text().splitlines(keepends=True)
    out.write_text("".join(text[: rows.index(lost) + 1] + text[rows.index(lost) + 2 :]))
    assert peers.main(arguments) == 0
    again = list(csv.DictReader(out.read_text().splitlines()))
    assert len(again) == len(rows)
    assert again[-1]["mean_accuracy"] == lost["mean_accuracy"]


def test_mistakes_end_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = ["--features", str(archive(tmp_path / "tiny.npz"))]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for arguments, message in (
        ([*features, "--tasks", "3"], "--tasks 3 does not divide"),
        ([*features, "--neurons", "5"], "--neurons 5 must be at least 10"),
        ([*features, "--tasks", "2", "--seeds", "0"], "--seeds 0 must be in 1..10000"),
        ([*features, "--tasks", "2", "--seeds", "10001"], "--seeds 10001 must be in 1..10000"),
        ([*features, "--tasks", "2", "--neurons", str(10**12)], f"--neurons {10**12} does not fit"),
        (
            [*features, "--tasks", "2", "--out", "/dev/full"],
            "--out /dev/full is not an ordinary file",
        ),
        ([*features, "--tasks", "2", "--out", str(other)], "is not a table of peers"),
        (["--magic"], "--magic"),
    ):
        assert peers.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert other.read_text() == "a,b\n1,2\n"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short command, and its features, in the working directory."""
    monkeypatch.chdir(tmp_path)
    few = [replace(e, early=e.early[:2], late=e.late[:2]) for e in learners.entries(D, 20)[:2]]
    monkeypatch.setattr(peers, "entries", lambda *_: few)
    archive(Path("f.npz"))
    return ["--features", "f.npz", "--tasks", "2", "--neurons", "20", "--out", "t.csv"]


def test_state_counts_every_tensor_of_the_learner() -> None:
    arrays = 8 * (20 * 20 + 20 * C) + 4 * 20 * D  # Gram matrix and class sums, projection
    assert state_bytes(RandomReLU(D, C, 20)) == arrays + 8 * C  # and counts
    code = RandomCode(torch.randn(20, D), 3)
    learner = CodeReadout(code, C)
    assert state_bytes(learner) == arrays + 8 * C
    code.begin(torch.randn(5, D))
    assert state_bytes(learner) == arrays + 8 * C + 4 * D


def test_cpu_seconds_are_of_the_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(peer_study, "process_time", lambda: next(ticks))
    watch = peer_study.Stopwatch()
    assert watch.call(max, 4, 7) == 7
    watch.call(str)
    assert watch.seconds == 2.5


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return "".join(line for line in capsys.readouterr().out.splitlines(True) if "│" in line)


@pytest.mark.parametrize("change", ["data", "tasks", "algorithm"])
def test_rows_of_another_study_are_refused(
    study: list[str],
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert peers.main(study) == 0
    before = Path("t.csv").read_bytes()
    if change == "data":  # of the same name
        arrays = dict(np.load("f.npz"))
        arrays["y_train"] = arrays["y_train"][::-1]
        np.savez("f.npz", **arrays)
    elif change == "tasks":
        study[study.index("--tasks") + 1] = "4"
    else:
        monkeypatch.setattr(peer_study, "ALGORITHM", 0)
    capsys.readouterr()
    assert peers.main(study) == 2
    printed, said = capsys.readouterr()
    key = "data_crc32" if change == "data" else change
    assert said.startswith(f"error: --out t.csv is of another study ({key} ")
    assert (printed, said.count("\n")) == ("", 1)
    assert Path("t.csv").read_bytes() == before
    assert [path.name for path in Path().glob(".*")] == []


def test_the_same_data_by_another_name_are_not_measured_again(
    study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(study) == 0
    table, before = shown(capsys), Path("t.csv").read_bytes()
    Path("f.npz").rename("g.npz")
    assert peers.main([*study, "--features", "g.npz"]) == 0
    assert shown(capsys) == table
    assert Path("t.csv").read_bytes() == before


def test_a_table_shows_what_was_asked_for_whatever_else_the_file_holds(
    study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the seeds of another command, nor settings that are not tried any more."""
    assert peers.main([*study, "--seeds", "1"]) == 0
    table = shown(capsys)
    assert peers.main([*study, "--seeds", "3"]) == 0
    rows = Path("t.csv").read_text()
    tried = [line for line in rows.splitlines() if ",validation,streaming LDA," in line]
    cells = next(csv.reader([tried[0]]))
    cells[4], cells[7] = '{"shrinkage": 0.77}', "1.0"
    stranger = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    head, *rest = rows.splitlines()
    Path("t.csv").write_text("\n".join([head, stranger, *rest[::-1]]) + "\n")
    capsys.readouterr()
    assert peers.main([*study, "--seeds", "1"]) == 0
    assert shown(capsys) == table


def test_a_table_that_was_saved_by_another_program(
    study: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main(study) == 0
    table, text = shown(capsys), Path("t.csv").read_text()
    Path("t.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert peers.main(study) == 0
    assert shown(capsys) == table
    run_twice = text + text.splitlines()[-1] + "\n"
    *start, last = list(csv.reader(text.splitlines()))
    columns = [start[0].index(name) for name in ("mean_accuracy", "fit_seconds", "state_mib")]

    def spoiled(column: int, value: str) -> bytes:
        cells = [value if place == column else cell for place, cell in enumerate(last)]
        stream = StringIO()
        csv.writer(stream, lineterminator="\n").writerows([*start, cells])
        return stream.getvalue().encode()

    for content in (
        b"",
        b"\x00",
        text.encode("utf-16"),
        *map(str.encode, (text.replace(",", ";"), text.replace("algorithm", "version", 1))),
        *map(str.encode, (text[:-30], text + "1,2\n", run_twice)),
        *(spoiled(column, bad) for column in columns for bad in ("nan", "-1")),
        spoiled(columns[0], "7.0"),
    ):
        Path("t.csv").write_bytes(content)
        assert peers.main(study) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert Path("t.csv").read_bytes() == content


def test_rows_of_several_commits_say_so(
    study: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seeds, made in (("1", "c0ffee"), ("2", "decaf")):
        monkeypatch.setattr(peer_study, "commit", lambda made=made: made)
        assert peers.main([*study, "--seeds", seeds]) == 0
    assert capsys.readouterr().err.endswith("note: the table shows runs of 2 commits\n")


@pytest.mark.parametrize("label", [-100, -1, C])
@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_a_label_out_of_range_is_named_and_changes_nothing(
    learner: learners.Learner, label: int
) -> None:
    x, y = data()
    fresh = copy.deepcopy(learner)
    fresh.fit_task(x, y)
    y[3], before = label, copy.deepcopy(fresh)
    with pytest.raises(ValueError, match=f"{type(learner).__name__}: labels run .*{label}"):
        fresh.fit_task(x, y)
    assert torch.equal(fresh.predict(x), before.predict(x))
