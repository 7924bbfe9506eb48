"""scripts/paired_differences.py on runs whose differences are known."""

from pathlib import Path

import pytest

from scripts.paired_differences import main, table
from ssd.errors import UserError
from ssd.tables import csv_text

ACCURACY = {("a", 8): [0.1, 0.3], ("b", 8): [0.2, 0.6], ("a", 40): [0.5, 0.5], ("b", 40): [0.4]}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    lines = [
        {"method": method, "epochs": epochs, "seed": seed, "mean_accuracy": value, "bwt": 0}
        for (method, epochs), values in ACCURACY.items()
        for seed, value in enumerate(values)
    ]
    path = tmp_path / "runs.csv"
    # A run that diverged has no accuracy.
    diverged = {"method": "b", "epochs": 40, "seed": 1, "mean_accuracy": None, "bwt": None}
    path.write_text(csv_text([*lines, diverged]))
    return path


def test_pairs_by_seed_at_equal_settings(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = table(runs, "method", "a")
    assert found[0] == "| method | epochs | seeds | mean_accuracy, paired | p |"
    # Differences 0.1 and 0.3: mean 0.2, error 0.1, t = 2 with one degree of freedom.
    assert found[2:] == [
        "| b - a | 8 | 2 | +0.2000 ± 0.1000 | 0.295 |",
        "| b - a | 40 | 1 | -0.1000 |  |",
    ]
    assert table(runs, "epochs", "8")[2:] == [
        "| 40 - 8 | a | 2 | +0.3000 ± 0.1000 | 0.205 |",
        "| 40 - 8 | b | 1 | +0.2000 |  |",
    ]
    main([str(runs), "method", "a"])
    assert capsys.readouterr().out.splitlines() == found


def test_refusals(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no setting bwt; use one of method, epochs"):
        table(runs, "bwt", "0")
    with pytest.raises(UserError, match="no method c; use one of a, b"):
        table(runs, "method", "c")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(UserError, match="no setting method"):
        table(empty, "method", "a")
