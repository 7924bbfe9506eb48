"""Figures of one finished run, and the axes, ticks and files of all figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ssd import metrics
from ssd.config import Config
from ssd.metrics import USED, activation_entropy
from ssd.storage.files import are_numbers, require_sound, write_atomically
from ssd.storage.run_folder import STRUCTURE, SUMMARY, read_frequency, read_records, read_summary
from ssd.structure import Snapshot, load_structure

NAMED = 10  # tasks that a figure can name one by one
MARKED = 60  # evaluations that a line can show as points


def draw(folder: Path) -> None:
    """Draws all figures of a finished run into its folder, as PNG and PDF.

    Raises:
        UserError: a file of the run is damaged.
    """
    write_figures(folder)
    if (folder / STRUCTURE).is_file():
        write_structure_figures(folder)


def write_figures(folder: Path) -> None:
    """Draws the four figures that every run has."""
    summary = read_summary(folder)
    config = Config(**summary["config"])
    records, frequency = read_records(folder, config), read_frequency(folder, config)
    drawings = {
        "accuracy_over_time": lambda axes: _accuracy_over_time(axes, summary, records),
        "accuracy_matrix": lambda axes: _accuracy_matrix(axes, summary),
        "activation_heatmap": lambda axes: _activation_heatmap(axes, frequency),
        "entropy_histogram": lambda axes: _entropy_histogram(axes, frequency),
    }
    for name, draw_on in drawings.items():
        figure, grid = panels(1, 1, 6.4, 4.2)
        draw_on(grid[0, 0])
        save_figure(figure, folder / name)


def write_structure_figures(folder: Path) -> None:
    """Draws the figures of the subnetworks that a run has recorded."""
    snapshots = load_structure(folder / STRUCTURE).snapshots
    summary = read_summary(folder)
    structure, tasks = summary.get("structure", {}), len(summary["accuracy_matrix"])
    sound = {name: are_numbers(structure.get(name), tasks) for name in COVERAGE}
    require_sound(folder / SUMMARY, sound)
    save_figure(draw_transfer(snapshots), folder / "structure_transfer")
    save_figure(draw_coverage(structure), folder / "structure_coverage")


def panels(
    rows: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid [rows, columns] of axes; width and height in inches, shared: sharex.."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def integer_ticks(*axes: Axis) -> None:
    """Puts ticks only at integers, as tasks and neurons are."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, path: Path) -> None:
    """Writes path.png and path.pdf."""
    formats: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}
    for suffix, metadata in formats.items():
        stream = io.BytesIO()
        # Type 42 fonts stay text in a PDF; print shops refuse matplotlib's default, type 3.
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(stream, format=suffix, dpi=150, metadata=metadata)
        figure.set_layout_engine("none")  # the layout of the first format holds for both
        write_atomically(path.with_name(f"{path.name}.{suffix}"), stream.getvalue())


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
    integer_ticks(axes.xaxis)
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
    integer_ticks(axes.xaxis, axes.yaxis)
    axes.figure.colorbar(image, ax=axes, label="accuracy")
    if len(matrix) <= NAMED:
        _write_values(axes, matrix, dark=matrix <= 0.6)


def _activation_heatmap(axes: Axes, frequency: np.ndarray) -> None:
    image = draw_heat_map(axes, frequency[:, busiest_first(frequency)])
    axes.set(xlabel="neuron, sorted by its busiest task; dead ones last")
    axes.set_title("activation frequency on the task's training set")
    axes.figure.colorbar(image, ax=axes, label="activation frequency", extend="min")


def busiest_first(frequency: np.ndarray) -> np.ndarray:
    """Neurons [R] sorted by the task in which each is most frequent, of frequency [T, R].

    Subnetworks then show as blocks. Within a task the most frequent neuron comes first; dead
    neurons come last.
    """
    busiest = np.where(frequency.max(0) > 0, frequency.argmax(0), len(frequency))
    return np.lexsort((-frequency.max(0), busiest))


def draw_heat_map(axes: Axes, frequency: np.ndarray) -> AxesImage:
    """Draws the activation frequency [T, n] of n neurons, always on the same colour scale."""
    image = axes.imshow(
        frequency,
        aspect="auto",
        cmap="magma",
        norm=LogNorm(USED, 1),  # most frequencies are small
        interpolation="nearest",
    )
    axes.set_facecolor("black")  # a frequency of 0 has no logarithm and is not drawn
    axes.set(ylabel="after training task")
    integer_ticks(axes.yaxis)
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


COVERAGE = {
    "effective_rank": "effective rank of the code",
    "used_fraction": f"share of neurons active\nfor {metrics.USED:.1%} of inputs or more",
}


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
    """Three matrices over all pairs of tasks; similar tasks are bright in each."""
    figure, grid = panels(1, 3, 11, 3.2)
    size = len(snapshots[0].neurons)
    found = pairwise(snapshots)
    shown = (
        ("jaccard", "viridis", f"Jaccard overlap, top {size} neurons", 0.0),
        ("address_cosine", "viridis", "cosine of mean addresses", None),
        ("kl_bits", "viridis_r", "KL(row || column) of frequencies, bits", 0.0),
    )
    for axes, (name, cmap, title, low) in zip(grid[0], shown, strict=True):
        matrix = found[name]
        high = max(matrix.max(), 1e-3) if name == "kl_bits" else 1.0
        image = axes.imshow(matrix, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
        axes.set(xlabel="task", ylabel="task")
        axes.set_title(title, fontsize="medium")
        integer_ticks(axes.xaxis, axes.yaxis)
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        if len(matrix) <= NAMED:
            luma = image.cmap(image.norm(matrix))[..., :3] @ (0.299, 0.587, 0.114)  # of Rec. 601
            _write_values(axes, matrix, dark=luma < 0.5, fontsize=9 if len(matrix) <= 5 else 6)
    return figure


def _write_values(axes: Axes, matrix: np.ndarray, dark: np.ndarray, **style: Any) -> None:
    """Writes the values of a matrix [T, T] into its cells, in white where they are dark."""
    for (row, column), value in np.ndenumerate(matrix):
        color = "white" if dark[row, column] else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, **style)


def draw_coverage(structure: Mapping[str, Sequence[float]]) -> Figure:
    """Effective rank and used fraction over tasks; structure: of a summary."""
    figure, grid = panels(1, 2, 9, 3.8)
    for axes, (name, label) in zip(grid[0], COVERAGE.items(), strict=True):
        values = structure[name]
        axes.plot(values, marker="o", markersize=5, markevery=-(-len(values) // NAMED))
        axes.set(xlabel="after training task", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure
