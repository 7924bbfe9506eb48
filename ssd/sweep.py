"""python -m ssd.sweep FILE.toml: trains a grid of settings and ranks them.

    dataset = "mnist"           # or features = "FILE.npz"; preset = NAME, if not quick
    seeds = 3                   # runs of each row, with seeds seed, seed + 1, ..

    [base]                      # settings of every run: any field of ssd.config.Config
    validation = 0.1            # share of the training data to rank on; without it, the test set

    [grid]                      # lists; every combination is a row
    alpha = [0.5, 0.7]

    [[runs]]                    # optional: each table is crossed with the grid
    method = "ssd"

A run lies in a folder named by its settings: a file that has grown trains only what is new.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssd.cli import (
    SETTINGS,
    ArgumentParser,
    check_folder,
    choose_device,
    command_line,
    exit_status,
    in_words,
    note,
    resumable,
    reword,
    stop_on_interrupt,
)
from ssd.config import Config, hints, resolve
from ssd.data import Dataset, default_root, load
from ssd.errors import MOST_RUNS, UserError
from ssd.metrics import estimate
from ssd.run import RunOptions, make_tasks
from ssd.storage.files import dumps, read_json, read_text, write_atomically
from ssd.storage.lock import folder_lock
from ssd.storage.provenance import doubts, versions_of
from ssd.storage.run_folder import ended
from ssd.study import job_folder, run_jobs
from ssd.trainer import Event, Trainer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CSV, MARKDOWN = "sweep.csv", "sweep.md"
SOURCE = "sweep.json"  # whose tables these are
SECTIONS = {
    "dataset": str, "features": str, "preset": str, "seeds": int,
    "base": dict, "grid": dict, "runs": list,
}  # fmt: skip
# Settings that belong at the top of the file: they are the same for the whole sweep.
SHARED = {"dataset", "features"}
MEASURES = ("mean_accuracy", "bwt", "forgetting", "seconds")
SPREAD = "mean ± standard error of the mean over seeds, each its own class order"


@dataclass(frozen=True)
class Sweep:
    """A sweep file: what its rows share, and the settings of each row that vary."""

    shared: dict[str, Any]
    rows: list[dict[str, Any]]
    seeds: int

    @property
    def varied(self) -> list[str]:
        """The settings that rows name, in the file's order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def config(self, row: Mapping[str, Any], dataset: str | None = None) -> Config:
        """The settings of a row's first run; dataset: what stands in for the file's."""
        instead = {} if dataset is None else {"dataset": dataset}
        return resolve({**self.shared, **row, **instead})


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep file and checks all of it.

    Raises:
        UserError: it is absent or not TOML, or holds an unknown name or a value no run could use.
    """
    try:
        content = tomllib.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    if not content:
        raise UserError(f"{path} names nothing to sweep: no data set, no [base], no [grid]")
    try:
        sweep = _parse(content)
        configs = [sweep.config(row) for row in sweep.rows]
        for config in configs:
            config.validate()
            replace(config, seed=config.seed + sweep.seeds - 1).validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    rows, seen = [], set[Config]()
    for number, row in enumerate(sweep.rows):
        if configs[number] in seen:
            note(f"{path}: {_shown(row)} is listed twice; it is trained once")
        else:
            rows.append(row)
            seen.add(configs[number])
    return replace(sweep, rows=rows)


def _parse(content: Mapping[str, Any]) -> Sweep:
    for name, value in content.items():
        _require_known(name, SECTIONS, "the file")
        kind = SECTIONS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            called = {str: "a string", int: "an integer", dict: "a table", list: "[[runs]] tables"}
            raise UserError(f"{name} must be {called[kind]}, not {value!r}")
    seeds, base = content.get("seeds", 1), content.get("base", {})
    grid, runs = content.get("grid", {}), content.get("runs", [{}])
    if not 1 <= seeds <= MOST_RUNS:
        raise UserError(f"seeds {seeds} must be in 1..{MOST_RUNS}")
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"runs must be [[runs]] tables, not {runs!r}")
    _require_settings(base, "[base]", SHARED)
    _require_settings(grid, "[grid]", SHARED | {"seed"}, [("[base]", base)])
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"[grid] {name} must be a list of values, not {values!r}")
    for run in runs:
        _require_settings(run, "[[runs]]", SHARED | {"seed"}, [("[base]", base), ("[grid]", grid)])
    total = seeds * len(runs) * math.prod(map(len, grid.values()))
    if total > MOST_RUNS:
        raise UserError(f"the file names {total} runs, but at most {MOST_RUNS} are swept at a time")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    shared = {n: v for n, v in content.items() if n in {"dataset", "features", "preset"}} | base
    return Sweep(shared, [{**run, **cell} for run in runs for cell in combinations], seeds)


def _require_settings(
    table: Mapping[str, Any],
    where: str,
    elsewhere: set[str],
    others: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Every name is a setting, belongs there and is not in another table too."""
    for name in table:
        _require_known(name, [setting.name for setting in fields(Config)], where)
        if name in elsewhere:
            place = "[base], with seeds = N at the top" if name == "seed" else "the top of the file"
            raise UserError(f"{name} belongs in {place}, not in {where}")
        for other, values in others:
            if name in values:
                raise UserError(f"{name} is in both {other} and {where}; leave it in one")


def _require_known(name: str, known: Any, where: str) -> None:
    if name not in known:
        close = get_close_matches(name, list(known), 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise UserError(f"{name} in {where} is unknown; {hint}")


def _shown(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items()) or "the only row"


class SweepDisplay:
    """How far a sweep is: a bar on a terminal, else a line a finished run."""

    def __init__(self, console: Console, folders: Mapping[Path, str], quiet: bool) -> None:
        self.console, self.waiting, self.total = console, dict(folders), len(folders)
        self.plain = not quiet and not console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} runs"),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self.bar = self.progress.add_task("starting", total=self.total)
        self.advance(announce=False)

    def watch(self, trainer: Trainer, event: Event) -> None:
        """Takes in an event of the run in training."""
        if event.kind == "step":
            return
        config, beside = trainer.config, len(trainer.learners)
        task, epoch = min(event.task + 1, config.tasks), min(event.epoch + 1, config.epochs)
        self.progress.update(
            self.bar,
            description=f"{config.method}, {beside} side by side: task {task}/{config.tasks} "
            f"epoch {epoch}/{config.epochs}",
        )
        if event.kind == "task":
            self.advance()

    def advance(self, announce: bool = True) -> None:
        """Looks which runs have ended; the last one shows when it is called after the sweep."""
        for folder in [folder for folder in self.waiting if ended(folder)]:
            text = self.waiting.pop(folder)
            if self.plain and announce:
                self.console.print(f"{self.total - len(self.waiting)}/{self.total} {text}")
        self.progress.update(self.bar, completed=self.total - len(self.waiting))


def rank(
    sweep: Sweep, configs: Sequence[Config], summaries: Sequence[Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """One record a row: its varied settings, then each measure's mean and standard error.

    Args:
        configs: of each row. summaries: of each row's runs.

    Returns:
        records, the highest mean accuracy first; the standard error of a single run is None. A row
        of which a run diverged comes last and has no measures: the mean of the rest would flatter.
    """
    records = []
    for config, group in zip(configs, summaries, strict=True):
        record = {name: getattr(config, name) for name in sweep.varied}
        diverged = any("diverged" in summary for summary in group)
        for measure in MEASURES:
            record[measure] = record[f"{measure}_standard_error"] = None
            if diverged:
                continue
            values = [summary[measure] for summary in group]
            if measure == "seconds":  # of all runs that were trained side by side
                values = [summary["seconds"] / summary["trained_together"] for summary in group]
            record[measure], record[f"{measure}_standard_error"] = estimate(values)
        shown = "validation" if config.validation > 0 else "test"
        record |= {"seeds": len(group), "evaluated_on": shown}
        records.append(record)
    return sorted(records, key=lambda r: (_diverged(r), -(r["mean_accuracy"] or 0.0)))


def _diverged(record: Mapping[str, Any]) -> bool:
    return record["mean_accuracy"] is None


def cells(record: Mapping[str, Any], varied: Sequence[str]) -> list[str]:
    """A record as texts: settings, then `mean ± standard error` of each measure."""
    texts = [_text(record[name]) for name in varied]
    if _diverged(record):
        return [*texts, "diverged", *[""] * (len(MEASURES) - 1)]
    for measure in MEASURES:
        digits = 1 if measure == "seconds" else 4
        text, error = f"{record[measure]:.{digits}f}", record[f"{measure}_standard_error"]
        texts.append(text if error is None else f"{text} ± {error:.{digits}f}")
    return texts


def _text(value: Any) -> str:
    """A setting in as few digits as tell it from any other."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """sweep.csv: full precision; what is not known is empty, as the measures of a diverged row."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def markdown_text(
    title: str,
    varied: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> str:
    """sweep.md: the table, the best row in bold, what it was measured on and with.

    Args:
        records: of rank. runs: summaries of all runs behind them.
    """
    header = [*varied, *(measure.replace("_", " ") for measure in MEASURES)]
    lines = [f"# {title}", "", " | ".join(["", *header, ""]).strip(), "|---" * len(header) + "|"]
    for number, record in enumerate(records):
        texts = cells(record, varied)
        texts = [f"**{text}**" for text in texts] if number == 0 else texts
        lines.append("| " + " | ".join(texts) + " |")
    commits = sorted({run["commit"] for run in runs})
    lines += ["", f"{SPREAD[0].upper()}{SPREAD[1:]}."]
    if any(record["evaluated_on"] == "test" for record in records):
        lines += ["", "**Ranked on the TEST set**: nothing may be chosen by this table."]
    lines += ["", f"{versions_of(runs)}; commit {', '.join(commits)}."]
    if warning := doubts(commits):
        lines += ["", f"Warning: {warning}."]
    return "\n".join(lines) + "\n"


def result_table(title: str, varied: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Table:
    """The ranking for a terminal; * marks the best."""
    table = Table(title=title, title_style="bold", caption=SPREAD)
    table.add_column("")
    for name in (*varied, *(measure.replace("_", " ") for measure in MEASURES)):
        table.add_column(name, justify="right", overflow="fold")
    for number, record in enumerate(records):
        best = number == 0
        table.add_row("*" if best else "", *cells(record, varied), style="bold" if best else None)
    return table


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.sweep",
        description="Train a grid of settings and rank them by mean accuracy. "
        "The same command goes on with a sweep that was interrupted.",
    )
    add = parser.add_argument
    add("file", metavar="FILE.toml", type=Path, help="dataset, seeds, [base], [grid], [[runs]]")
    add("--out", metavar="DIR", type=Path, help="runs and tables (default runs/sweep-<FILE>)")
    add("--data-root", metavar="DIR", type=Path, help="data sets (default $SSD_DATA or data)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, .. (default cuda if there is one)")
    add("--quiet", action="store_true", help="print the result line alone")
    return parser


def execute(arguments: Sequence[str]) -> None:
    """Reads, checks, loads, trains and ranks; nothing is written before all checks are done."""
    given = build_parser().parse_args(arguments)
    with in_words(SETTINGS):
        sweep = read_sweep(given.file)
        options = RunOptions(choose_device(given.device))
        folder = given.out or Path("runs") / f"sweep-{given.file.stem}"
        check_folder(folder)
        near = given.file.resolve().drive == Path.cwd().drive  # else there is no way from here
        source = os.path.relpath(given.file) if near else str(given.file)
        if given.out is None and (folder / SOURCE).is_file():
            other = read_json(folder / SOURCE).get("file")
            if other != source:
                raise UserError(f"{folder} is of {other}, not of {source}; name another --out")
        data, configs = _load(sweep, given.data_root or default_root())
        again = command_line("ssd.sweep", arguments)
        with resumable(f"go on with: {again}"), folder_lock(folder):
            write_atomically(folder / SOURCE, dumps({"file": source}) + "\n")
            _train_and_rank(sweep, configs, data, folder, options, given)


def _train_and_rank(
    sweep: Sweep,
    configs: Sequence[Config],
    data: Dataset,
    folder: Path,
    options: RunOptions,
    given: argparse.Namespace,
) -> None:
    jobs = [
        replace(config, seed=config.seed + number)
        for config in configs
        for number in range(sweep.seeds)
    ]
    console = Console(soft_wrap=True, markup=False, highlight=False)
    rows = [row for row in sweep.rows for _ in range(sweep.seeds)]
    display = SweepDisplay(
        console,
        {
            job_folder(folder, job, data): f"{_shown(row)} seed {job.seed}"
            for job, row in zip(jobs, rows, strict=True)
        },
        given.quiet,
    )
    with stop_on_interrupt() as stopped, display.progress:
        summaries = run_jobs(jobs, data, folder, options, display.watch, stopped)
        display.advance()
    for row, job, summary in zip(rows, jobs, summaries, strict=True):
        if "diverged" in summary:
            note(f"{_shown(row)} seed {job.seed}: {summary['diverged']}")
    groups = [summaries[i : i + sweep.seeds] for i in range(0, len(jobs), sweep.seeds)]
    records = rank(sweep, configs, groups)
    measured = " and ".join(sorted({record["evaluated_on"] for record in records}))
    count = f"{sweep.seeds} seed{'s' * (sweep.seeds > 1)}"
    name = f"{data.name} {configs[0].features}" if configs[0].features else data.name
    title = f"{given.file.stem}: {name}, accuracy on {measured} data, {count}"
    commits = {summary["commit"] for summary in summaries}
    if len(commits) > 1:
        note(f"the table shows {doubts(commits)}")
    write_atomically(folder / CSV, csv_text(records))
    text = markdown_text(title, sweep.varied, records, summaries)
    write_atomically(folder / MARKDOWN, text)
    if not given.quiet:
        Console().print(result_table(title, sweep.varied, records))
    if _diverged(records[0]):
        raise UserError(f"every row diverged, so none is the best  -> {folder}")
    best = {name: records[0][name] for name in sweep.varied}
    accuracy = records[0]["mean_accuracy"]
    print(f"best of {len(records)} ({measured}): {_shown(best)}  {accuracy:.4f}  -> {folder}")


def _load(sweep: Sweep, root: Path) -> tuple[Dataset, list[Config]]:
    """The data and each row's settings, which suit one another; says what may not be meant."""
    first = sweep.config(sweep.rows[0])
    features = Path(first.features) if first.features else None
    data = load(first.dataset, root, features, notice=note)
    # The subset may stand in for MNIST: the settings are then the subset's.
    configs = [sweep.config(row, data.name) for row in sweep.rows]
    streams = {(c.tasks, c.validation): c for c in configs}
    samples = {key: len(make_tasks(c, data)[0].y_train) for key, c in streams.items()}
    largest = data.x_train.abs().max().item()
    found = [hint for c in configs for hint in hints(c, samples[c.tasks, c.validation], largest)]
    if any(config.validation == 0 for config in configs):
        found.insert(0, "without validation in [base] the rows are ranked on the test set")
    for hint in dict.fromkeys(found):
        note(reword(hint, SETTINGS))
    return data, configs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a sweep; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
