"""Tables and figures of a finished run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from ssd.checkpoint import write_atomically
from ssd.config import Config
from ssd.folder import read_frequency, read_records, read_summary
from ssd.metrics import USED, activation_entropy

NAMED = 10  # tasks that a figure can name one by one
MARKED = 60  # evaluations that a line can show as points
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


def write_figures(folder: Path) -> None:
    """Draws the four figures of a finished run into its folder, as PNG and PDF."""
    summary = read_summary(folder)
    config = Config(**summary["config"])
    records, frequency = read_records(folder, config), read_frequency(folder, config)
    drawings = {
        "accuracy_over_time": lambda axes: _accuracy_over_time(axes, summary, records),
        "accuracy_matrix": lambda axes: _accuracy_matrix(axes, summary),
        "activation_heatmap": lambda axes: _activation_heatmap(axes, frequency),
        "entropy_histogram": lambda axes: _entropy_histogram(axes, frequency),
    }
    for name, draw in drawings.items():
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        draw(axes)
        save_figure(figure, folder / name)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes path.png and path.pdf, and closes the figure."""
    formats: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}
    for suffix, metadata in formats.items():
        stream = io.BytesIO()
        # Type 42 fonts stay text in a PDF; print shops refuse matplotlib's default, type 3.
        with plt.rc_context({"pdf.fonttype": 42}):
            figure.savefig(stream, format=suffix, dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # laid out once: in inches it is the same for both
        write_atomically(path.with_name(f"{path.name}.{suffix}"), stream.getvalue())
    plt.close(figure)


def _accuracy_over_time(
    axes: Axes, summary: dict[str, Any], records: Sequence[dict[str, Any]]
) -> None:
    epochs = summary["config"]["epochs"]
    measured = [r for r in records if "test_accuracy" in r]
    time = np.array([r["task"] + (r["epoch"] + 1) / epochs for r in measured])
    accuracy = np.array([r["test_accuracy"] for r in measured])
    count = accuracy.shape[1]
    scale = ScalarMappable(Normalize(0, max(1, count - 1) / 0.9), "viridis")  # yellow is faint
    colors = scale.to_rgba(np.arange(count))
    marker = "." if len(time) <= MARKED else None
    for task in range(count):
        begun = time > task
        axes.plot(
            time[begun],
            accuracy[begun, task],
            marker=marker,
            color=tuple(colors[task]),
            label=f"task {task}",
        )
    axes.set(xlabel="tasks trained", ylabel="accuracy", ylim=(-0.02, 1.02), xlim=(0, count))
    axes.set_title(f"{summary['method']} on {summary['dataset']}: accuracy per task")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if count <= NAMED:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.figure.colorbar(scale, ax=axes, label="task")


def _accuracy_matrix(axes: Axes, summary: dict[str, Any]) -> None:
    matrix = np.array(summary["accuracy_matrix"])
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="tested on task", ylabel="after training task")
    axes.set_title(
        f"{summary['method']} on {summary['dataset']}: "
        f"mean accuracy {summary['mean_accuracy']:.3f}, BWT {summary['bwt']:+.3f}",
        fontsize="medium",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.figure.colorbar(image, ax=axes, label="accuracy")
    if len(matrix) <= NAMED:
        for (row, column), value in np.ndenumerate(matrix):
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)


def _activation_heatmap(axes: Axes, frequency: np.ndarray) -> None:
    image = draw_heat_map(axes, frequency[:, busiest_first(frequency)])
    axes.set(xlabel="neuron, sorted by its busiest task; dead ones last")
    axes.set_title("activation frequency on the task's training set")
    axes.figure.colorbar(image, ax=axes, label="activation frequency", extend="min")


def busiest_first(frequency: np.ndarray) -> np.ndarray:
    """Neurons [R] sorted by the task of frequency [T, R] that each serves most.

    So subnetworks show as blocks. Within a task the most frequent neuron comes first; dead ones
    are last of all.
    """
    busiest = np.where(frequency.max(0) > 0, frequency.argmax(0), len(frequency))
    return np.lexsort((-frequency.max(0), busiest))


def draw_heat_map(axes: Axes, frequency: np.ndarray) -> AxesImage:
    """Activation frequency [T, n] of n neurons, on the same colour scale whatever it holds."""
    image = axes.imshow(
        frequency,
        aspect="auto",
        cmap="magma",
        norm=LogNorm(USED, 1),  # most frequencies are small
        interpolation="nearest",
    )
    axes.set_facecolor("black")  # a frequency of 0 has no logarithm and is not drawn
    axes.set(ylabel="after training task")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return image


def _entropy_histogram(axes: Axes, frequency: np.ndarray) -> None:
    entropy = activation_entropy(torch.from_numpy(frequency)).numpy()
    axes.hist(
        [entropy[0], entropy[-1]],
        bins=30,
        range=(0, 1),
        label=[f"after task {t}, mean {entropy[t].mean():.3f}" for t in (0, len(entropy) - 1)],
    )
    axes.set(xlabel="binary activation entropy (bits)", ylabel="neurons", yscale="log")
    axes.set_title("activation entropy per neuron")
    axes.legend(frameon=False)
