"""What the training step is meant to reach, from the rows of a run of train_bench."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.record import Row

# (what, measured, "met" | "missed" | "" where there is no target)
Verdict = tuple[str, str, str]
# Providers of the float32 product alone, and what they compute: as one writes it, and the order
# that a CPU multiplies fastest.
PRODUCTS = {
    "float32 product alone": "x @ W.T",
    "float32 product alone, fastest order": "torch.mm(W, x.T, out=kept)",
}
SAME_ROWS = "1 on the rows of"
# The half of a step that costs nothing for neurons at rest, and the same on B k rows.
BACKWARD, APART = "backward + update", "backward + update, B k rows"


class Medians:
    """Medians of a run by (op, provider, metric) and the value of one size."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if row.correct and row.p50 is not None]

    def get(self, op: str, provider: str, metric: str = "time", **sizes: int) -> float | None:
        for row in self.rows:
            here = (row.op, row.provider, row.metric) == (op, provider, metric)
            if here and sizes.items() <= row.shape.items():
                return row.p50
        return None

    def ratio(self, op: str, above: str, below: str, **sizes: int) -> float | None:
        return _ratio(self.get(op, above, **sizes), self.get(op, below, **sizes))

    def sizes(self, op: str) -> list[int]:
        return sorted({row.shape["R"] for row in self.rows if row.op == op})


def verdicts(rows: list[Row]) -> list[Verdict]:
    """One line for each thing that the rows can answer."""
    found = Medians(rows)
    return [*_steps(found), *_switch(found), *_epochs(found), *_growth(found)]


def _steps(found: Medians) -> Iterator[Verdict]:
    for neurons in found.sizes("ssd"):
        size = f"R = {neurons:,}"
        for op, bound in (("ssd", 5.0), ("sdmlp", 3.0)):
            name = f"{op.upper()} step, {size}"
            plain, compiled = (found.ratio(op, p, "ours", R=neurons) for p in ("plain", "compiled"))
            yield from _line(f"{name}: plain over ours", plain, bound, at_least=True)
            yield from _line(f"{name}: plain under torch.compile over ours", compiled)
            for provider, product in PRODUCTS.items():
                ratio = found.ratio(op, "ours", provider, R=neurons)
                yield from _line(f"{name}: ours over the float32 product `{product}`", ratio, 1.0)
    for neurons in found.sizes("ssd and sdmlp"):
        ratio = found.ratio("ssd and sdmlp", "ssd", "sdmlp", R=neurons)
        yield from _line(f"SSD step over SDMLP step, R = {neurons:,}", ratio, 1.15)


def _switch(found: Medians) -> Iterator[Verdict]:
    for op in ("ssd mid-switch", "ssd excited"):
        for neurons in found.sizes(op):
            path = next(
                (p for p in ("code", "active", "all") if found.get(op, "ours", p, R=neurons)),
                "",
            )
            graded = found.get(op, "ours", "graded", R=neurons) or 0.0
            name = f"SSD step, {op.removeprefix('ssd ')}, R = {neurons:,}"
            name += f" ({graded:.0%} of neurons at 0 < g < 1, {path} path)"
            yield from _line(
                f"{name}: plain over ours", found.ratio(op, "plain", "ours", R=neurons)
            )


def _epochs(found: Medians) -> Iterator[Verdict]:
    for neurons in found.sizes("ssd epoch"):
        ratio = found.ratio("ssd epoch", "plain", "ours", R=neurons)
        yield from _line(f"SSD epoch, R = {neurons:,}: plain over ours", ratio)


def _growth(found: Medians) -> Iterator[Verdict]:
    large, small = 1_000_000, 10_000
    for half in (BACKWARD, APART):
        times, rows = (
            [found.get("growth R", half, metric, R=size) for size in (large, small)]
            for metric in ("time", "touched rows")
        )
        touched = " over ".join(f"{count:,.0f}" for count in rows if count is not None)
        name = f"{BACKWARD}, R = {large:,} over R = {small:,}"
        name += f" (touched rows: {touched})" if touched else ""
        yield from _line(name, _ratio(*times), 1.3)
    many, few = (_important(found, tasks) for tasks in ("50", "1"))
    if many and few:
        name = f"step with 50 EWC tasks ({many} rows with importance) over 1 task"
        ratio = found.ratio("growth tasks", "50", "1")
        yield from _line(f"{name} ({few} rows)", ratio, 1.05)
        ratio = found.ratio("growth tasks", "50", f"{SAME_ROWS} 50")
        yield from _line(f"{name} on the same rows", ratio, 1.05)
    ratio = found.ratio("growth S", "10", "1")
    yield from _line("step of 10 learners at once over 1", ratio)


def _important(found: Medians, tasks: str) -> str:
    """How many rows carry importance, empty where that was not counted."""
    rows = found.get("growth tasks", tasks, "important rows")
    return "" if rows is None else f"{rows:,.0f}"


def _line(
    what: str, ratio: float | None, bound: float | None = None, at_least: bool = False
) -> Iterator[Verdict]:
    if ratio is None:
        return
    if bound is None:
        yield what, f"{ratio:.2f}", ""
        return
    met = ratio >= bound if at_least else ratio <= bound
    wanted = f"{'>=' if at_least else '<='} {bound:g}"
    yield what, f"{ratio:.2f} of {wanted}", "met" if met else "missed"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def markdown(rows: list[Row]) -> str:
    lines = ["| what | measured | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in verdicts(rows))])
