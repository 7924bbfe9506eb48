"""Which setting of a sweep the spread of its mean accuracy comes from, as a Markdown table.

    python scripts/variance_shares.py runs/sweep-FILE/runs.csv

A setting's share, or the seed's, is the sum of squares between its levels over the total. The rest
is interactions. By chance a setting has its degrees of freedom over those of all runs. The sweep
must hold one run of every combination.
"""

import csv
import sys
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.storage.files import read_text
from ssd.tables import markdown_table

MEASURE = "mean_accuracy"


def shares(path: Path) -> list[list[str]]:
    """Rows of the table: setting, levels, share and share by chance; UserError if unbalanced."""
    runs = list(csv.DictReader(read_text(path).splitlines()))
    names = list(runs[0]) if runs else []
    if not {"seed", MEASURE} <= set(names):
        raise UserError(f"{path} holds no runs of a sweep; name the runs.csv that ssd.sweep wrote")
    if diverged := sum(not run[MEASURE] for run in runs):
        raise UserError(f"{path}: {diverged} runs diverged; leave their settings out of the sweep")
    levels = {n: sorted({run[n] for run in runs}) for n in names[: names.index("seed") + 1]}
    combinations = list(product(*levels.values()))
    if sorted(tuple(run[n] for n in levels) for run in runs) != combinations:
        raise UserError(f"{path}: {len(runs)} runs are not one of each of {len(combinations)}")
    found = np.array([float(run[MEASURE]) for run in runs])
    if found.min() == found.max():
        raise UserError(f"{path}: every run has the {MEASURE} {found[0]}, so there is no spread")
    rows, left = [], np.ones(2)
    for name, values in levels.items():
        means = [found[[run[name] == value for run in runs]].mean() for value in values]
        parts = np.array([np.var(means) / found.var(), (len(values) - 1) / (len(runs) - 1)])
        rows.append([name, str(len(values)), *(f"{part:.3f}" for part in parts)])
        left -= parts
    return [*rows, ["interactions", "", *(f"{abs(rest):.3f}" for rest in left)]]


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", metavar="runs.csv", type=Path, help="of a sweep")
    header = ["setting", "levels", f"share of the variance of {MEASURE}", "by chance"]
    print("\n".join(markdown_table(header, shares(parser.parse_args(arguments).file))))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
