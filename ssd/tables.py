"""Tables and figures of a finished run."""

from __future__ import annotations

from typing import Any

from rich.table import Table

CELL, MARGIN = 8, 24  # characters of a table's column, and of what is left of it


def accuracy_table(summary: dict[str, Any], width: int = 80) -> Table:
    """The accuracy matrix: rows after training a task, columns the task tested.

    Of more tasks than `width` characters can show, every n-th, and the last.
    """
    matrix = summary["accuracy_matrix"]
    stride = -(-len(matrix) * CELL // max(CELL, width - MARGIN))
    shown = sorted({*range(0, len(matrix), stride), len(matrix) - 1})
    title = f"{summary['method']} on {summary['dataset']}: accuracy"
    if stride > 1:
        title += f"\n({len(shown)} of {len(matrix)} tasks shown; all are in accuracy_matrix.csv)"
    table = Table(title=title, title_style="bold")
    table.add_column("after task", justify="right")
    for task in shown:
        table.add_column(str(task), justify="right", no_wrap=True)
    for row in shown:
        cells = [(column <= row, f"{matrix[row][column]:.3f}") for column in shown]
        table.add_row(str(row), *(text if seen else f"[dim]{text}[/]" for seen, text in cells))
    return table


def seeds_table(aggregate: dict[str, Any]) -> Table:
    """Mean and standard deviation over seeds."""
    table = Table(title=f"{aggregate['method']} on {aggregate['dataset']}", title_style="bold")
    for name in ("measure", "mean", "std", "seeds"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for measure in ("mean_accuracy", "bwt", "forgetting"):
        mean, std = aggregate[measure]["mean"], aggregate[measure]["std"]
        table.add_row(measure, f"{mean:.4f}", f"{std:.4f}", str(len(aggregate["seeds"])))
    return table
