"""The claims of the paper and of this project, and whether the runs support them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean

from ssd.metrics import estimate
from ssd.reproduce.experiments import DEFAULT, SHORT_LARGE
from ssd.reproduce.lines import NOT_RUN, Line
from ssd.tables import plus_minus

GAIN = 0.05  # of accuracy, from each method to the next
FORGOTTEN = -0.3  # change of forgetting from SDMLP to SSD
BEST = {"mnist": 0.86}  # accuracy of SSD+EWC, at either size


def verdicts(lines: Sequence[Line]) -> Iterator[str]:
    """The claims on each benchmark and size of the lines, and whether the figures support them.

    Differences are between runs with the same class order. "Standard errors apart" compares those
    of the methods' own means, as the claim does.
    """
    by_key = {
        (line.row.benchmark, line.row.neurons, line.row.method): line
        for line in lines
        if line.row.factor in ("", DEFAULT) and line.row.peer is None
    }
    for benchmark, neurons in dict.fromkeys((b, n) for b, n, _ in by_key):
        found = [by_key.get((benchmark, neurons, m)) for m in SHORT_LARGE]
        group = [line for line in found if line is not None]
        if len(group) < len(found):
            continue
        sdmlp, ssd, best = group
        where = sdmlp.row.place
        for measure, name in (("mean_accuracy", "accuracy"), ("bwt", "BWT")):
            order = f"SDMLP < SSD < SSD+EWC in {name}, standard errors apart"
            yield f"{where}: {order}: {_ordered(group, measure)}"
        yield f"{where}: SSD - SDMLP >= {GAIN} in accuracy: {_gained(sdmlp, ssd)}"
        yield f"{where}: SSD+EWC - SSD >= {GAIN} in accuracy: {_gained(ssd, best)}"
        yield f"{where}: SSD forgets at least {-FORGOTTEN:.0%} less than SDMLP: {_kept(sdmlp, ssd)}"
        if benchmark.name in BEST:
            bound = BEST[benchmark.name]
            yield f"{where}: SSD+EWC reaches {bound} in accuracy: {_reached(best, bound)}"


def _ordered(group: Sequence[Line], measure: str) -> str:
    values = [line.values(measure) for line in group]
    if not all(values):
        return NOT_RUN
    figures = " / ".join(map(_spread, values))
    figures += "; " + " and ".join(_difference(a, b, measure) for a, b in pairwise(group))
    if any(len(seeds) == 1 for seeds in values):
        return f"undecided, one seed has no standard error ({figures})"
    bounds = [(m - e, m + e) for m, e in map(estimate, values) if e is not None]
    apart = all(low[1] < high[0] for low, high in pairwise(bounds))
    return f"{_yes(apart)} ({figures})"


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
        return f"undecided, SDMLP does not forget ({was:.4f})"
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
    differences = paired(before, after, measure)
    if not differences:
        return "no class order in common"
    orders = f"{len(differences)} class order{'s' * (len(differences) > 1)}"
    return f"paired {_spread(differences, sign='+')} over {orders}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """The mean of values ± its standard error."""
    return plus_minus(*estimate(values), sign=sign)
