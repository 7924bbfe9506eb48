"""Figures of a reproduction: filled marks are ours, with standard errors; open ones published."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ssd.experiments import DEFAULT, Result
from ssd.lines import Line, estimate
from ssd.report import NAMED
from ssd.structure_report import COLORS, DASHES, MARKERS

# A dense network beside k-sparse ones needs a logarithmic axis: from this ratio of values on.
LOGARITHMIC, WIDE = ("mean_entropy_bits", "mean_active"), 20
AXIS = {
    "mean_accuracy": "accuracy after the last task",
    "bwt": "backward transfer (BWT)",
    "forgetting": "forgetting",
    "mean_entropy_bits": "mean activation entropy (bits)",
    "dead_fraction": "share of dead neurons",
    "mean_active": "active neurons for an input",
    "jaccard": "Jaccard overlap with the task before",
    "kl_bits": "KL from the task before (bits)",
    "seconds": "seconds of training",
}


def draw(name: str, result: Result, lines: Sequence[Line]) -> list[tuple[str, Figure]]:
    """The figures of a result by the stem of their files; none where nothing was run."""
    run = [line for line in lines if line.summaries]
    if not run:
        return []
    if result.per_task:
        streams = dict.fromkeys((line.row.benchmark, line.row.neurons) for line in run)
        return [
            (
                f"{name}_{benchmark.name}_{neurons}",
                _over_tasks(result, [x for x in run if (x.row.benchmark, x.row.neurons) == stream]),
            )
            for stream in streams
            for benchmark, neurons in [stream]
        ]
    if any(line.row.factor for line in run):
        return [(name, _ablations(result, run))]
    return [(name, _methods(result, run))]


def _methods(result: Result, lines: Sequence[Line]) -> Figure:
    """A panel for each benchmark and measure; a line of marks for each method."""
    benchmarks = list(dict.fromkeys(line.row.benchmark for line in lines))
    methods = list(dict.fromkeys(line.row.method for line in lines))[::-1]
    measures = [m for m in result.measures if m != "seconds"]
    sizes = sorted({line.row.neurons for line in lines})
    figure, grid = plt.subplots(
        len(measures),
        len(benchmarks),
        figsize=(1.6 + 3.1 * len(benchmarks), 1.1 + 0.3 * len(methods) * len(measures)),
        sharey=True,
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    shift = 0.36 / max(1, len(sizes) - 1)
    for row, measure in zip(grid, measures, strict=True):
        for axes, benchmark in zip(row, benchmarks, strict=True):
            for line in (x for x in lines if x.row.benchmark == benchmark):
                number = sizes.index(line.row.neurons)
                height = methods.index(line.row.method) - (number - (len(sizes) - 1) / 2) * shift
                _mark(axes, line, measure, height, number)
            axes.set(xlabel=AXIS[measure], yticks=range(len(methods)), yticklabels=methods)
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
            if measure == measures[0]:
                axes.set_title(benchmark.title, fontsize="medium")
        if measure == "mean_accuracy":
            row[0].set_xlim(-0.02, 1.02)  # for the whole row
    named = any(line.row.published(result.measures[0]) for line in lines)
    figure.legend(handles=_legend(sizes, named), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _mark(axes: Axes, line: Line, measure: str, height: float, number: int) -> None:
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    values, paper = line.values(measure), line.row.published(measure)
    if values:
        center, error = estimate(values)
        axes.errorbar(center, height, xerr=error, color=color, marker=marker, capsize=2, ms=5)
    if paper is not None:
        axes.plot(paper.value, height, marker=marker, ms=8, mfc="none", mec=color, ls="none")


def _legend(sizes: Sequence[int], named: bool) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLORS[n % len(COLORS)], marker=MARKERS[n % len(MARKERS)], ms=5,
               ls="none", label=f"R = {size:,}" if size else "no neurons")
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    if named:
        handles.append(
            Line2D([], [], marker="o", ms=8, mfc="none", mec="0.3", ls="none", label="published")
        )
    return handles


def _ablations(result: Result, lines: Sequence[Line]) -> Figure:
    """A panel a measure, a mark for each value of each factor, the default as a band."""
    default = next((line for line in lines if line.row.factor == DEFAULT), None)
    varied = [line for line in lines if line is not default][::-1]
    names = [f"{line.row.factor} = {line.row.value}" for line in varied]
    figure, row = plt.subplots(
        1,
        len(result.measures),
        figsize=(2.0 + 3.4 * len(result.measures), 1.2 + 0.24 * max(4, len(varied))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, measure in zip(row[0], result.measures, strict=True):
        values = default.values(measure) if default else []
        if values:
            center, error = estimate(values)
            axes.axvline(center, color="0.3", lw=1, label="default")
            if error is not None:
                axes.axvspan(center - error, center + error, color="0.85", lw=0)
        for height, line in enumerate(varied):
            _mark(axes, line, measure, height, 0)
        for height, (below, above) in enumerate(pairwise(varied)):
            if below.row.factor != above.row.factor:
                axes.axhline(height + 0.5, color="0.92", lw=1)
        axes.set(xlabel=AXIS[measure], yticks=range(len(names)), yticklabels=names)
    if default is not None:
        handles, labels = row[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
        figure.suptitle(
            f"SSD on {default.row.benchmark.title}, R = {default.row.neurons:,}", fontsize="medium"
        )
    return figure


def _over_tasks(result: Result, lines: Sequence[Line]) -> Figure:
    """A panel a measure that was recorded, a line a method, a band of one standard error."""
    recorded = [m for m in result.measures if any(line.per_task(m) for line in lines)]
    columns = min(3, len(recorded))
    rows = -(-len(recorded) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(1.4 + 3.2 * columns, 0.4 + 2.9 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axes, measure in zip(grid.flat, recorded, strict=False):
        for number, line in enumerate(lines):
            _curve(axes, line, measure, number)
        axes.set(xlabel="after training task", ylabel=AXIS[measure])
        low, high = axes.dataLim.intervaly
        if measure in LOGARITHMIC and low > 0 and high > WIDE * low:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat[len(recorded) :]:
        axes.set_axis_off()
    row = lines[0].row
    figure.suptitle(f"{row.benchmark.title}, R = {row.neurons:,}", fontsize="medium")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _curve(axes: Axes, line: Line, measure: str, number: int) -> None:
    runs = line.per_task(measure)
    if not runs:
        return
    values = np.array(runs)
    tasks = np.arange(line.row.config.tasks - values.shape[1], line.row.config.tasks)
    center, color = values.mean(0), COLORS[number % len(COLORS)]
    axes.plot(
        tasks,
        center,
        color=color,
        linestyle=DASHES[number // len(COLORS) % len(DASHES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(tasks) // NAMED),
        linewidth=1.2,
        label=line.row.method,
    )
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(tasks, center - error, center + error, color=color, alpha=0.15, lw=0)
