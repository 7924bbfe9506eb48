"""A reproduction: trains what its results need and is missing, and writes their files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ssd.cli import SETTINGS, note, resumable, reword, stop_on_interrupt
from ssd.data import Dataset
from ssd.errors import Interrupted, UserError
from ssd.figures import save_figure
from ssd.progress import Display
from ssd.reproduce import experiments
from ssd.reproduce.claims import differences, verdicts
from ssd.reproduce.experiments import RESULTS, Row
from ssd.reproduce.figures import draw
from ssd.reproduce.lines import Line, line_of, runs_of
from ssd.reproduce.tables import (
    SPREAD,
    doubts_of,
    markdown_text,
    provenance,
    records,
    run_records,
    task_records,
    terminal_table,
)
from ssd.runs import load_data, make_tasks
from ssd.storage.files import read_json, require_sound, write_atomically, write_json
from ssd.storage.provenance import commit, device_name, machine, versions
from ssd.study import Run, Study, hints_for
from ssd.tables import csv_text

COMMANDS = "command.json"
# What library code calls --out is the folder of a run.
WORDS = {**SETTINGS, "--out": "--runs"}


@dataclass(frozen=True)
class Request:
    """What a command asks for."""

    results: Mapping[str, Sequence[Row]]  # the rows of each result
    only: Sequence[str]  # names of what may be trained; empty: everything
    out: Path  # folder of the tables and figures
    runs: Path  # folder of the runs' folders
    device: torch.device
    short: bool  # whether the rows are scaled down
    command: str  # as typed
    start: float  # time.perf_counter() when it began


def nameable() -> dict[str, set[str]]:
    """The names that --only knows, by their kind."""
    return {
        "benchmark": {benchmark.name for benchmark in experiments.BENCHMARKS},
        "size": set(map(str, experiments.SIZES)),
        "method": {*experiments.METHODS, *experiments.PEERS},
        "factor": {f for factors in experiments.ABLATIONS.values() for f in factors},
    }


def selects(only: Sequence[str], row: Row) -> bool:
    """Whether --only lets a row be trained: it has one of the names given of each kind."""
    names = {"benchmark": row.benchmark.name, "method": row.method, "factor": row.factor}
    if row.neurons:  # a peer without neurons is of every size
        names["size"] = str(row.neurons)
    wanted = {kind: known & set(only) for kind, known in nameable().items()}
    return all(not wanted[kind] or name in wanted[kind] for kind, name in names.items())


def load_benchmarks(rows: Sequence[Row], root: Path) -> tuple[dict[str, Dataset], dict[str, str]]:
    """The data of the rows' benchmarks by name, and why others have none.

    Raises:
        UserError: none of them has data.
    """
    data: dict[str, Dataset] = {}
    absent: dict[str, str] = {}
    most_tasks = sorted(rows, key=lambda row: row.config.tasks)
    for benchmark, config in {row.benchmark: row.config for row in most_tasks}.items():
        try:
            found = load_data(config, root, strict=True)
            make_tasks(config, found)
            data[benchmark.name] = found
        except UserError as error:
            absent[benchmark.name] = str(error)
    if not data:
        raise UserError(f"no data: {'; '.join(absent.values())}")
    return data, absent


def _refusal(row: Row, absent: Mapping[str, str]) -> str:
    """Why a row cannot be run; empty if it can."""
    if row.benchmark.name in absent:
        return f"no data: {absent[row.benchmark.name]}"
    try:
        row.config.validate()
    except UserError as error:
        return f"refused: {error}"
    return ""


def read_commands(path: Path) -> dict[str, Any]:
    """The record of all commands that wrote into a folder; UserError if it is damaged."""
    entries = read_json(path) if path.is_file() else {}
    summed: dict[str, Any] = {"commits": list, "runs_trained": int, "seconds": (int, float)}
    for entry in entries.values():
        known = entry if isinstance(entry, dict) else {}
        require_sound(path, {n: isinstance(known.get(n), kind) for n, kind in summed.items()})
    return entries


class Reproduction:
    """The results asked for, the runs they need, and their files.

    Args:
        request: what is asked for.
        data, absent: what load_benchmarks returned.

    Raises:
        UserError: a summary or the folder's record of commands is damaged.
    """

    def __init__(
        self, request: Request, data: Mapping[str, Dataset], absent: Mapping[str, str]
    ) -> None:
        self.request, self.data = request, data
        self.console = Console(soft_wrap=True, markup=False, highlight=False)
        self.refused: dict[Row, str] = {}  # row -> why it cannot be run
        self.runs: dict[Row, list[Run]] = {}
        for row in dict.fromkeys(row for rows in request.results.values() for row in rows):
            if why := _refusal(row, absent):
                self.refused[row] = reword(why, WORDS)
            else:
                self.runs[row] = runs_of(row, data[row.benchmark.name], request.runs)
        self.chosen = [row for row in self.runs if selects(request.only, row)]
        needed = [run for row in self.chosen for run in self.runs[row]]
        self.study = Study(needed, request.device, Display(self.console), self._write_command)
        self.needed = len({run.folder for run in needed})
        self.checksums = {name: found.checksum() for name, found in data.items()}
        entry = read_commands(request.out / COMMANDS).get(request.command, {})
        self.before = entry if entry.get("data") == self.checksums else {}

    def hints(self) -> list[str]:
        """What the user should know of the networks that may be trained, one line per hint."""
        networks = [row for row in self.chosen if row.peer is None or row.peer.method]
        return [
            f"{benchmark.title}: {reword(hint, WORDS)}"
            for benchmark in dict.fromkeys(row.benchmark for row in networks)
            for hint in hints_for(
                [row.config for row in networks if row.benchmark == benchmark],
                self.data[benchmark.name],
            )
        ]

    def run(self) -> None:
        """Trains and writes result by result, so the first tables come before the last runs.

        Raises:
            Interrupted: Ctrl-C was hit; the tables show what exists.
        """
        request = self.request
        with resumable(f"{request.out} shows what exists; go on with: {request.command}"):
            try:
                for name, rows in request.results.items():
                    runs = [run for row in rows if row in self.chosen for run in self.runs[row]]
                    with stop_on_interrupt() as stopped:
                        self.study.train(runs, stopped)
                    self._show(name, self.write(name))
            except (Interrupted, KeyboardInterrupt):
                for name in request.results:
                    self.write(name)
                self._write_command()
                raise
        self._write_command(finished=True)
        self.console.print(f"{self.study.trained} runs trained  -> {request.out}")

    def _write_command(self, finished: bool = False) -> None:
        """Records the time and the runs of the command, summed over its interruptions.

        A command that was stopped continues its entry. One that had ended keeps its entry if there
        is nothing to train, and begins a new one otherwise. So does a command on other data.
        """
        request, ended = self.request, self.before.get("finished", False)
        if ended and not self.study.trained:
            return
        before = {} if ended else self.before
        entry = {
            "commits": sorted({*before.get("commits", []), commit()}),
            "machine": machine(),
            "device": device_name(request.device),
            "data": self.checksums,
            "versions": versions(),
            "runs_needed": self.needed,
            "runs_trained": before.get("runs_trained", 0) + self.study.trained,
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - request.start,
            "finished": finished,
        }
        path = request.out / COMMANDS
        write_json(path, {**read_commands(path), request.command: entry})

    def write(self, name: str) -> list[Line]:
        """Writes a result's tables and figures from the runs that exist; returns its lines."""
        result, out = RESULTS[name], self.request.out
        lines = [
            Line(row, (), self.refused[row])
            if row in self.refused
            else line_of(row, self.runs[row], left_out=row not in self.chosen)
            for row in self.request.results[name]
        ]
        title = f"{name}: {result.title}"
        if self.request.short:
            title += " (--short: scaled down, not the protocol of the paper)"
        origin = provenance(self.request.command, lines)
        tables = {name: records(result, lines)}
        tables[f"{name}_runs"] = run_records(result, lines)
        if tested := differences(result, lines):
            tables[f"{name}_differences"] = tested
        if result.per_task:
            tables[f"{name}_tasks"] = task_records(result, lines)
        for stem, table in tables.items():
            text = csv_text(table, {"spread": SPREAD, **origin})
            write_atomically(out / f"{stem}.csv", text)
        write_atomically(out / f"{name}.md", markdown_text(title, result, lines, origin))
        for stem, figure in draw(name, result, lines):
            save_figure(figure, out / stem)
        return lines

    def _show(self, name: str, lines: Sequence[Line]) -> None:
        result = RESULTS[name]
        if warning := doubts_of(lines):
            note(f"{name} shows {warning}")
        self.console.print(terminal_table(f"{name}: {result.title}", result, lines))
        for claim in verdicts(lines) if result.claims else ():
            self.console.print(claim)
