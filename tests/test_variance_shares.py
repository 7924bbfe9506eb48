"""scripts/variance_shares.py on tables whose sums of squares are known."""

from itertools import product
from pathlib import Path

import pytest

from scripts.variance_shares import main, shares
from ssd.errors import UserError
from ssd.tables import csv_text

Line = dict[str, object]


def table(path: Path, lines: list[Line]) -> Path:
    path.write_text(csv_text(lines))
    return path


def lines(crossed: float) -> list[Line]:
    """Effects of +-3, +-1 and 0 on the accuracy in percent, and one of two settings together."""
    return [
        {
            "order_seed": order,
            "weight_seed": weight,
            "seed": seed,
            "mean_accuracy": 0.5 + (3 * order + weight + crossed * order * weight) / 100,
            "bwt": -0.5,
        }
        for order, weight, seed in product((-1, 1), (-1, 1), (31, 32, 33))
    ]


def test_shares_of_known_effects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """12 runs: squares of 9 and 1, and of 2^2 = 4 where the two act together."""
    found = shares(table(tmp_path / "a.csv", lines(crossed=0)))
    assert found == [
        ["order_seed", "2", "0.900", "0.091"],
        ["weight_seed", "2", "0.100", "0.091"],
        ["seed", "3", "0.000", "0.182"],
        ["interactions", "", "0.000", "0.636"],
    ]
    found = shares(table(tmp_path / "b.csv", lines(crossed=2)))
    assert [row[2] for row in found] == ["0.643", "0.071", "0.000", "0.286"]
    main([str(tmp_path / "b.csv")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "| setting | levels | share of the variance of mean_accuracy | by chance |"
    assert printed[2] == "| order_seed | 2 | 0.643 | 0.091 |"


REFUSED: dict[str, tuple[list[Line], str]] = {
    "empty": ([], "holds no runs of a sweep"),
    "sweep.csv": ([{"k": 1, "mean_accuracy": 0.5, "seeds": 3}], "holds no runs of a sweep"),
    "one is missing": (lines(0)[1:], "11 runs are not one of each of 12"),
    "one is there twice": ([*lines(0), lines(0)[0]], "13 runs are not one of each of 12"),
    "diverged": ([{**line, "mean_accuracy": None} for line in lines(0)], "12 runs diverged"),
    "no spread": ([{**line, "mean_accuracy": 0.1} for line in lines(0)], "there is no spread"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_shares_is_refused(tmp_path: Path, case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        shares(table(tmp_path / "runs.csv", content))
