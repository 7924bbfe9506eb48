"""The claims of the paper and of this project, and whether the runs support them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from ssd.metrics import estimate, paired_difference
from ssd.reproduce.experiments import CLAIMS, DEFAULT, PAIRS, PAPER_SSD_EWC, Result
from ssd.reproduce.lines import NOT_RUN, Line
from ssd.tables import plus_minus

GAIN = 0.05  # of accuracy, from each method to the next
FORGOTTEN = -0.3  # change of forgetting from SDMLP to SSD
BEST = {"mnist": 0.86}  # accuracy of the paper's SSD + EWC, at either size
SIGNIFICANT = 0.05  # p below it
TESTED = ("mean_accuracy", "bwt")  # measures whose differences are tested


def verdicts(lines: Sequence[Line]) -> Iterator[str]:
    """The claims on each benchmark and size of the lines, and whether the figures support them.

    Differences are between runs with the same class order, and p is of a two-sided paired t test.
    """
    by_place = _by_place(lines)
    for methods in CLAIMS:
        for place, found in by_place.items():
            if not set(methods) <= found.keys():
                continue
            group = [found[method] for method in methods]
            first, second, third = group
            for measure, name in (("mean_accuracy", "accuracy"), ("bwt", "BWT")):
                order = f"{' < '.join(methods)} in {name}, p < {SIGNIFICANT}"
                yield f"{place}: {order}: {_ordered(group, measure)}"
            for before, after in pairwise(group):
                step = f"{after.row.method} - {before.row.method} >= {GAIN} in accuracy"
                yield f"{place}: {step}: {_gained(before, after)}"
            less = f"{methods[1]} forgets at least {-FORGOTTEN:.0%} less than {methods[0]}"
            yield f"{place}: {less}: {_kept(first, second)}"
            bound = BEST.get(first.row.benchmark.name)
            if bound is not None and methods[-1] == PAPER_SSD_EWC:
                reached = f"{methods[-1]} reaches {bound} in accuracy"
                yield f"{place}: {reached}: {_reached(third, bound)}"


def differences(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A record for each pair of methods, place and measure: the paired difference and its p.

    The pairs are PAIRS; in ablations each row and its method's default.
    """
    pairs: list[tuple[Line, Line]] = []
    for found in _by_place(lines).values():
        pairs += [(found[a], found[b]) for a, b in PAIRS if {a, b} <= found.keys()]
        for default in found.values():
            changed = (x for x in lines if x.row.value and x.row.method == default.row.method)
            pairs += [(default, x) for x in changed if x.row.place == default.row.place]
    return [
        {
            "benchmark": after.row.benchmark.name,
            "neurons": after.row.neurons,
            "method": after.row.name,
            "less": before.row.name,
            "measure": measure,
            **dict(
                zip(("difference", "standard_error", "p"), paired_difference(pair), strict=True)
            ),
            "class_orders": len(pair),
        }
        for before, after in pairs
        for measure in result.measures
        if measure in TESTED and (pair := paired(before, after, measure))
    ]


def _by_place(lines: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """The networks at their defaults: benchmark and size -> method -> line."""
    found: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line.row.factor in ("", DEFAULT) and line.row.peer is None:
            found.setdefault(line.row.place, {})[line.row.method] = line
    return found


def _ordered(group: Sequence[Line], measure: str) -> str:
    values = [line.values(measure) for line in group]
    if not all(values):
        return NOT_RUN
    figures = " / ".join(map(_spread, values))
    figures += "; " + " and ".join(_difference(a, b, measure) for a, b in pairwise(group))
    steps = [paired(a, b, measure) for a, b in pairwise(group)]
    if any(len(step) < 2 for step in steps):
        return f"undecided, a test needs two class orders in common ({figures})"
    tests = [paired_difference(step) for step in steps]
    holds = all(center > 0 and p is not None and p < SIGNIFICANT for center, _, p in tests)
    return f"{_yes(holds)} ({figures})"


def _gained(before: Line, after: Line) -> str:
    gains = paired(before, after, "mean_accuracy")
    if not gains:
        return NOT_RUN
    # Accuracies are sums of fractions, so rounding could hide a gain of exactly GAIN.
    verdict = _yes(round(mean(gains), 9) >= GAIN)
    return f"{verdict} ({_difference(before, after, 'mean_accuracy')})"


def _kept(before: Line, after: Line) -> str:
    first, second = before.values("forgetting"), after.values("forgetting")
    if not (first and second):
        return NOT_RUN
    was, now = mean(first), mean(second)
    if was <= 0:
        return f"undecided, {before.row.method} does not forget ({was:.4f})"
    change = now / was - 1
    difference = _difference(before, after, "forgetting")
    verdict = _yes(round(change, 9) <= FORGOTTEN)
    return f"{verdict} ({was:.4f} to {now:.4f}, {change:+.0%}; {difference})"


def _reached(line: Line, bound: float) -> str:
    values = line.values("mean_accuracy")
    if not values:
        return NOT_RUN
    return f"{_yes(mean(values) >= bound)} ({_spread(values)})"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def paired(before: Line, after: Line, measure: str) -> list[float]:
    """`after` minus `before` for each seed that both have, and so for one class order."""
    first, second = before.by_seed(measure), after.by_seed(measure)
    return [second[seed] - first[seed] for seed in sorted(first.keys() & second.keys())]


def _difference(before: Line, after: Line, measure: str) -> str:
    found = paired(before, after, measure)
    if not found:
        return "no class order in common"
    p = paired_difference(found)[2]
    orders = f"{len(found)} class order{'s' * (len(found) > 1)}"
    tested = "" if p is None else f", p {p:.2g}"
    return f"paired {_spread(found, sign='+')} over {orders}{tested}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """The mean of values ± its standard error."""
    return plus_minus(*estimate(values), sign=sign)
