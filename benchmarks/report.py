"""Tables on the terminal, a figure and Markdown tables from the rows of a run.

    python -m benchmarks.report benchmarks/results/FOLDER/NAME.csv docs/performance.md

puts the medians of a CSV file between the two marker comments "medians NAME FOLDER" of a Markdown
file, and what they say of the targets between "targets NAME FOLDER", whichever of them it has. The
folder cpu goes without saying.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import step_targets
from benchmarks.record import Row, read
from benchmarks.targets import targets
from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.storage.files import read_text, write_atomically

Case = tuple[str, str, str, str]
COLOURS = {"met": "green", "missed": "red", "not measured": "dim"}


def by_case(rows: list[Row]) -> dict[Case, dict[str, dict[str, Row]]]:
    """case -> provider -> metric -> row, in the order of the run."""
    cases: dict[Case, dict[str, dict[str, Row]]] = {}
    for row in rows:
        sizes = " ".join(f"{name}={value}" for name, value in row.shape.items())
        case = cases.setdefault((row.op, row.mode, row.dtype, sizes), {})
        case.setdefault(row.provider, {})[row.metric] = row
    return cases


def measurements(rows: list[Row], title: str) -> Table:
    table = Table("op", "shape", "provider", title=title)
    for name in ("p20 ms", "p50 ms", "p80 ms", "GB/s", "TFLOP/s", "of roofline", "peak MiB"):
        table.add_column(name, justify="right")
    for (op, mode, dtype, sizes), providers in by_case(rows).items():
        table.add_section()
        for provider, metrics in providers.items():
            table.add_row(f"{op} {mode}", f"{dtype} {sizes}", provider, *_figures(metrics))
    return table


def _figures(metrics: dict[str, Row]) -> list[str]:
    time = metrics.get("time")
    if time is not None and not time.correct:
        return ["[red]wrong[/red]"] + [""] * 6
    quantiles = [time.p20, time.p50, time.p80] if time else [None] * 3
    rest = [metrics[name].p50 if name in metrics else None for name in ("bandwidth", "compute")]
    memory = metrics["memory"].p50 if "memory" in metrics else None
    return [_text(x) for x in (*quantiles, *rest, _roofline(metrics), memory)]


def _roofline(metrics: dict[str, Row]) -> float | None:
    return metrics["time"].roofline_fraction if "time" in metrics else None


def _text(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}"


def target_table(rows: list[Row], cuda: bool) -> Table:
    title = "Targets, from this run" if cuda else "Targets: set for an H100, not measured on a CPU"
    table = Table("target", "wanted", "got", "verdict", title=title)
    for target in targets():
        got, verdict = target.verdict(rows if cuda else [])
        colour = COLOURS[verdict]
        table.add_row(target.what, target.wanted, got, f"[{colour}]{verdict}[/{colour}]")
    return table


def figure(rows: list[Row], path: Path, title: str) -> None:
    """One panel a case: the median time of every provider that passed its gate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = {case: _timed(providers) for case, providers in by_case(rows).items()}
    cases = {case: timed for case, timed in cases.items() if timed}
    if not cases:
        return
    columns = 2
    lines = math.ceil(len(cases) / columns)
    canvas, axes = pyplot.subplots(lines, columns, figsize=(14, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, ((op, mode, dtype, sizes), timed) in zip(axes.flat, cases.items(), strict=False):
        colours = ["tab:blue" if name.startswith("ours") else "tab:gray" for name in timed]
        axis.barh(list(timed), list(timed.values()), color=colours)
        axis.invert_yaxis()
        axis.set_title(f"{op} {mode}, {dtype} {sizes}", fontsize=9)
        axis.set_xlabel("ms, median")
        axis.tick_params(labelsize=8)
    canvas.suptitle(title)
    canvas.tight_layout()
    canvas.savefig(path, dpi=100)
    pyplot.close(canvas)


def _timed(providers: dict[str, dict[str, Row]]) -> dict[str, float]:
    return {
        provider: metrics["time"].p50
        for provider, metrics in providers.items()
        if "time" in metrics and metrics["time"].p50 is not None
    }


def show(console: Console, rows: list[Row], title: str, cuda: bool) -> None:
    console.print(measurements(rows, title))
    console.print(target_table(rows, cuda))


def markdown(rows: list[Row]) -> str:
    """The medians, and where and with what they were taken."""
    first = rows[0]
    others = {row.provider: row.commit for row in rows if row.commit != first.commit}
    lines = [
        f"{first.device}; torch {first.torch}; triton {first.triton or 'not installed'}; "
        f"commit {first.commit}{''.join(f' ({p}: {c})' for p, c in others.items())}; {first.date}",
        "",
        "| op | shape | provider | median | of the roofline |",
        "|---|---|---|---|---|",
    ]
    for (op, mode, dtype, sizes), providers in by_case(rows).items():
        for provider, metrics in providers.items():
            row = metrics.get("time") or next(iter(metrics.values()))
            taken = f"{_text(row.p50)} {row.unit}" if row.correct else "wrong result"
            counted = [f"{n} {_text(m.p50)}" for n, m in metrics.items() if m.unit == ""]
            taken = ", ".join([taken, *counted]) if "time" in metrics else taken
            cells = f"{op} {mode}", f"{dtype} {sizes}".strip(), provider, taken
            lines.append(f"| {' | '.join(cells)} | {_text(row.roofline_fraction)} |")
    return "\n".join(lines)


def fill(document: str, rows: list[Row], name: str) -> str:
    """The document with every table that it has markers for, of the benchmark `name`."""
    judged = kernel_targets if name.startswith("topk") else step_targets.markdown
    tables = {f"medians {name}": markdown, f"targets {name}": judged}
    wanted = [marker for marker in tables if f"<!-- {marker} -->" in document]
    if not wanted:
        raise ValueError(f"the document has no <!-- medians {name} --> and no targets of it")
    for marker in wanted:
        document = insert(document, tables[marker](rows), marker)
    return document


def kernel_targets(rows: list[Row]) -> str:
    """What the rows of topk_bench say of the targets."""
    lines = ["| what | wanted | measured | |", "|---|---|---|---|"]
    for target in targets():
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(target.verdict(rows))} |")
    return "\n".join(lines)


def insert(document: str, table: str, marker: str) -> str:
    """The document with `table` between <!-- marker --> and <!-- /marker -->."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"the document has no {begin} .. {end}")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", document)


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
