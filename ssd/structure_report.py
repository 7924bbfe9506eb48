"""Figures of the structure of runs, from ssd.structure; each as PNG and PDF."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssd import metrics
from ssd.errors import UserError
from ssd.folder import STRUCTURE, SUMMARY, are_numbers, damaged, read_summary
from ssd.report import NAMED, save_figure
from ssd.structure import Snapshot, load_structure

COVERAGE = {
    "effective_rank": "effective rank of the code",
    "used_fraction": f"share of neurons active\nfor {metrics.USED:.1%} of inputs or more",
}


def write_structure_figures(folder: Path) -> None:
    """Draws the figures of one finished run into its folder.

    Raises:
        UserError: the run's structure or summary is missing or damaged.
    """
    snapshots = load_structure(folder / STRUCTURE).snapshots
    summary = read_structure_summary(folder)
    save_figure(draw_transfer(snapshots), folder / "structure_transfer")
    save_figure(draw_coverage(summary), folder / "structure_coverage")


def read_structure_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run that has its structure; UserError if it has none."""
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} holds no finished run")
    summary = read_summary(folder)
    if "structure" not in summary:
        raise UserError(f"{folder / SUMMARY} has no structure; train the run with this version")
    structure, tasks = summary["structure"], len(summary["accuracy_matrix"])
    for name in COVERAGE:
        if not are_numbers(structure.get(name), tasks):
            raise damaged(folder / SUMMARY, f"{name} is missing or wrong")
    return summary


def pairwise(snapshots: Sequence[Snapshot]) -> dict[str, np.ndarray]:
    """Jaccard, cosine and KL between all pairs of tasks, {name: [T, T]}; kl: row || column."""
    measures: dict[str, Callable[[Snapshot, Snapshot], float]] = {
        "jaccard": lambda a, b: metrics.jaccard(a.neurons, b.neurons),
        "address_cosine": lambda a, b: metrics.address_cosine(a.addresses, b.addresses),
        "kl_bits": lambda a, b: metrics.kl_divergence(a.frequency, b.frequency),
    }
    return {
        name: np.array([[measure(row, column) for column in snapshots] for row in snapshots])
        for name, measure in measures.items()
    }


def draw_transfer(snapshots: Sequence[Snapshot]) -> Figure:
    """Three matrices over all pairs of tasks; bright is alike in each of them."""
    figure, row = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    size = len(snapshots[0].neurons)
    found = pairwise(snapshots)
    panels = (
        ("jaccard", "viridis", f"Jaccard overlap, top {size} neurons", 0.0),
        ("address_cosine", "viridis", "cosine of mean addresses", None),
        ("kl_bits", "viridis_r", "KL(row || column) of frequencies, bits", 0.0),
    )
    for axes, (name, cmap, title, low) in zip(row, panels, strict=True):
        matrix = found[name]
        high = max(matrix.max(), 1e-3) if name == "kl_bits" else 1.0
        image = axes.imshow(matrix, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        axes.set(xlabel="task", ylabel="task")
        axes.set_title(title, fontsize="medium")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        if len(matrix) <= NAMED:
            _write_values(axes, matrix, image.cmap(image.norm(matrix)))
    return figure


def _write_values(axes: Axes, matrix: np.ndarray, colors: np.ndarray) -> None:
    """The numbers of a matrix [T, T] in its cells of colors [T, T, 4]."""
    dark = colors[..., :3] @ (0.299, 0.587, 0.114) < 0.5  # luma of Rec. 601
    for (row, column), value in np.ndenumerate(matrix):
        axes.text(
            column,
            row,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9 if len(matrix) <= 5 else 6,
            color="white" if dark[row, column] else "black",
        )


def draw_coverage(summary: Mapping[str, Any]) -> Figure:
    """Effective rank and used fraction over tasks."""
    figure, row = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, (name, label) in zip(row, COVERAGE.items(), strict=True):
        values = summary["structure"][name]
        axes.plot(values, marker="o", markersize=5, markevery=-(-len(values) // NAMED))
        axes.set(xlabel="after training task", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure
