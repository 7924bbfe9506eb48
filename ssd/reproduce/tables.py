"""Tables of a reproduction: means and standard errors beside the published figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from ssd.metrics import estimate
from ssd.reproduce.claims import verdicts
from ssd.reproduce.experiments import DEFAULT, PAPER_ENTROPY, Published, Result, Row
from ssd.reproduce.lines import NOT_RUN, Line, seconds, shown
from ssd.storage import provenance as sources
from ssd.storage.provenance import commit, machine, versions_of

# What ± and the columns *_standard_error are.
SPREAD = "standard error of the mean over seeds, each seed its own class order (0: in order)"


def records(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The table as one record a row, in full precision; None where nothing was measured."""
    default = next((line for line in lines if line.row.factor == DEFAULT), None)
    found = []
    for line in lines:
        row, record = line.row, _key(line.row)
        for measure in result.measures:
            values = line.values(measure)
            center, error = estimate(values) if values else (None, None)
            record |= {measure: center, f"{measure}_standard_error": error}
        ours, paper = record[result.measures[0]], row.published(result.measures[0])
        if default is not None:
            base = default.values(result.measures[0])
            record["difference_to_default"] = (
                None if ours is None or not base else ours - mean(base)
            )
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


def _key(row: Row) -> dict[str, Any]:
    key: dict[str, Any] = {
        "benchmark": row.benchmark.name, "neurons": row.neurons or None, "method": row.method
    }  # fmt: skip
    return key | ({"factor": row.factor, "value": row.value} if row.factor else {})


def cells(result: Result, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """The table as texts for a reader: its header and a list a row."""
    ablated, published = any(line.row.factor for line in lines), _published(result, lines)
    header = ["benchmark", "R", "method", *(["factor", "value"] if ablated else [])]
    header += [measure.replace("_", " ") for measure in result.measures]
    header += ["to default"] if ablated else ["paper", "ours - paper"] if published else []
    body = []
    for line, record in zip(lines, records(result, lines), strict=True):
        row = line.row
        texts = [row.benchmark.title, f"{row.neurons:,}" if row.neurons else "", row.method]
        texts += [row.factor, row.value] if ablated else []
        texts += [shown(m, line.values(m)) or _why_empty(line) for m in result.measures]
        if ablated:
            texts.append(_signed(record["difference_to_default"]))
        elif published:
            mark = " (inferred)" if record["paper_inferred"] else ""
            texts.append("" if record["paper"] is None else f"{record['paper']:g}{mark}")
            texts.append(_signed(record["difference"]))
        body.append([*texts, f"{len(line.summaries)} of {len(row.seeds)}", line.note])
    return [*header, "seeds", "note"], body


def _published(result: Result, lines: Sequence[Line]) -> list[Published]:
    """The publications' figures that a table shows."""
    found = (line.row.published(result.measures[0]) for line in lines)
    return [figure for figure in found if figure is not None]


def _why_empty(line: Line) -> str:
    return "not recorded" if line.summaries else NOT_RUN


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def provenance(command: str, lines: Sequence[Line]) -> dict[str, str]:
    """Where the figures come from: command, commits, machines, versions, seeds, time."""
    summaries = [summary for line in lines for summary in line.summaries]
    seeds = sorted({s["seed"] for s in summaries})
    commits = _commits(lines)
    warning = doubts(lines)
    return {
        **({"warning": warning} if warning else {}),
        "command": command,
        "commit": commit(),
        "commits of the runs": ", ".join(commits) or NOT_RUN,
        "machine": machine(),
        "devices of the runs": ", ".join(sorted({s["device"] for s in summaries})) or NOT_RUN,
        "versions of the runs": versions_of(summaries) or NOT_RUN,
        "seeds": ", ".join(map(str, seeds)) or NOT_RUN,
        "evaluated on": ", ".join(sorted({s["evaluated_on"] for s in summaries})) or NOT_RUN,
        "wall time of the runs": f"{sum(map(seconds, summaries)):.0f} s in {len(summaries)} runs",
    }


def _commits(lines: Sequence[Line]) -> list[str]:
    return sorted({summary["commit"] for line in lines for summary in line.summaries})


def doubts(lines: Sequence[Line]) -> str:
    """Why the runs of a table cannot be repeated from one commit; empty if they can."""
    return sources.doubts(_commits(lines))


def csv_text(table: Sequence[Mapping[str, Any]], origin: Mapping[str, str]) -> str:
    """A table in full precision; the lines before its header start with # and say its origin."""
    stream = io.StringIO()
    for name, text in {"spread": SPREAD, **origin}.items():
        stream.write(f"# {name}: {text}\n")
    if table:
        writer = csv.DictWriter(stream, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return stream.getvalue()


def markdown_text(
    title: str, result: Result, lines: Sequence[Line], origin: Mapping[str, str]
) -> str:
    """The table for a reader, its sources and verdicts, and its origin."""
    header, body = cells(result, lines)
    text = [f"# {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    text += [f"| {' | '.join(row)} |" for row in body]
    text += ["", f"± is the {SPREAD}."]
    if published := _published(result, lines):
        sources = "; ".join(dict.fromkeys(figure.source for figure in published))
        inferred = any(figure.inferred for figure in published)
        meaning = "; inferred: which row it is of is our reading" if inferred else ""
        text += [f"Published figures: {sources}{meaning}."]
    if "mean_entropy_bits" in result.measures:
        text += [f"For comparison, {PAPER_ENTROPY} (data set and size are not named)."]
    if result.claims:
        text += ["", "## Claims of the paper", "", *(f"- {claim}" for claim in verdicts(lines))]
    text += ["", "## Origin", "", *(f"- {name}: {value}" for name, value in origin.items())]
    return "\n".join(text) + "\n"


def task_records(result: Result, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Measures that have a value a task: one record for each of them and each task."""
    found = []
    for line in lines:
        for measure in result.measures:
            runs = line.per_task(measure)
            first = line.row.config.tasks - len(runs[0]) if runs else 0
            for task, values in enumerate(zip(*runs, strict=True), first):
                center, error = estimate(values)
                found.append(
                    {**_key(line.row), "measure": measure, "task": task, "mean": center,
                     "standard_error": error, "seeds": len(values)}
                )  # fmt: skip
    return found


def rich_table(title: str, result: Result, lines: Sequence[Line]) -> Table:
    """The first measure of the table, for a terminal; * marks what is inferred."""
    measure, ablated = result.measures[0], any(line.row.factor for line in lines)
    published = _published(result, lines)
    header = ["benchmark", "R", "method", *(["factor", "value"] if ablated else [])]
    header += [measure.replace("_", " ")]
    header += ["to default"] if ablated else ["paper", "ours - paper"] if published else []
    table = Table(title=title, title_style="bold", box=SIMPLE, padding=(0, 1, 0, 0))
    table.caption = "± standard error" + "; * inferred" * any(p.inferred for p in published)
    for name in [*header, "seeds"]:
        table.add_column(name, no_wrap=True)
    for line, record in zip(lines, records(result, lines), strict=True):
        row, mark = line.row, "*" if record["paper_inferred"] else ""
        texts = [row.benchmark.name, f"{row.neurons:,}" if row.neurons else "", row.method]
        texts += [row.factor, row.value] if ablated else []
        texts.append(shown(measure, line.values(measure)) or _why_empty(line))
        if ablated:
            texts.append(_signed(record["difference_to_default"]))
        elif published:
            paper = "" if record["paper"] is None else f"{record['paper']:g}{mark}"
            texts += [paper, _signed(record["difference"])]
        table.add_row(*texts, f"{len(line.summaries)} of {len(row.seeds)}")
    return table
