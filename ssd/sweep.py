"""python -m ssd.sweep FILE.toml: trains a grid of settings and ranks them.

    dataset = "mnist"           # or features = "FILE.npz"; preset = NAME, if not quick
    seeds = 3                   # runs of each row, with seeds seed, seed + 1, ..

    [base]                      # settings of every run: any field of ssd.config.Config
    validation = 0.1            # share of the training data to rank on; without it, the test set

    [grid]                      # lists; every combination is a row
    alpha = [0.5, 0.7]

    [[runs]]                    # optional: each table is crossed with the grid
    method = "ssd"

Each run has a folder named by its settings, so a file with more rows trains only the new ones.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from ssd.cli import (
    MOST_RUNS,
    SETTINGS,
    ArgumentParser,
    add_common,
    check_folder,
    check_seeds,
    choose_device,
    command_line,
    exit_status,
    in_words,
    note,
    resumable,
    reword,
    stop_on_interrupt,
)
from ssd.config import Config, resolve
from ssd.data import Dataset, default_root
from ssd.errors import UserError
from ssd.executors import HERE, executor_maker
from ssd.learner import TERMS
from ssd.progress import Display
from ssd.runs import load_data
from ssd.storage.files import dumps, read_json, read_text, write_atomically
from ssd.storage.lock import folder_lock
from ssd.storage.provenance import doubts, versions_of
from ssd.storage.run_folder import evaluated_on
from ssd.study import Run, Study, hints_for, measured
from ssd.tables import cell, columns, csv_text, markdown_table, rich_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CSV, MARKDOWN = "sweep.csv", "sweep.md"
RUNS = "runs.csv"  # a line for each run
SOURCE = "sweep.json"  # names the sweep file
SECTIONS: dict[str, tuple[type, str]] = {
    "dataset": (str, "a string"),
    "features": (str, "a string"),
    "preset": (str, "a string"),
    "seeds": (int, "an integer"),
    "base": (dict, "a table"),
    "grid": (dict, "a table"),
    "runs": (list, "[[runs]] tables"),
}
# Settings that belong at the top of the file: they are the same for the whole sweep.
SHARED = {"dataset", "features"}
MEASURES = ("mean_accuracy", "bwt", "forgetting", "seconds")
# Norms of the terms' gradients at the ends of tasks, for terms that some row has.
GRADIENTS = tuple(f"{term}_gradient" for term in TERMS)
SPREAD = "mean ± standard error of the mean over seeds"
ORDERS = ", each its own class order"  # where no row has an order_seed


@dataclass(frozen=True)
class Sweep:
    """A sweep file: the settings that its rows share, those of each row, and seeds per row."""

    shared: dict[str, Any]
    rows: list[dict[str, Any]]
    seeds: int

    @property
    def varied(self) -> list[str]:
        """The settings that rows name, in the file's order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def config(self, row: Mapping[str, Any], data: Dataset | None = None) -> Config:
        """The settings of a row's first run, on data that may stand in for the file's."""
        instead = {} if data is None else {"dataset": data.name}
        samples = None if data is None else len(data.y_train)
        return resolve({**self.shared, **row, **instead}, samples)


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
    rows: dict[Config, dict[str, Any]] = {}
    for config, row in zip(configs, sweep.rows, strict=True):
        if rows.setdefault(config, row) is not row:
            note(f"{path}: {_shown(row)} is listed twice; it is trained once")
    return replace(sweep, rows=list(rows.values()))


def _parse(content: Mapping[str, Any]) -> Sweep:
    for name, value in content.items():
        _require_known(name, SECTIONS, "the file")
        kind, called = SECTIONS[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name} must be {called}, not {value!r}")
    seeds, base = content.get("seeds", 1), content.get("base", {})
    grid, runs = content.get("grid", {}), content.get("runs", [{}])
    check_seeds(seeds)
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"runs must be [[runs]] tables, not {runs!r}")
    _require_settings([("[base]", base), ("[grid]", grid), *(("[[runs]]", run) for run in runs)])
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"[grid] {name} must be a list of values, not {values!r}")
    total = seeds * len(runs) * math.prod(map(len, grid.values()))
    if total > MOST_RUNS:
        raise UserError(f"the file names {total} runs, but at most {MOST_RUNS} are swept at a time")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    shared = {n: v for n, v in content.items() if n in SHARED | {"preset"}} | base
    return Sweep(shared, [{**run, **cell} for run in runs for cell in combinations], seeds)


def _require_settings(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Every name is a setting, in a table where it belongs and in no other."""
    known, found = [setting.name for setting in fields(Config)], dict[str, str]()
    for where, table in tables:
        for name in table:
            _require_known(name, known, where)
            if name in SHARED:
                raise UserError(f"{name} belongs in the top of the file, not in {where}")
            if name == "seed" and where != "[base]":
                place = "[base], with seeds = N at the top"
                raise UserError(f"{name} belongs in {place}, not in {where}")
            if found.setdefault(name, where) != where:
                raise UserError(f"{name} is in both {found[name]} and {where}; leave it in one")


def _require_known(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        close = get_close_matches(name, list(known), 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
        raise UserError(f"{name} in {where} is unknown; {hint}")


def _shown(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items()) or "the only row"


def rank(
    sweep: Sweep, configs: Sequence[Config], outcomes: Sequence[Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """One record per row: its varied settings, then each measure's mean and standard error.

    Args:
        sweep: names the settings that vary.
        configs: settings of each row.
        outcomes: of each row's runs, see Run.outcome.

    Returns:
        The records, highest mean accuracy first. A row in which a run diverged comes last and has
        no measures: the mean of the other runs would flatter it.
    """
    records = []
    for config, group in zip(configs, outcomes, strict=True):
        record = {name: getattr(config, name) for name in sweep.varied}
        sound = [] if any("diverged" in outcome for outcome in group) else group
        for measure in (*MEASURES, *GRADIENTS):
            found = [measured(outcome, measure) for outcome in sound]
            record |= columns(measure, [mean(values) for values in found if values])
        records.append(record | {"seeds": len(group), "evaluated_on": evaluated_on(config)})
    return sorted(records, key=lambda r: (_diverged(r), -(r["mean_accuracy"] or 0.0)))


def by_run(sweep: Sweep, run: Run, outcome: Mapping[str, Any]) -> dict[str, Any]:
    """A line of runs.csv: the varied settings, the seed, and each measure; None if it diverged."""
    line = {name: getattr(run.config, name) for name in sweep.varied} | {"seed": run.config.seed}
    for measure in (*MEASURES, *GRADIENTS):
        found = [] if "diverged" in outcome else measured(outcome, measure)
        line[measure] = mean(found) if found else None
    return line | {"commit": outcome["commit"]}


def _diverged(record: Mapping[str, Any]) -> bool:
    return record["mean_accuracy"] is None


def with_gradients(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """MEASURES, and those of GRADIENTS that some record has."""
    return [*MEASURES, *(g for g in GRADIENTS if any(r.get(g) is not None for r in records))]


def header(varied: Sequence[str], measures: Sequence[str] = MEASURES) -> list[str]:
    """The names of the columns of cells()."""
    return [*varied, *(measure.replace("_", " ") for measure in measures)]


def cells(
    record: Mapping[str, Any], varied: Sequence[str], measures: Sequence[str] = MEASURES
) -> list[str]:
    """A record as texts: settings, then each measure."""
    first, *rest = (cell(record, measure) for measure in measures)
    return [*(_text(record[name]) for name in varied), first or "diverged", *rest]


def _text(value: Any) -> str:
    """A setting in as few digits as distinguish it from any other; nothing for None."""
    if value is None:
        return ""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def markdown_text(
    title: str,
    varied: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    outcomes: Sequence[Mapping[str, Any]],
    spread: str,
) -> str:
    """sweep.md: the table with its best row in bold, the split, the versions and the commits.

    Args:
        title: of the table.
        varied: the settings that are columns.
        records: what rank returned.
        outcomes: of all runs behind them.
        spread: what ± stands for.
    """
    measures = with_gradients(records)
    best, *others = (cells(record, varied, measures) for record in records)
    rows = [[f"**{text}**" if text else "" for text in best], *others]
    lines = [f"# {title}", "", *markdown_table(header(varied, measures), rows)]
    commits = sorted({outcome["commit"] for outcome in outcomes})
    lines += ["", f"{spread[0].upper()}{spread[1:]}."]
    if any(record["evaluated_on"] == "test" for record in records):
        lines += ["", "**Ranked on the TEST set**: nothing may be chosen by this table."]
    lines += ["", f"{versions_of(outcomes)}; commit {', '.join(commits)}."]
    if warning := doubts(commits):
        lines += ["", f"Warning: {warning}."]
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.sweep",
        description="Train a grid of settings and rank them by mean accuracy. "
        "The same command goes on with a sweep that was interrupted.",
    )
    add = parser.add_argument
    add("file", metavar="FILE.toml", type=Path, help="dataset, seeds, [base], [grid], [[runs]]")
    add("--out", metavar="DIR", type=Path, help="runs and tables (default runs/sweep-<FILE>)")
    add_common(add, "--data-root", "--device", "--on", "--job", "--quiet")
    return parser


def execute(arguments: Sequence[str]) -> None:
    """Reads, checks, loads, trains and ranks; nothing is written before all checks are done."""
    given = build_parser().parse_args(arguments)
    with in_words(SETTINGS):
        sweep = read_sweep(given.file)
        make_executor = executor_maker(given.on, given.job)
        device = choose_device(given.device, elsewhere=given.on != HERE)
        folder = given.out or Path("runs") / f"sweep-{given.file.stem}"
        check_folder(folder)
        near = given.file.resolve().drive == Path.cwd().drive  # else no relative path leads to it
        source = os.path.relpath(given.file) if near else str(given.file)
        if given.out is None and (folder / SOURCE).is_file():
            other = read_json(folder / SOURCE).get("file")
            if other != source:
                raise UserError(f"{folder} is of {other}, not of {source}; name another --out")
        data, configs = _load(sweep, given.data_root or default_root())
        rows = [
            [
                Run(f"{_shown(row)} seed {seed}", replace(config, seed=seed), data, folder)
                for seed in range(config.seed, config.seed + sweep.seeds)
            ]
            for row, config in zip(sweep.rows, configs, strict=True)
        ]
        runs = [run for row in rows for run in row]
        again = command_line("ssd.sweep", arguments)
        with resumable(f"go on with: {again}"), folder_lock(folder):
            write_atomically(folder / SOURCE, dumps({"file": source}) + "\n")
            with make_executor(folder, device) as executor, stop_on_interrupt() as stopped:
                study = Study(runs, device, Display(Console(), given.quiet), executor=executor)
                study.train(runs, stopped)
            _report(sweep, rows, folder, given.file.stem, given.quiet)


def _report(
    sweep: Sweep, rows: Sequence[Sequence[Run]], folder: Path, stem: str, quiet: bool
) -> None:
    """Ranks the rows, writes the tables and prints the best row."""
    outcomes = {run: run.outcome() or {} for row in rows for run in row}
    for run, outcome in outcomes.items():
        if "diverged" in outcome:
            note(f"{run.name}: {outcome['diverged']}")
    groups = [[outcomes[run] for run in row] for row in rows]
    records = rank(sweep, [row[0].config for row in rows], groups)
    split = " and ".join(sorted({record["evaluated_on"] for record in records}))
    count = f"{sweep.seeds} seed{'s' * (sweep.seeds > 1)}"
    data, features = rows[0][0].data.name, rows[0][0].config.features
    name = f"{data} {features}" if features else data
    title = f"{stem}: {name}, accuracy on {split} data, {count}"
    commits = {outcome["commit"] for outcome in outcomes.values()}
    if len(commits) > 1:
        note(f"the table shows {doubts(commits)}")
    given = any(row[0].config.order_seed is not None for row in rows)
    spread = SPREAD if given else SPREAD + ORDERS
    markdown = markdown_text(title, sweep.varied, records, list(outcomes.values()), spread)
    write_atomically(folder / CSV, csv_text(records))
    lines = [by_run(sweep, run, outcomes[run]) for row in rows for run in row]
    write_atomically(folder / RUNS, csv_text(lines))
    write_atomically(folder / MARKDOWN, markdown)
    if not quiet:
        marked = [["* "[number > 0], *cells(r, sweep.varied)] for number, r in enumerate(records)]
        table = rich_table(title, ["", *header(sweep.varied)], marked, caption=spread)
        table.rows[0].style = "bold"
        Console().print(table)
    if _diverged(records[0]):
        raise UserError(f"every row diverged, so none is the best  -> {folder}")
    best = {name: records[0][name] for name in sweep.varied}
    accuracy = records[0]["mean_accuracy"]
    print(f"best of {len(records)} ({split}): {_shown(best)}  {accuracy:.4f}  -> {folder}")


def _load(sweep: Sweep, root: Path) -> tuple[Dataset, list[Config]]:
    """The data and each row's settings, checked against them; prints hints."""
    data = load_data(sweep.config(sweep.rows[0]), root, notice=note)
    # The subset may stand in for MNIST: the settings are then the subset's.
    configs = [sweep.config(row, data) for row in sweep.rows]
    found = hints_for(configs, data)  # checks the data first
    if any(config.validation == 0 for config in configs):
        note("without validation in [base] the rows are ranked on the test set")
    for hint in found:
        note(reword(hint, SETTINGS))
    return data, configs


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of a sweep; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
