"""What the rows of train_bench say of the targets of the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.record import Row, find, ratio

# (what, measured, "met" | "missed" | "" where there is no target)
Verdict = tuple[str, str, str]
PRODUCTS = "products"  # that a step cannot do without
OTHERS = ("plain", "compiled", "without numba", "previous")  # providers beside ours
PATHS = ("code", "active", "all", "exact", "graded", "dense")  # forms of the hidden layer
SAME_ROWS = "1 on the rows of"
# The half of a step that costs nothing for neurons at rest, and the same on B k rows.
BACKWARD, APART = "backward + update", "backward + update, B k rows"
# Targets on a CPU: plain over ours for an epoch, ours over the products, growth of a half step.
EPOCH = {("ssd inhibited", 1000): 2.5, ("ssd inhibited", 10_000): 4.0}
OVER_PRODUCTS, GROWTH = 1.5, 1.3
# On an H100: microseconds of a step, plain over ours, ten learners over one, seconds of a protocol.
REPLAY = {"ssd inhibited": 30.0, "ssd late switch": 40.0}
REPLAY_NEURONS = (1000, 10_000)
OVER_PLAIN, LEARNERS, PROTOCOL = 25.0, 2.0, 45.0
EPOCHS = 2000  # of a task in the whole protocol
Get = Callable[..., float | None]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """A line for each target or comparison that the rows have figures for."""
    cuda = bool(rows) and not rows[0].device.startswith("CPU")

    def get(
        op: str, provider: str, metric: str = "time", mode: str = "step", **sizes: int
    ) -> float | None:
        """The median of what was timed or counted."""
        row = find(rows, provider, metric, sizes, op=op, mode=mode)
        return row.p50 if row else None

    found: list[Verdict] = []
    for mode, judge in (("step", _step), ("epoch", _epoch), ("protocol", _protocol)):
        ours = (row for row in rows if (row.mode, row.provider) == (mode, "ours"))
        for op, neurons in dict.fromkeys((row.op, row.shape["R"]) for row in ours):
            found += judge(partial(get, mode=mode, R=neurons), op, neurons, cuda)
    return [*found, *_growth(get, cuda)]


def _step(get: Get, op: str, neurons: int, cuda: bool) -> Iterator[Verdict]:
    firing = get(op, PRODUCTS, "neurons that fire")
    if firing is None:
        return
    path = next((p for p in PATHS if get(op, "ours", p)), "")
    name = f"SSD step, {op.removeprefix('ssd ')}, R = {neurons:,}"
    yield from _others(get, op, f"{name} ({path}: {firing:,.0f} neurons fire)")
    ours, plain, floor = (get(op, provider) for provider in ("ours", "plain", PRODUCTS))
    if not cuda:
        yield from _line(f"{name}: ours over its products", ratio(ours, floor), OVER_PRODUCTS)
    elif ours is not None and op in REPLAY and neurons in REPLAY_NEURONS:
        yield from _line(f"{name}: us", 1e3 * ours, REPLAY[op])
        yield from _line(f"{name}: plain over ours", ratio(plain, ours), least=OVER_PLAIN)


def _epoch(get: Get, op: str, neurons: int, cuda: bool) -> Iterator[Verdict]:
    name = f"SSD epoch, {op.removeprefix('ssd ')}, R = {neurons:,}"
    yield from _others(get, op, name)
    if not cuda and (op, neurons) in EPOCH:
        plain = ratio(get(op, "plain"), get(op, "ours"))
        yield from _line(f"{name}: plain over ours", plain, least=EPOCH[op, neurons])


def _others(get: Get, op: str, name: str) -> Iterator[Verdict]:
    """The times of the other providers over ours."""
    ratios = {provider: ratio(get(op, provider), get(op, "ours")) for provider in OTHERS}
    said = ", ".join(f"{provider} {r:.2f}" for provider, r in ratios.items() if r is not None)
    if said:
        yield f"{name}: others over ours", said, ""


def _protocol(get: Get, op: str, neurons: int, cuda: bool) -> Iterator[Verdict]:
    taken, epochs = get(op, "ours"), get(op, "ours", "epochs")
    if taken is not None and epochs is not None:
        name = f"whole protocol, R = {neurons:,}, 5 x {epochs:,.0f} of {EPOCHS:,} epochs: s"
        yield from _line(name, taken / 1e3, PROTOCOL if cuda and epochs == EPOCHS else None)


def _growth(get: Get, cuda: bool) -> Iterator[Verdict]:
    large, small = 1_000_000, 10_000
    for half in (BACKWARD, APART):
        times, rows = (
            [get("growth R", half, metric, R=size) for size in (large, small)]
            for metric in ("time", "touched rows")
        )
        touched = " over ".join(f"{count:,.0f}" for count in rows if count is not None)
        name = f"{BACKWARD}, R = {large:,} over R = {small:,}"
        name += f" (touched rows: {touched})" if touched else ""
        yield from _line(name, ratio(*times), None if cuda else GROWTH)
    many, few = (get("growth tasks", tasks, "important rows") for tasks in ("50", "1"))
    if many is not None and few is not None:
        ours, one, same = (get("growth tasks", n) for n in ("50", "1", f"{SAME_ROWS} 50"))
        name = f"step with 50 EWC tasks ({many:,.0f} rows with importance) over 1 task"
        yield from _line(f"{name} ({few:,.0f} rows)", ratio(ours, one))
        yield from _line(f"{name} on the same rows", ratio(ours, same))
    learners = ratio(get("growth S", "10"), get("growth S", "1"))
    yield from _line("step of 10 learners at once over 1", learners, LEARNERS if cuda else None)


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
