"""What the training step is meant to reach, from the rows of a run of train_bench."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.record import Row

# (what, measured, "met" | "missed" | "" where there is no target)
Verdict = tuple[str, str, str]
PRODUCTS = "products"  # that a step cannot do without
OTHERS = ("plain", "compiled", "without numba", "previous")  # providers beside ours
PATHS = ("code", "active", "all", "exact", "graded", "dense")
SAME_ROWS = "1 on the rows of"
# The half of a step that costs nothing for neurons at rest, and the same on B k rows.
BACKWARD, APART = "backward + update", "backward + update, B k rows"
# Targets on a CPU: plain over ours for an epoch, ours over the products, growth of a half step.
EPOCH = {("ssd inhibited", 1000): 2.5, ("ssd inhibited", 10_000): 4.0}
OVER_PRODUCTS, GROWTH = 1.5, 1.3
# On an H100: microseconds of a step, plain over ours, ten learners over one, seconds of a protocol.
REPLAY = {(op, neurons): bound for op, bound in (("ssd inhibited", 30), ("ssd late switch", 40))
          for neurons in (1000, 10_000)}  # fmt: skip
OVER_PLAIN, LEARNERS, PROTOCOL = 25.0, 2.0, 45.0
EPOCHS = 2000  # of a task in the whole protocol


class Medians:
    """Medians of a run by what was timed, provider, metric and sizes."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if row.correct and row.p50 is not None]
        self.cuda = bool(rows) and not rows[0].device.startswith("CPU")

    def get(
        self, op: str, provider: str, metric: str = "time", mode: str = "step", **sizes: int
    ) -> float | None:
        for row in self.rows:
            here = (row.op, row.provider, row.metric, row.mode) == (op, provider, metric, mode)
            if here and sizes.items() <= row.shape.items():
                return row.p50
        return None

    def cases(self, mode: str) -> list[tuple[str, int]]:
        """(op, R) of our steps or epochs, in the order of the run."""
        wanted = mode, "ours", "time"
        ours = (row for row in self.rows if (row.mode, row.provider, row.metric) == wanted)
        return list(dict.fromkeys((row.op, row.shape["R"]) for row in ours))


def verdicts(rows: list[Row]) -> list[Verdict]:
    """One line for each thing that the rows can answer."""
    found = Medians(rows)
    return [*_steps(found), *_epochs(found), *_protocol(found), *_growth(found)]


def _steps(found: Medians) -> Iterator[Verdict]:
    for op, neurons in found.cases("step"):
        path = next((p for p in PATHS if found.get(op, "ours", p, R=neurons)), "")
        firing = found.get(op, PRODUCTS, "neurons that fire", R=neurons)
        if firing is None:
            continue
        name = f"SSD step, {op.removeprefix('ssd ')}, R = {neurons:,}"
        yield from _beside(found, f"{name} ({path}: {firing:,.0f} neurons fire)", op, neurons)
        ours, plain, floor = (
            found.get(op, provider, R=neurons) for provider in ("ours", "plain", PRODUCTS)
        )
        if not found.cuda:
            yield from _line(f"{name}: ours over its products", _ratio(ours, floor), OVER_PRODUCTS)
        elif ours is not None and (op, neurons) in REPLAY:
            yield from _line(f"{name}: us", 1e3 * ours, REPLAY[op, neurons])
            yield from _line(f"{name}: plain over ours", _ratio(plain, ours), least=OVER_PLAIN)


def _epochs(found: Medians) -> Iterator[Verdict]:
    for op, neurons in found.cases("epoch"):
        name = f"SSD epoch, {op.removeprefix('ssd ')}, R = {neurons:,}"
        yield from _beside(found, name, op, neurons, "epoch")
        bound = None if found.cuda else EPOCH.get((op, neurons))
        if bound is not None:
            plain, ours = (found.get(op, p, mode="epoch", R=neurons) for p in ("plain", "ours"))
            yield from _line(f"{name}: plain over ours", _ratio(plain, ours), least=bound)


def _beside(
    found: Medians, name: str, op: str, neurons: int, mode: str = "step"
) -> Iterator[Verdict]:
    """How many times as long as ours each other provider takes."""
    ours = found.get(op, "ours", mode=mode, R=neurons)
    ratios = {p: _ratio(found.get(op, p, mode=mode, R=neurons), ours) for p in OTHERS}
    said = ", ".join(f"{provider} {r:.2f}" for provider, r in ratios.items() if r is not None)
    if said:
        yield f"{name}: others over ours", said, ""


def _protocol(found: Medians) -> Iterator[Verdict]:
    for op, neurons in found.cases("protocol"):
        taken = found.get(op, "ours", mode="protocol", R=neurons)
        epochs = found.get(op, "ours", "epochs", mode="protocol", R=neurons)
        if taken is None or epochs is None:
            continue
        name = f"whole protocol, R = {neurons:,}, 5 x {epochs:,.0f} of {EPOCHS:,} epochs: s"
        bound = PROTOCOL if found.cuda and epochs == EPOCHS else None
        yield from _line(name, taken / 1e3, bound)


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
        yield from _line(name, _ratio(*times), None if found.cuda else GROWTH)
    important = [found.get("growth tasks", tasks, "important rows") for tasks in ("50", "1")]
    if None not in important:
        ours, one, same = (
            found.get("growth tasks", tasks) for tasks in ("50", "1", f"{SAME_ROWS} 50")
        )
        many, few = (f"{count:,.0f} rows" for count in important)
        name = f"step with 50 EWC tasks ({many} with importance) over 1 task"
        yield from _line(f"{name} ({few})", _ratio(ours, one))
        yield from _line(f"{name} on the same rows", _ratio(ours, same))
    ratio = _ratio(*(found.get("growth S", learners) for learners in ("10", "1")))
    name = "step of 10 learners at once over 1"
    yield from _line(name, ratio, LEARNERS if found.cuda else None)


def _line(
    what: str, figure: float | None, most: float | None = None, least: float | None = None
) -> Iterator[Verdict]:
    if figure is None:
        return
    if most is not None:
        yield what, f"{figure:.2f} of <= {most:g}", "met" if figure <= most else "missed"
    elif least is not None:
        yield what, f"{figure:.2f} of >= {least:g}", "met" if figure >= least else "missed"
    else:
        yield what, f"{figure:.2f}", ""


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def markdown(rows: list[Row]) -> str:
    lines = ["| what | measured | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(line)} |" for line in verdicts(rows))])
