"""Tables of a reproduction: means and standard errors beside the published figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ssd.metrics import estimate
from ssd.reproduce.claims import differences, verdicts
from ssd.reproduce.experiments import DEFAULT, PAPER_ENTROPY, Published, Result, Row
from ssd.reproduce.lines import NOT_RUN, Line
from ssd.storage.provenance import commit, doubts, machine, versions_of
from ssd.study import measured
from ssd.tables import cell, columns, markdown_table, plus_minus, rich_table

# What ± and the columns *_standard_error are.
SPREAD = "standard error of the mean over seeds, each seed its own class order (0: in order)"


def records(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The table as one record per row, in full precision; None where nothing was measured."""
    first = result.measures[0]
    defaults = {x.row.method: x.values(first) for x in lines if x.row.factor == DEFAULT}
    found = []
    for line in lines:
        record, paper = _key(line.row), line.row.published(first)
        for measure in result.measures:
            record |= columns(measure, line.values(measure))
        ours = record[first]
        if defaults:
            base = defaults.get(line.row.method, [])
            known = ours is not None and base
            record["difference_to_default"] = ours - mean(base) if known else None
        record |= {
            "seeds": " ".join(str(s["seed"]) for s in line.summaries),
            "paper": paper and paper.value,
            "difference": None if ours is None or paper is None else ours - paper.value,
            "paper_inferred": paper and paper.inferred,
            "paper_source": paper and paper.source,
            "note": line.note,
        }
        found.append(record)
    return found


def run_records(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The table as one record per run."""
    return [
        _key(line.row)
        | {"seed": seed}
        | {measure: line.by_seed(measure).get(seed) for measure in result.measures}
        for line in lines
        for seed in (summary["seed"] for summary in line.summaries)
    ]


def task_records(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One record per row, measure with one value per task, and task."""
    found = []
    for line in lines:
        for measure in result.measures:
            runs = line.per_task(measure)
            first = line.row.config.tasks - len(runs[0]) if runs else 0
            for task, values in enumerate(zip(*runs, strict=True), first):
                center, error = estimate(values)
                record = {"measure": measure, "task": task, "mean": center}
                record |= {"standard_error": error, "seeds": len(values)}
                found.append(_key(line.row) | record)
    return found


def _key(row: Row) -> dict[str, Any]:
    key = {"benchmark": row.benchmark.name, "neurons": row.neurons or None, "method": row.method}
    return key | ({"factor": row.factor, "value": row.value} if row.factor else {})


def cells(
    result: Result, lines: Sequence[Line], narrow: bool = False
) -> tuple[list[str], list[list[str]]]:
    """The table as texts for a reader: its header and one list per row.

    Args:
        result, lines: what the table shows.
        narrow: for a terminal, with short names, the first measure and no notes.
    """
    measures = result.measures[:1] if narrow else result.measures
    ablated, published = any(line.row.factor for line in lines), _published(result, lines)
    header = ["benchmark", "R", "method", *(["factor", "value"] if ablated else [])]
    header += [measure.replace("_", " ") for measure in measures]
    header += ["to default"] if ablated else ["paper", "ours - paper"] if published else []
    inferred = "*" if narrow else " (inferred)"
    body = []
    for line, record in zip(lines, records(result, lines), strict=True):
        row, benchmark = line.row, line.row.benchmark
        texts = [benchmark.name if narrow else benchmark.title]
        texts += [f"{row.neurons:,}" if row.neurons else "", row.method]
        texts += [row.factor, row.value] if ablated else []
        empty = "not recorded" if line.summaries else NOT_RUN
        texts += [cell(record, measure) or empty for measure in measures]
        if ablated:
            texts.append(_signed(record["difference_to_default"]))
        elif published:
            mark = inferred if record["paper_inferred"] else ""
            texts.append("" if record["paper"] is None else f"{record['paper']:g}{mark}")
            texts.append(_signed(record["difference"]))
        seeds = f"{len(line.summaries)} of {len(row.seeds)}"
        body.append([*texts, seeds, *([] if narrow else [line.note])])
    return [*header, "seeds", *([] if narrow else ["note"])], body


def _published(result: Result, lines: Sequence[Line]) -> list[Published]:
    """The published figures that a table shows."""
    found = (line.row.published(result.measures[0]) for line in lines)
    return [figure for figure in found if figure is not None]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def doubts_of(lines: Sequence[Line]) -> str:
    """Why the runs of a table cannot be repeated from one commit; empty if they can."""
    return doubts({summary["commit"] for line in lines for summary in line.summaries})


def provenance(command: str, lines: Sequence[Line]) -> dict[str, str]:
    """Where the figures come from: command, commits, machines, versions, seeds, time."""
    summaries = [summary for line in lines for summary in line.summaries]

    def all_of(name: str) -> str:
        return ", ".join(map(str, sorted({s[name] for s in summaries}))) or NOT_RUN

    seconds = sum(measured(summary, "seconds")[0] for summary in summaries)
    warning = doubts_of(lines)
    return {
        **({"warning": warning} if warning else {}),
        "command": command,
        "commit": commit(),
        "commits of the runs": all_of("commit"),
        "machine": machine(),
        "devices of the runs": all_of("device"),
        "versions of the runs": versions_of(summaries) or NOT_RUN,
        "seeds": all_of("seed"),
        "evaluated on": all_of("evaluated_on"),
        "wall time of the runs": f"{seconds:.0f} s in {len(summaries)} runs",
    }


def markdown_text(
    title: str, result: Result, lines: Sequence[Line], origin: Mapping[str, str]
) -> str:
    """The table for a reader with its sources, verdicts and origin."""
    text = [f"# {title}", "", *markdown_table(*cells(result, lines)), "", f"± is the {SPREAD}."]
    if published := _published(result, lines):
        sources = "; ".join(dict.fromkeys(figure.source for figure in published))
        inferred = any(figure.inferred for figure in published)
        meaning = "; inferred: which row it is of is our reading" if inferred else ""
        text += [f"Published figures: {sources}{meaning}."]
    if "mean_entropy_bits" in result.measures:
        text += [f"For comparison, {PAPER_ENTROPY} (data set and size are not named)."]
    if result.claims:
        text += ["", "## Claims", "", *(f"- {claim}" for claim in verdicts(lines))]
    if tested := differences(result, lines):
        text += ["", "## Paired differences", "", *_differences_table(tested), ""]
        text += [
            "Paired by class order; p is of a two-sided t test of mean 0, not corrected for the "
            "number of pairs."
        ]
    text += ["", "## Origin", "", *(f"- {name}: {value}" for name, value in origin.items())]
    return "\n".join(text) + "\n"


def _differences_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {name: [r[name] for r in records] for name in ("benchmark", "neurons", "measure")}
    header = [name for name, values in names.items() if len(set(values)) > 1]
    rows = [
        [
            *(str(record[name]).replace("_", " ") for name in header),
            f"{record['method']} less {record['less']}",
            plus_minus(record["difference"], record["standard_error"], sign="+"),
            "" if record["p"] is None else f"{record['p']:.2g}",
            str(record["class_orders"]),
        ]
        for record in records
    ]
    return markdown_table([*header, "pair", "difference", "p", "class orders"], rows)


def terminal_table(title: str, result: Result, lines: Sequence[Line]) -> Table:
    """The table of the first measure for a terminal; * marks figures that are inferred."""
    inferred = any(figure.inferred for figure in _published(result, lines))
    caption = "± standard error" + "; * inferred" * inferred
    style = {"box": SIMPLE, "padding": (0, 1, 0, 0), "caption": caption}
    header, body = cells(result, lines, narrow=True)
    texts = header.index(result.measures[0].replace("_", " "))
    return rich_table(title, header, body, texts, **style)
