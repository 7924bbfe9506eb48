"""Tables: means with standard errors, as CSV and Markdown files and on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from ssd.metrics import estimate

# Decimals of measures; all others have 4.
DIGITS = {"seconds": 1, "mean_active": 1, "effective_rank": 1}
CELL, MARGIN = 8, 24  # characters of a column of accuracies, and of the rest of that table


def plus_minus(center: float, error: float | None, digits: int = 4, sign: str = "") -> str:
    """`center ± error`; the error of a single value is None. sign "+" shows it for center too."""
    text = f"{center:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def columns(measure: str, values: Sequence[float]) -> dict[str, float | None]:
    """A measure's columns of a record: mean and standard error, None where unknown."""
    center, error = estimate(values) if values else (None, None)
    return {measure: center, f"{measure}_standard_error": error}


def cell(record: Mapping[str, Any], measure: str) -> str:
    """`mean ± standard error` of a measure's columns; empty where the mean is unknown."""
    center, error = record[measure], record[f"{measure}_standard_error"]
    return "" if center is None else plus_minus(center, error, DIGITS.get(measure, 4))


def csv_text(records: Sequence[Mapping[str, Any]], origin: Mapping[str, str] = {}) -> str:
    """Records of equal keys as CSV, in full precision; None is empty.

    Args:
        records: one per line.
        origin: facts, shown above the header as `# name: fact`.
    """
    stream = io.StringIO()
    stream.writelines(f"# {name}: {fact}\n" for name, fact in origin.items())
    if records:
        writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    return stream.getvalue()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def rich_table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    texts: int = 1,
    **style: Any,
) -> Table:
    """A table for a terminal, its title in bold.

    Args:
        title: of the table.
        header: the names of the columns.
        rows: the texts of each row.
        texts: number of columns that hold text; the numbers are to the right of them.
        style: see rich.table.Table.
    """
    table = Table(title=title, title_style="bold", **style)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def accuracy_table(summary: Mapping[str, Any], width: int = 80) -> Table:
    """The accuracy matrix: row t after training task t, one column per task tested.

    If `width` characters cannot show all tasks, every n-th and the last are shown.
    """
    matrix = summary["accuracy_matrix"]
    stride = -(-len(matrix) * CELL // max(CELL, width - MARGIN))
    shown = sorted({*range(0, len(matrix), stride), len(matrix) - 1})
    title = f"{summary['method']} on {summary['dataset']}: accuracy"
    if stride > 1:
        title += f"\n({len(shown)} of {len(matrix)} tasks shown; all are in accuracy_matrix.csv)"
    rows = []
    for task in shown:
        cells = [(column <= task, f"{matrix[task][column]:.3f}") for column in shown]
        rows.append([str(task), *(text if seen else f"[dim]{text}[/]" for seen, text in cells)])
    return rich_table(title, ["after task", *map(str, shown)], rows, texts=0)


def seeds_table(aggregate: Mapping[str, Any]) -> Table:
    """Mean and standard deviation over seeds."""
    rows = []
    for measure in ("mean_accuracy", "bwt", "forgetting"):
        center, std = aggregate[measure]["mean"], aggregate[measure]["std"]
        rows.append([measure, f"{center:.4f}", f"{std:.4f}", str(len(aggregate["seeds"]))])
    title = f"{aggregate['method']} on {aggregate['dataset']}"
    return rich_table(title, ["measure", "mean", "std", "seeds"], rows)
