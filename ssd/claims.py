"""The paper's claims, and whether the runs bear them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean

from ssd.experiments import DEFAULT
from ssd.lines import NOT_RUN, Line, estimate, shown


def verdicts(lines: Sequence[Line]) -> Iterator[str]:
    """The paper's claims on each benchmark and size, and whether our figures bear them out."""
    by_key = {
        (line.row.benchmark, line.row.neurons, line.row.method): line
        for line in lines
        if line.row.factor in ("", DEFAULT) and line.row.peer is None
    }
    for benchmark, neurons in dict.fromkeys((b, n) for b, n, _ in by_key):
        where = f"{benchmark.title}, R = {neurons:,}"
        found = [by_key.get((benchmark, neurons, m)) for m in ("sdmlp", "ssd", "ssd+ewc")]
        group = [line for line in found if line is not None]
        if len(group) < len(found):
            continue
        accuracy = [line.values("mean_accuracy") for line in group]
        forgetting = [line.values("forgetting") for line in group]
        yield f"{where}: SDMLP < SSD < SSD+EWC, standard errors apart: {_ordered(accuracy)}"
        yield f"{where}: SSD - SDMLP >= 0.05: {_gained(accuracy)}"
        yield f"{where}: SSD forgets at least 30 % less than SDMLP: {_kept(forgetting)}"


def _ordered(groups: Sequence[Sequence[float]]) -> str:
    if not all(groups):
        return NOT_RUN
    figures = " / ".join(shown("mean_accuracy", values) for values in groups)
    if any(len(values) == 1 for values in groups):
        return f"undecided, one seed has no standard error ({figures})"
    bounds = [(m - e, m + e) for m, e in map(estimate, groups) if e is not None]
    apart = all(low[1] < high[0] for low, high in pairwise(bounds))
    return f"{'yes' if apart else 'no'} ({figures})"


def _gained(groups: Sequence[Sequence[float]]) -> str:
    if not (groups[0] and groups[1]):
        return NOT_RUN
    gain = mean(groups[1]) - mean(groups[0])
    return f"{'yes' if gain >= 0.05 else 'no'} ({gain:+.4f})"


def _kept(groups: Sequence[Sequence[float]]) -> str:
    if not (groups[0] and groups[1]):
        return NOT_RUN
    before, after = mean(groups[0]), mean(groups[1])
    if before <= 0:
        return f"undecided, SDMLP does not forget ({before:.4f})"
    change = after / before - 1
    return f"{'yes' if change <= -0.3 else 'no'} ({before:.4f} to {after:.4f}, {change:+.0%})"
