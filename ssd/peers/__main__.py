"""python -m ssd.peers: measures learners that need no gradients."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from ssd.cli import (
    ArgumentParser,
    add_common,
    check_file,
    check_seeds,
    command_line,
    exit_status,
    in_words,
    note,
    resumable,
)
from ssd.data import SOURCES, Dataset, class_order, default_root, load, split
from ssd.errors import UserError, require_memory
from ssd.executors import HERE, executor_maker
from ssd.peers.learners import entries
from ssd.peers.readout import gram_dtype
from ssd.peers.study import Study, result_table
from ssd.storage.lock import file_lock
from ssd.storage.provenance import doubts


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.peers",
        description="Measure learners that need no gradients; settings are chosen on a "
        "validation split of the training data.",
    )
    add = parser.add_argument
    add("--dataset", metavar="NAME", help=f"{', '.join(SOURCES)} (default mnist)")
    add("--features", metavar="FILE", type=Path, help=".npz or .pt in place of a data set")
    add_common(add, "--data-root")
    add("--tasks", metavar="N", type=int, help="number of tasks (default that of the data set)")
    add("--neurons", metavar="R", type=int, default=1000, help="width (default 1000)")
    add(
        "--seeds", metavar="N", type=int, default=3, help="class orders and projections (default 3)"
    )
    add("--out", metavar="FILE", type=Path, help="CSV; rows that it holds are not measured again")
    add_common(add, "--on", "--job")
    return parser


def _require_fit(data: Dataset, neurons: int) -> None:
    """UserError where the Gram matrix of the hidden layer and its weights cannot fit."""
    width = data.x_train.shape[1] + data.classes
    needed = neurons * (gram_dtype(neurons).itemsize * neurons + 4 * width)
    require_memory(needed, f"--neurons {neurons}", torch.device("cpu"))


def execute(arguments: Sequence[str]) -> None:
    """Checks, loads and measures; writes nothing before all checks are done."""
    given = _parser().parse_args(arguments)
    if given.neurons < 10:
        raise UserError(f"--neurons {given.neurons} must be at least 10")
    check_seeds(given.seeds)
    make_executor = executor_maker(given.on, given.job)
    out, dataset = given.out, given.dataset or ("features" if given.features else "mnist")
    if out is not None:
        check_file(out)
    elif given.on != HERE:
        raise UserError(f"--on {given.on} needs --out FILE in a folder that all machines share")
    again = f"go on with: {command_line('ssd.peers', arguments)}"
    again = "without --out FILE nothing is kept" if out is None else again
    with resumable(again), in_words({"--validation": "the validation share"}):
        data = load(dataset, given.data_root or default_root(), given.features, notice=note)
        tasks = SOURCES[data.name].tasks if given.tasks is None else given.tasks
        split(data, tasks, class_order(data.classes, 0))
        _require_fit(data, given.neurons)
        name = given.features.stem if given.features else data.name
        progress = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
        with nullcontext() if out is None else file_lock(out):
            study = Study(name, data, tasks, given.neurons, out, progress.print)
            found = entries(data.x_train.shape[1], given.neurons)
            folder = Path() if out is None else out.parent
            with make_executor(folder, torch.device("cpu")) as executor:
                if executor is None:
                    measured = {entry.name: study.measure(entry, given.seeds) for entry in found}
                else:
                    measured = study.measure_on(executor, found, given.seeds, folder)
    commits = {row.commit for rows in measured.values() for row in rows}
    if len(commits) > 1:
        note(f"the table shows {doubts(commits)}")
    title = f"{name}, {tasks} tasks, R = {given.neurons:,}, {given.seeds} seeds"
    Console().print(result_table(measured, title))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the peers; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
