"""python -m ssd.compare: finished runs side by side, as one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd.cli import ArgumentParser, check_file, exit_status
from ssd.errors import UserError
from ssd.page import write_page
from ssd.storage.lock import file_lock
from ssd.storage.run_folder import METRICS, SUMMARY


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ssd.compare",
        description="Write a page that shows finished runs side by side; it needs no network.",
        epilog="example:\n  python -m ssd.compare runs/mnist-sdmlp-seed0 runs/mnist-ssd-seed0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of a finished run of ssd.train")
    default = Path("compare.html")
    add("--out", metavar="FILE", type=Path, default=default, help=f"the page (default {default})")
    return parser


def check_runs(folders: Sequence[Path]) -> None:
    """UserError if a folder holds no finished run, or is named twice."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name the folder of a run")
        # The folder of several seeds has a summary too, but no log.
        if not all((folder / name).is_file() for name in (SUMMARY, METRICS)):
            raise UserError(
                f"{folder} holds no finished run; train it to its end, or name a folder inside it"
            )
        place = folder.resolve()
        if place in seen:
            raise UserError(f"{folder} is the same run as {seen[place]}; name each run once")
        seen[place] = folder


def execute(arguments: Sequence[str] | None) -> None:
    """Checks all runs, then writes the page."""
    given = _parser().parse_args(arguments)
    check_file(given.out)
    check_runs(given.runs)
    with file_lock(given.out):
        write_page({str(folder): folder for folder in given.runs}, given.out)
    count = len(given.runs)
    print(f"{count} run{'s' if count > 1 else ''} -> {given.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the comparison; returns the exit status."""
    return exit_status(lambda: execute(arguments))


if __name__ == "__main__":
    sys.exit(main())
