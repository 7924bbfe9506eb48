"""What the rows of sae_bench say of its targets, and their table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.record import Row, find, ratio

Verdict = tuple[str, str, str]  # what, measured, "met" | "missed" | "" without a target
OPTIMIZER = "Adam alone"  # a provider that is no library
LEAST_NEURONS = 4096  # fewer have no target
FASTER = {"cpu": 1.0, "cuda": 2.0}  # the fastest library over ours
MEMORY = 1.0  # ours over the least of the libraries
COLUMNS = ("autoencoder", "sizes", "library", "step, ms", "of ours", "saved, MiB", "FVU")


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """A line for each case and target that the rows have figures for."""
    return [
        verdict
        for case in _cases(rows)
        if case[0].shape["R"] >= LEAST_NEURONS
        for verdict in _judge(case)
    ]


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each op and shape, in the order of the run."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(f"{row.op} {row.mode} {row.dtype} {row.shape}", []).append(row)
    return list(cases.values())


def _name(row: Row) -> tuple[str, str]:
    """Op and what is special; dtype and sizes."""
    sizes = {name: f"{size:,}" for name, size in row.shape.items()}
    what = f"{row.op}, AuxK" if "dead" in row.shape else row.op
    return what, " ".join([row.dtype, *(f"{name}={size}" for name, size in sizes.items())])


def _judge(case: list[Row]) -> Iterator[Verdict]:
    name = " ".join(_name(case[0]))
    device = "cpu" if case[0].device.startswith("CPU") else "cuda"
    metrics = {
        "time": "fastest library over ours",
        "saved": "memory saved for backward, ours over the least",
        "memory": "peak memory, ours over the least",
    }
    for metric, what in metrics.items():
        ours = find(case, "ours", metric)
        others = {
            row.provider: row.p50
            for row in case
            if row.metric == metric and row.correct and row.provider not in ("ours", OPTIMIZER)
        }
        if ours is None or not others:
            continue
        best = min(others, key=others.__getitem__)
        faster = metric == "time"
        above, below = (others[best], ours.p50) if faster else (ours.p50, others[best])
        figure = ratio(above, below)
        if figure is None:
            continue
        bound = FASTER[device] if faster else MEMORY
        met = figure >= bound if faster else figure <= bound
        said = f"{figure:.2f} ({best}) of {'>=' if faster else '<='} {bound:g}"
        yield f"{name}: {what}", said, "met" if met else "missed"


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of COLUMNS for each case and provider; a figure that is not there is empty."""
    found = []
    for case in _cases(rows):
        mine = find(case, "ours")
        for provider in dict.fromkeys(row.provider for row in case):
            got = {row.metric: row for row in case if row.provider == provider}
            time = got.get("time")
            if time is not None and not time.correct:
                found.append((*_name(case[0]), provider, "not timed", "", "", ""))
                continue
            of_ours = ratio(time.p50, mine.p50) if time and mine else None
            cells = [
                "" if figure is None else f"{figure:{style}}"
                for figure, style in (
                    (time and time.p50, ".1f"),
                    (of_ours, ".2f"),
                    (got["saved"].p50 if "saved" in got else None, ".1f"),
                    (got["FVU"].p50 if "FVU" in got else None, ".4f"),
                )
            ]
            found.append((*_name(case[0]), provider, *cells))
    return found
