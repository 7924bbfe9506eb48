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
from ssd.folder import STRUCTURE, SUMMARY, read_json
from ssd.report import NAMED, save_figure
from ssd.structure import Snapshot, load_structure

# Okabe & Ito (2008): told apart with any colour vision; marks and dashes serve print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")


def write_structure_figures(folder: Path) -> None:
    """Draws the figures of one finished run into its folder.

    Raises:
        UserError: the run's structure or summary is missing or damaged.
    """
    snapshots = load_structure(folder / STRUCTURE).snapshots
    summary = read_structure_summary(folder)
    save_figure(draw_transfer(snapshots), folder / "structure_transfer")
    save_figure(draw_coverage([summary]), folder / "structure_coverage")


def write_comparison(runs: Sequence[Path], folder: Path) -> None:
    """Draws entropy and coverage of the methods of several finished runs into a folder.

    Args:
        runs: folders; those of one method are its seeds. folder: made if it does not exist.

    Raises:
        UserError: no run, a summary that is missing or damaged, or of unequal numbers of tasks.
    """
    if not runs:
        raise UserError("no runs to compare; name at least one folder of a finished run")
    summaries = [read_structure_summary(run) for run in runs]
    tasks = {len(s["structure"]["mean_entropy_bits"]) for s in summaries}
    if len(tasks) != 1:
        raise UserError(f"the runs have {sorted(tasks)} tasks; compare runs of one protocol")
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(draw_entropy(summaries), folder / "structure_entropy")
    save_figure(draw_coverage(summaries), folder / "structure_coverage")


def read_structure_summary(folder: Path) -> dict[str, Any]:
    """The summary of a finished run that has its structure; UserError if it has none."""
    if not (folder / SUMMARY).is_file():
        raise UserError(f"{folder} holds no finished run")
    summary = read_json(folder / SUMMARY)
    if "structure" not in summary or "method" not in summary:
        raise UserError(f"{folder / SUMMARY} has no structure; train the run with this version")
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


def draw_entropy(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean activation entropy over tasks, a line a method."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _lines(axes, summaries, "mean_entropy_bits")
    axes.set(ylabel="mean activation entropy (bits)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def draw_coverage(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Effective rank and used fraction over tasks, a line a method."""
    figure, row = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    labels = {
        "effective_rank": "effective rank of the code",
        "used_fraction": f"share of neurons active\nfor {metrics.USED:.1%} of inputs or more",
    }
    for axes, (name, label) in zip(row, labels.items(), strict=True):
        _lines(axes, summaries, name)
        axes.set(ylabel=label)
        axes.set_ylim(bottom=0)
    row[0].legend(frameon=False)
    return figure


def _lines(axes: Axes, summaries: Sequence[Mapping[str, Any]], name: str) -> None:
    """A measure over tasks: per method the mean over its runs, with one standard deviation."""
    methods = list(dict.fromkeys(summary["method"] for summary in summaries))
    for number, method in enumerate(methods):
        runs = np.array([s["structure"][name] for s in summaries if s["method"] == method])
        count = runs.shape[1]
        stride = -(-count // NAMED)
        aside = stride * 0.06 * (number - (len(methods) - 1) / 2)  # equal lines stay visible
        axes.errorbar(
            np.arange(count) + aside,
            runs.mean(0),
            runs.std(0, ddof=1) if len(runs) > 1 else None,
            color=COLORS[number % len(COLORS)],
            linestyle=DASHES[number % len(DASHES)],
            marker=MARKERS[number % len(MARKERS)],
            markevery=stride,
            errorevery=stride,
            markersize=5,
            elinewidth=0.8,
            capsize=2,
            label=method if len(runs) == 1 else f"{method} ({len(runs)} seeds)",
        )
    axes.set(xlabel="after training task")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
