"""Tables on the terminal, figures and Markdown tables from the rows of a run.

    python -m benchmarks.report benchmarks/results/FOLDER/NAME.csv docs/performance.md

writes the medians of a CSV file between the two marker comments "medians NAME FOLDER" of a Markdown
file, and its targets between "targets NAME FOLDER", where these markers exist. They leave out the
FOLDER cpu.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks import sae_targets, step_targets
from benchmarks.bench import Bench
from benchmarks.record import Row, read
from benchmarks.targets import TARGETS
from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.storage.files import read_text, write_atomically

Case = tuple[str, str]  # op and mode, dtype and sizes
COLOURS = {"met": "green", "missed": "red", "not measured": "dim"}


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, dict[str, Row]]]:
    """case -> provider -> metric -> row, in the order of the run."""
    cases: dict[Case, dict[str, dict[str, Row]]] = {}
    for row in rows:
        sizes = [f"{name}={value}" for name, value in row.shape.items()]
        case = cases.setdefault((f"{row.op} {row.mode}", " ".join([row.dtype, *sizes])), {})
        case.setdefault(row.provider, {})[row.metric] = row
    return cases


def table(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal; a verdict in the last column is coloured."""
    shown = Table(*columns, title=title)
    for *cells, last in lines:
        colour = COLOURS.get(last)
        shown.add_row(*cells, f"[{colour}]{last}[/{colour}]" if colour else last)
    return shown


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in lines)])


def measurements(rows: Sequence[Row], title: str) -> Table:
    """The times of a run and its other metrics, without columns that would be empty."""
    present = {row.metric for row in rows}
    units = {"bandwidth": "GB/s", "compute": "TFLOP/s", "memory": "peak MiB"}
    metrics = {name: unit for name, unit in units.items() if name in present}
    limited = any(row.roofline_fraction is not None for row in rows)
    shown = Table("op", "shape", "provider", title=title)
    for name in ("p20 ms", "p50 ms", "p80 ms", *metrics.values()):
        shown.add_column(name, justify="right")
    if limited:
        shown.add_column("of roofline", justify="right")
    for case, providers in by_case(rows).items():
        shown.add_section()
        for provider, found in providers.items():
            time = found.get("time")
            if time is not None and not time.correct:
                shown.add_row(*case, provider, "[red]wrong[/red]")
                continue
            figures = [time.p20, time.p50, time.p80] if time else [None] * 3
            figures += [found[name].p50 if name in found else None for name in metrics]
            if limited:
                figures.append(time.roofline_fraction if time else None)
            shown.add_row(*case, provider, *map(_text, figures))
    return shown


def _text(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}"


def show(bench: Bench) -> None:
    """What topk_bench measured, the targets, and a figure beside the file of the rows."""
    rows = bench.writer.rows
    bench.console.print(measurements(rows, bench.title))
    title = "Targets, from this run"
    if not bench.cuda:
        title = "Targets: set for an H100, not measured on a CPU"
    lines = [target.line(rows if bench.cuda else []) for target in TARGETS]
    bench.console.print(table(title, ("target", "wanted", "got", "verdict"), lines))
    figure(rows, bench.path.with_suffix(".png"), bench.title)


def figure(rows: Sequence[Row], path: Path, title: str) -> None:
    """One panel per case: the median time of every provider that passed its gate."""
    times: dict[Case, dict[str, float]] = {}
    for case, providers in by_case(rows).items():
        for name, metrics in providers.items():
            if "time" in metrics and metrics["time"].p50 is not None:
                times.setdefault(case, {})[name] = metrics["time"].p50
    if not times:
        return
    lines = math.ceil(len(times) / 2)
    canvas, axes = pyplot.subplots(lines, 2, figsize=(14, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(times) :]:
        axis.axis("off")
    for axis, (case, timed) in zip(axes.flat, times.items(), strict=False):
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in timed]
        axis.barh(list(timed), list(timed.values()), color=colours)
        axis.invert_yaxis()
        axis.set_title(", ".join(case), fontsize=9)
        axis.set_xlabel("ms, median")
        axis.tick_params(labelsize=8)
    canvas.suptitle(title)
    canvas.tight_layout()
    canvas.savefig(path, dpi=100)
    pyplot.close(canvas)


def medians(rows: Sequence[Row]) -> str:
    """The medians in Markdown, below a line of the machine, versions and commits."""
    lines = []
    for (op, shape), providers in by_case(rows).items():
        for provider, metrics in providers.items():
            row = metrics.get("time") or next(iter(metrics.values()))
            taken = [f"{_text(row.p50)} {row.unit}" if row.correct else "wrong result"]
            if "time" in metrics:
                taken += [f"{n} {_text(m.p50)}" for n, m in metrics.items() if m.unit == ""]
            lines.append((op, shape, provider, ", ".join(taken), _text(row.roofline_fraction)))
    columns = ("op", "shape", "provider", "median", "of the roofline")
    return f"{_origin(rows)}\n\n{markdown(columns, lines)}"


def _origin(rows: Sequence[Row]) -> str:
    first = rows[0]
    others = {row.provider: row.commit for row in rows if row.commit != first.commit}
    commits = first.commit + "".join(f" ({p}: {commit})" for p, commit in others.items())
    return (
        f"{first.device}; torch {first.torch}; triton {first.triton or 'not installed'}; "
        f"commit {commits}; {first.date}"
    )


def fill(document: str, rows: Sequence[Row], name: str) -> str:
    """The document with the tables of the benchmark `name` between their markers.

    Raises:
        ValueError: it has no markers of that benchmark, or one without its end.
    """
    measured, columns = medians(rows), ("what", "measured", "")
    if name.startswith("topk"):
        columns, judged = ("what", "wanted", "measured", ""), [t.line(rows) for t in TARGETS]
    elif name.startswith("sae"):
        measured = f"{_origin(rows)}\n\n"
        measured += markdown(sae_targets.COLUMNS, sae_targets.lines(rows))
        judged = sae_targets.verdicts(rows)
    else:
        judged = step_targets.verdicts(rows)
    tables = {f"medians {name}": measured, f"targets {name}": markdown(columns, judged)}
    wanted = [marker for marker in tables if f"<!-- {marker} -->" in document]
    if not wanted:
        raise ValueError(f"the document has no <!-- medians {name} --> and no targets of it")
    for marker in wanted:
        begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        before, _, rest = document.partition(begin)
        _, ended, after = rest.partition(end)
        if not ended:
            raise ValueError(f"the document has no {begin} .. {end}")
        document = f"{before}{begin}\n{tables[marker]}\n{end}{after}"
    return document


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", metavar="NAME.csv", type=Path, help="rows of a benchmark")
    parser.add_argument("document", metavar="FILE.md", type=Path, help="has the marker comments")
    given = parser.parse_args()
    folder = given.source.resolve().parent.name
    name = given.source.stem if folder == "cpu" else f"{given.source.stem} {folder}"
    try:
        text = fill(read_text(given.document), read(given.source), name)
    except ValueError as error:
        raise UserError(str(error)) from error
    write_atomically(given.document, text)


if __name__ == "__main__":
    sys.exit(exit_status(main, place=""))
