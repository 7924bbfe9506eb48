"""results/peers: the page shows what its tables hold."""

import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from ssd.peers.learners import ALGORITHM
from ssd.peers.study import Row, read_rows

RESULTS = Path(__file__).parents[3] / "results/peers"
PAGE = (RESULTS / "README.md").read_text(encoding="utf-8")
NAMES = ("mnist", "cifar10", "cifar100")


def by_learner(name: str) -> dict[str, list[Row]]:
    """The test rows of each learner, by seed."""
    found: dict[str, list[Row]] = {}
    for row in read_rows(RESULTS / f"{name}.csv").values():
        if row.split == "test":
            found.setdefault(row.learner, []).append(row)
    return found


def table(heading: str) -> dict[str, list[str]]:
    """The cells of the rows of a table of the page, by their first."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {name: cells for name, *cells in rows}


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_learner_are_of_one_commit_and_of_this_code(name: str) -> None:
    for rows in by_learner(name).values():
        assert {row.algorithm for row in rows} == {ALGORITHM}
        (commit,) = {row.commit for row in rows}
        assert re.fullmatch(r"[0-9a-f]{40}", commit)


@pytest.mark.parametrize(("column", "name"), list(enumerate(NAMES)))
def test_the_page_shows_the_accuracies(column: int, name: str) -> None:
    shown, rows = table("mean accuracy"), by_learner(name)
    for learner, cells in shown.items():
        found = [row.mean_accuracy for row in rows.get(learner, [])]
        assert cells[column] == (spread(found, 3) if found else "")
    assert set(rows) <= set(shown)


@pytest.mark.parametrize(("column", "name"), list(enumerate(NAMES)))
def test_the_page_shows_what_the_sparse_code_gains(column: int, name: str) -> None:
    """Paired over seeds, of the best of its forms."""
    shown, rows = table("best sparse code minus"), by_learner(name)
    scores = {learner: [row.mean_accuracy for row in found] for learner, found in rows.items()}
    best = max((mean(s), s) for learner, s in scores.items() if learner.startswith("sparse"))[1]
    for learner, cells in shown.items():
        if learner in scores:
            gains = [b - other for b, other in zip(best, scores[learner], strict=True)]
            assert cells[column] == f"{mean(gains):+.4f} ± {stdev(gains):.4f}"
        else:
            assert cells[column] == ""
    others = {learner for learner in rows if not learner.startswith("sparse")}
    assert others <= set(shown)


@pytest.mark.parametrize(("column", "name"), list(enumerate(NAMES)))
def test_the_page_shows_what_learners_cost(column: int, name: str) -> None:
    shown, rows = table("fit s, test s, MiB"), by_learner(name)
    for learner, cells in shown.items():
        found = rows.get(learner, [])
        costs = [
            mean(getattr(row, cost) for row in found)
            for cost in ("fit_seconds", "test_seconds", "state_mib")
            if found
        ]
        assert cells[column] == ", ".join(
            f"{cost:.{digits}f}" for cost, digits in zip(costs, (1, 2, 1), strict=False)
        )
    assert set(rows) <= set(shown)
