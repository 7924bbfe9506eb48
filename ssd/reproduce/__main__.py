"""python -m ssd.reproduce: from data to the paper's tables and figures.

Each run has a folder named by its settings. So the same command goes on where it was stopped, and
results that share runs train them once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ssd.cli import (
    ArgumentParser,
    add_common,
    check_folder,
    choose_device,
    command_line,
    exit_status,
    in_words,
    note,
)
from ssd.data import default_root
from ssd.errors import UserError
from ssd.executors import HERE, executor_maker
from ssd.reproduce import experiments
from ssd.reproduce.experiments import RESULTS
from ssd.reproduce.reproduction import WORDS, Reproduction, Request, load_benchmarks, nameable
from ssd.storage.lock import folder_lock

ALL = "all"


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.reproduce",
        description="Train what the paper's tables and figures need and is not there yet, and\n"
        "write them. The same command goes on with what was interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m ssd.reproduce all --short\n"
        "  python -m ssd.reproduce table1 bwt --only cifar10 10000 sdmlp 'ssd (paper)'",
    )
    add = parser.add_argument
    results = f"{', '.join(RESULTS)} or {ALL} (default)"
    add("results", metavar="RESULT", nargs="*", default=[ALL], help=results)
    short = "at the everyday preset: an hour on a CPU; not the paper's protocol"
    add("--short", action="store_true", help=short)
    add(
        "--large",
        action="store_true",
        help=f"with --short: R = 10,000 too, for {len(experiments.LARGE)} methods",
    )
    add_folder = partial(add, metavar="DIR", type=Path)
    out = "default results/reproduction, with --short results/reproduction-short"
    add_folder("--out", help=f"tables and figures ({out})")
    runs = Path("runs/reproduction")
    add_folder("--runs", default=runs, help=f"folders of the runs (default {runs})")
    add_common(add, "--data-root")
    features = "feature files (default features in the data's folder)"
    add_folder("--features-folder", help=features)
    add_common(add, "--device", "--on", "--job")
    only = "train only these benchmarks, sizes, methods or ablated factors; "
    only += "the tables still show every run that exists"
    add("--only", metavar="NAME", nargs="+", default=[], help=only)
    return parser


def execute(arguments: Sequence[str]) -> None:
    """Checks, loads, trains what is missing, writes; nothing is written before all checks."""
    start = time.perf_counter()
    given = build_parser().parse_args(arguments)
    for name in given.results:
        if name not in (*RESULTS, ALL):
            raise UserError(f"{name} is unknown; choose from {', '.join([*RESULTS, ALL])}")
    if given.large and not given.short:
        raise UserError("--large goes with --short; without it there is R = 10,000 anyway")
    known = [name for names in nameable().values() for name in sorted(names)]
    for name in given.only:
        if name not in known:
            raise UserError(f"--only {name} is unknown; choose from {', '.join(known)}")
    if given.short and not given.large and str(experiments.SIZES[1]) in given.only:
        raise UserError(f"--only {experiments.SIZES[1]} needs --large beside --short")
    make_executor = executor_maker(given.on, given.job)
    device = choose_device(given.device, elsewhere=given.on != HERE)
    out = given.out or Path("results") / ("reproduction-short" if given.short else "reproduction")
    for place, path in (("--out", out), ("--runs", given.runs)):
        check_folder(path, place)
    root = given.data_root or default_root()
    folder = given.features_folder or root / "features"
    features = {b.name: str(folder / b.features) for b in experiments.BENCHMARKS if b.features}
    results = {
        name: result.rows(given.short, features)
        for name, result in RESULTS.items()
        if name in given.results or ALL in given.results
    }
    if given.short and not given.large:
        small = experiments.SIZES[0]
        results = {n: [r for r in rows if r.neurons <= small] for n, rows in results.items()}
    command = command_line("ssd.reproduce", arguments)
    request = Request(results, given.only, out, given.runs, device, given.short, command, start)
    with in_words(WORDS):
        rows = [row for group in results.values() for row in group]
        data, absent = load_benchmarks(rows, root)
        with folder_lock(given.runs), folder_lock(out):
            reproduction = Reproduction(request, data, absent)
            for reason in dict.fromkeys(reproduction.refused.values()):
                note(f"left out, {reason}")
            for hint in reproduction.hints():
                note(hint)
            with make_executor(given.runs, device) as reproduction.study.executor:
                reproduction.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: execute(given), "--out or --runs")


if __name__ == "__main__":
    sys.exit(main())
