"""Features and addresses of any scale: the same answers, or a refusal that names the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd import data, train
from ssd.config import Config, hints
from ssd.data import Dataset, class_order, split
from ssd.errors import Diverged, UserError
from ssd.metrics import address_cosine, predicted
from ssd.models import SDMLP
from ssd.peers import __main__ as peers
from ssd.peers import learners
from ssd.peers.learners import entries, evaluate_stream
from ssd.peers.readout import RandomCode, discriminant, ridge_solution
from ssd.peers.trained_readout import TrainedReadout

# Powers of two near 1e30 and 1e300: to scale by them is exact.
SCALES = [(torch.float32, 100), (torch.float32, -96), (torch.float64, 990), (torch.float64, -990)]
C, D = 6, 20


def make(dtype: torch.dtype, exponent: int = 0) -> Dataset:
    """Overlapping classes, no entry below 0, in units of 2^exponent."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(C, D, generator=draw, dtype=torch.float64).abs()

    def part(count: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(C).repeat_interleave(count)
        x = centres[y] + torch.randn(len(y), D, generator=draw, dtype=torch.float64)
        return (x.relu().to(torch.float32).to(dtype) * 2.0**exponent), y

    return Dataset("features", *part(30), *part(20))


@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=str)
def test_addresses(dtype: torch.dtype, exponent: int) -> None:
    model = SDMLP(D, 10, C, 2, dtype=dtype)
    plain, scaled = (make(dtype, e).x_train for e in (0, exponent))
    assert torch.equal(model.address(scaled), model.address(plain))
    assert torch.equal(model.address(torch.zeros(2, D, dtype=dtype)), torch.zeros(2, D))
    positive = (0.1 + torch.rand(3, D)).double().requires_grad_()
    torch.autograd.gradcheck(model.double().address, positive)


@pytest.mark.parametrize("name", [entry.name for entry in entries(D, 60)])
@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=str)
def test_peers(name: str, dtype: torch.dtype, exponent: int) -> None:
    entry = next(e for e in entries(D, 60) if e.name == name)

    def accuracy(loaded: Dataset) -> Tensor:
        learner = entry.make(D, C, 60, 0, {**entry.early[-1], **entry.late[-1]})
        return evaluate_stream(learner, split(loaded, 3, class_order(C, 0)))

    plain = accuracy(make(torch.float32))
    assert plain[-1].mean() > 0.4  # chance is 0.17
    assert torch.equal(accuracy(make(dtype, exponent)), plain)


@pytest.mark.parametrize("exponent", [100, -96])
def test_trained_readout(exponent: int) -> None:
    config = Config(
        dataset="features",
        features="none",
        method="ssd",
        tasks=3,
        epochs=3,
        batch_size=16,
        neurons=60,
        k=4,
        anneal_samples=100,
        lr=0.5,
    )
    found = []
    for unit in (0, exponent):
        tasks = split(make(torch.float32, unit), 3, class_order(C, 0))
        found.append(evaluate_stream(TrainedReadout(config, tasks, C), tasks))
    assert torch.equal(*found)


def test_power_of_the_code_does_not_overflow() -> None:
    code = RandomCode(torch.randn(30, D), 3, power=3.0)
    x = make(torch.float32, 100).x_train
    code.begin(x)
    assert code(x).values.isfinite().all()
    assert (code(x).values > 0).any(1).all()


def test_cosines_are_free_of_scale() -> None:
    a, b = torch.rand(4, D).double(), torch.rand(3, D).double()
    expected = address_cosine(a, b)
    for exponent in (-1000, -60, 990):
        assert address_cosine(a * 2.0**exponent, b) == pytest.approx(expected, abs=1e-15)


def test_full_shrinkage_is_the_identity() -> None:
    gram, cross, counts = 3 * torch.eye(4), torch.eye(4), torch.ones(4).long()
    weight, _ = discriminant(gram, cross, counts, 1.0)
    # S = (3 - 1) / 4 on the diagonal, the means are one-hot.
    torch.testing.assert_close(weight, 2 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "solve",
    [
        lambda gram: ridge_solution(gram, torch.ones(3, 2), 1e-3),
        lambda gram: discriminant(gram, torch.zeros(3, 2), torch.tensor([1, 1]), 1e-3),
    ],
)
@pytest.mark.parametrize("gram", [torch.zeros(3, 3), torch.full((3, 3), torch.nan)])
def test_a_readout_without_a_solution_is_named(
    solve: Callable[[Tensor], object], gram: Tensor
) -> None:
    with pytest.raises(Diverged, match=r"no solution at strength 0\.001.* of 3 units"):
        solve(gram)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_is_no_answer(bad: float) -> None:
    scores = torch.tensor([[0.0, -torch.inf, 2.0], [1.0, 0.5, -torch.inf]])
    assert predicted(scores).tolist() == [2, 0]
    scores[1, 0] = bad
    with pytest.raises(Diverged, match="1 of 2 samples have scores"):
        predicted(scores)

    class Silent(learners.NearestClassMean):
        def predict(self, x: Tensor) -> Tensor:
            return super().predict(x) * bad

    with pytest.raises(Diverged, match="samples have scores"):
        evaluate_stream(Silent(D, C), split(make(torch.float32), 3, class_order(C, 0)))


def write(path: Path, **changed: np.ndarray) -> Path:
    loaded = make(torch.float64)
    arrays = {n: getattr(loaded, n).numpy() for n in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(path, **(arrays | changed))
    return path


@pytest.mark.parametrize(
    ("part", "factor", "message"),
    [
        ("x_train", 1e200, r"180 rows of x_train lie above 3\.4e\+38.*largest entry.*e\+200"),
        ("x_test", 1e39, r"120 rows of x_test lie above"),
        ("x_train", 1e-200, r"180 rows of x_train lie below 1\.2e-38.*scale all features"),
    ],
)
def test_what_float32_cannot_hold_is_refused(
    tmp_path: Path, part: str, factor: float, message: str
) -> None:
    x = getattr(make(torch.float64), part).numpy() * factor
    with pytest.raises(UserError, match=message):
        data.load("features", tmp_path, write(tmp_path / "f.npz", **{part: x}))


def test_small_entries_beside_ordinary_ones_are_let_pass(tmp_path: Path) -> None:
    x = make(torch.float64).x_train.numpy()
    x[:, 0] = 1e-200
    loaded = data.load("features", tmp_path, write(tmp_path / "f.npz", x_train=x))
    assert not loaded.x_train[:, 0].any()
    x[3] = 1e-50
    with pytest.raises(UserError, match=r"1 rows of x_train lie below.*set rows as small as these"):
        data.load("features", tmp_path, write(tmp_path / "f.npz", x_train=x))


def test_dead_features_are_noted(tmp_path: Path) -> None:
    said: list[str] = []

    def noted(**changed: np.ndarray) -> list[str]:
        said.clear()
        data.load("features", tmp_path, write(tmp_path / "f.npz", **changed), notice=said.append)
        return said

    x = make(torch.float64).x_train.numpy()
    assert noted() == []
    (line,) = noted(x_train=-x)
    assert line.startswith("180 of the 180 rows of x_train have no entry above 0")
    dead = x.copy()
    dead[:, : D // 2 + 1] = 0.25
    (line,) = noted(x_train=dead)
    assert line.startswith("11 of the 20 columns of x_train are constant")
    dark, columns = noted(x_train=0 * x)
    assert "no entry above 0" in dark
    assert columns.startswith("20 of the 20 columns")
    for scale in (1.0, 1e30):
        (line,) = noted(x_train=scale * (10 + x))
        assert "almost parallel (mean cosine 0.9" in line


@pytest.mark.parametrize("command", [train.main, peers.main])
def test_notes_go_to_stderr(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], int],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("f.npz"), x_train=-make(torch.float64).x_train.numpy())
    assert command(["--features", "f.npz", "--tasks", "5"]) == 2  # after the data have been read
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("note: 180 of the 180 rows of x_train")


def test_plain_networks_are_told_of_the_scale() -> None:
    config = Config(method="naive")
    assert hints(config, 10**6, 1.0) == []
    assert hints(Config(method="sdmlp"), 10**6, 1e20) == []
    for largest in (1e20, 1e-15):
        (line,) = hints(config, 10**6, largest)
        assert line.startswith(f"the largest feature is {largest:.1e}, and relu-mlp takes")
