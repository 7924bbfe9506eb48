"""Figures of a reproduction: filled marks are ours, with standard errors; open ones published."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssd.figures import NAMED, busiest_first, draw_heat_map, integer_ticks, panels
from ssd.metrics import estimate
from ssd.reproduce.experiments import CLAIMS, DEFAULT, REFERENCES, Benchmark, Result
from ssd.reproduce.lines import Line
from ssd.storage.run_folder import read_frequency

# Okabe & Ito (2008): distinct with any colour vision; marks and dashes are distinct in grey too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
# Vertical lines where accuracy is the axis.
BOUNDS: dict[str, dict[str, Any]] = {
    "chance": {"color": "0.6", "ls": ":", "lw": 1},
    **{
        name: {"color": color, "ls": dash, "lw": 1}
        for name, color, dash in zip(
            REFERENCES, ("#000000", "#009E73", "#CC79A7"), DASHES[:3], strict=True
        )
    },
}
HEAT_MAP_NEURONS = 200
# Measures whose axis is logarithmic from this ratio of values, as with a dense network among them.
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
    "address_cosine": "address cosine with the task before",
    "effective_rank": "effective rank of the code",
    "used_fraction": "share of neurons in use",
    "seconds": "seconds of training",
}


def draw(name: str, result: Result, lines: Sequence[Line]) -> list[tuple[str, Figure]]:
    """The figures of a result with the stems of their files; none where nothing was run."""
    run = [line for line in lines if line.summaries]
    if not run:
        return []
    if result.per_task:
        figures, groups = [], dict[str, list[Line]]()
        for line in run:
            stem = f"{line.row.benchmark.name}_{line.row.neurons}"
            groups.setdefault(stem, []).append(line)
        for stem, group in groups.items():
            figures.append((f"{name}_{stem}", _over_tasks(result, group)))
            if (maps := _heat_maps(group)) is not None:
                figures.append((f"{name}_heat_maps_{stem}", maps))
        return figures
    if any(line.row.factor for line in run):
        return [(name, _ablations(result, run))]
    return [(name, _methods(result, run))]


def _methods(result: Result, lines: Sequence[Line]) -> Figure:
    """One panel per benchmark and measure, one line of marks per method."""
    benchmarks = list(dict.fromkeys(line.row.benchmark for line in lines))
    methods = list(dict.fromkeys(line.row.method for line in lines))[::-1]
    measures = [m for m in result.measures if m != "seconds"]
    sizes = sorted({line.row.neurons for line in lines})
    width, height = 1.6 + 3.1 * len(benchmarks), 1.1 + 0.3 * len(methods) * len(measures)
    shape = len(measures), len(benchmarks)
    figure, grid = panels(*shape, width, height, sharey=True, sharex="row")
    shift = 0.36 / max(1, len(sizes) - 1)
    for row, measure in zip(grid, measures, strict=True):
        for axes, benchmark in zip(row, benchmarks, strict=True):
            for line in (x for x in lines if x.row.benchmark == benchmark):
                number = sizes.index(line.row.neurons)
                height = methods.index(line.row.method) - (number - (len(sizes) - 1) / 2) * shift
                _mark(axes, line, measure, height, number)
            if measure == "mean_accuracy":
                _bounds(axes, benchmark, lines)
            axes.set(xlabel=AXIS[measure], yticks=range(len(methods)), yticklabels=methods)
            axes.set_ylim(-0.6, len(methods) - 0.4)
            axes.grid(axis="y", color="0.92")
            axes.set_axisbelow(True)
            if measure == measures[0]:
                axes.set_title(benchmark.title, fontsize="medium")
        if measure == "mean_accuracy":
            row[0].set_xlim(-0.02, 1.02)  # for the whole row
    named = any(line.row.published(result.measures[0]) for line in lines)
    handles = _legend(sizes, named)
    if "mean_accuracy" in measures:
        drawn = [label for label in BOUNDS if label == "chance" or label in methods]
        handles += [Line2D([], [], label=label, **BOUNDS[label]) for label in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _bounds(axes: Axes, benchmark: Benchmark, lines: Sequence[Line]) -> None:
    """A line at chance, and one at each reference that was measured at the smallest size."""
    found = {"chance": [1 / benchmark.classes]}
    for line in lines[::-1]:
        if line.row.benchmark == benchmark and line.row.method in REFERENCES:
            found[line.row.method] = line.values("mean_accuracy")
    for label, values in found.items():
        if values:
            axes.axvline(estimate(values)[0], zorder=0, **BOUNDS[label])


def _style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def _mark(axes: Axes, line: Line, measure: str, height: float, number: int) -> None:
    style, values, paper = _style(number), line.values(measure), line.row.published(measure)
    if values:
        center, error = estimate(values)
        axes.errorbar(center, height, xerr=error, **style, capsize=2, ms=5)
    if paper is not None:
        axes.plot(paper.value, height, **style, ms=8, mfc="none", ls="none")


def _legend(sizes: Sequence[int], named: bool) -> list[Line2D]:
    handles = []
    for number, size in enumerate(sizes):
        label = f"R = {size:,}" if size else "no neurons"
        handles.append(Line2D([], [], **_style(number), ms=5, ls="none", label=label))
    if named:
        style: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": "0.3", "label": "published"}
        handles.append(Line2D([], [], ms=8, ls="none", **style))
    return handles


def _ablations(result: Result, lines: Sequence[Line]) -> Figure:
    """One panel per measure; each method has its own marks, and its default is a band."""
    methods = list(dict.fromkeys(line.row.method for line in lines))
    varied = [line for line in lines if line.row.factor != DEFAULT][::-1]
    columns = len(result.measures)
    height = 1.2 + 0.24 * max(4, len(varied))
    figure, grid = panels(1, columns, 2.0 + 3.4 * columns, height, sharey=True)
    for axes, measure in zip(grid[0], result.measures, strict=True):
        for line in (x for x in lines if x.row.factor == DEFAULT and x.values(measure)):
            center, error = estimate(line.values(measure))
            color = _style(methods.index(line.row.method))["color"]
            axes.axvline(center, color=color, lw=1)
            if error is not None:
                axes.axvspan(center - error, center + error, color=color, alpha=0.12, lw=0)
        for height, line in enumerate(varied):
            _mark(axes, line, measure, height, methods.index(line.row.method))
        for height, (below, above) in enumerate(pairwise(varied)):
            if (below.row.method, below.row.factor) != (above.row.method, above.row.factor):
                axes.axhline(height + 0.5, color="0.92", lw=1)
        names = [line.row.name for line in varied]
        axes.set(xlabel=AXIS[measure], yticks=range(len(names)), yticklabels=names)
    handles = [
        Line2D([], [], **_style(number), lw=1, ms=5, label=f"{method}; line: its default")
        for number, method in enumerate(methods)
    ]
    figure.legend(handles=handles, loc="outside lower center", frameon=False, ncols=len(methods))
    figure.suptitle(f"Ablations on {lines[0].row.place}", fontsize="medium")
    return figure


def _over_tasks(result: Result, lines: Sequence[Line]) -> Figure:
    """One panel per recorded measure, one line per method, a band of one standard error."""
    recorded = [m for m in result.measures if any(line.per_task(m) for line in lines)]
    columns = min(3, len(recorded))
    rows = -(-len(recorded) // columns)
    figure, grid = panels(rows, columns, 1.4 + 3.2 * columns, 0.4 + 2.9 * rows)
    for axes, measure in zip(grid.flat, recorded, strict=False):
        for number, line in enumerate(lines):
            _curve(axes, line, measure, number)
        axes.set(xlabel="after training task", ylabel=AXIS[measure])
        low, high = axes.dataLim.intervaly
        if measure in LOGARITHMIC and low > 0 and high > WIDE * low:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        integer_ticks(axes.xaxis)
    for axes in grid.flat[len(recorded) :]:
        axes.set_axis_off()
    figure.suptitle(lines[0].row.place, fontsize="medium")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    return figure


def _curve(axes: Axes, line: Line, measure: str, number: int) -> None:
    runs = line.per_task(measure)
    if not runs:
        return
    values = np.array(runs)
    tasks = np.arange(line.row.config.tasks - values.shape[1], line.row.config.tasks)
    center, style = values.mean(0), _style(number)
    axes.plot(
        tasks,
        center,
        **style,
        linestyle=DASHES[number // len(COLORS) % len(DASHES)],
        markersize=4,
        markevery=max(1, len(tasks) // NAMED),
        linewidth=1.2,
        label=line.row.method,
    )
    if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        low, high, color = center - error, center + error, style["color"]
        axes.fill_between(tasks, low, high, color=color, alpha=0.15, lw=0)


def _heat_maps(lines: Sequence[Line]) -> Figure | None:
    """Neuron x task, one panel per method of CLAIMS; None where no run has its frequencies.

    All panels are of the first class order that these methods have in common. The networks of one
    seed begin with the same weights, so a neuron is the same in every panel. All panels show the
    neurons that are most active over all panels and tasks, in one order and on one scale.
    """
    by_method = {line.row.method: line for line in lines if line.recorded()}
    judged = dict.fromkeys(method for methods in CLAIMS for method in methods)
    chosen = [by_method[method] for method in judged if method in by_method]
    seeds = set.intersection(*(set(line.recorded()) for line in chosen)) if chosen else set()
    if not seeds:
        return None
    found = {
        line.row.method: read_frequency(line.recorded()[min(seeds)], line.row.config)
        for line in chosen
    }
    together = np.mean(list(found.values()), axis=0)
    most = np.argsort(-together.mean(0), kind="stable")[:HEAT_MAP_NEURONS]
    order = most[busiest_first(together[:, most])]
    figure, grid = panels(len(found), 1, 7.2, 0.8 + 1.9 * len(found), sharex=True)
    column = list(grid[:, 0])
    for axes, (method, frequency) in zip(column, found.items(), strict=True):
        image = draw_heat_map(axes, frequency[:, order])
        axes.set_title(method, fontsize="medium")
    axes.set(xlabel=f"the {len(order)} most active neurons, sorted by their busiest task")
    figure.colorbar(image, ax=column, label="activation frequency", extend="min")
    figure.suptitle(f"{lines[0].row.place}, seed {min(seeds)}", fontsize="medium")
    return figure
