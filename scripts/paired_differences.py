"""Differences between the values of a setting in a sweep, paired by seed, as a Markdown table.

    python scripts/paired_differences.py runs/sweep-FILE/runs.csv method ewc

compares every other value of the setting `method` with `ewc`, at equal other settings and over the
seeds that both have: mean difference of the accuracy, its standard error and p of a t test.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.metrics import paired_difference
from ssd.storage.files import read_text
from ssd.tables import markdown_table, plus_minus

MEASURE = "mean_accuracy"


def table(path: Path, setting: str, base: str) -> list[str]:
    """The lines of the table; UserError if the file has no such setting or value."""
    runs = [run for run in csv.DictReader(read_text(path).splitlines()) if run.get(MEASURE)]
    settings = list(runs[0])[: list(runs[0]).index("seed")] if runs else []
    if setting not in settings:
        raise UserError(f"{path} has no setting {setting}; use one of {', '.join(settings)}")
    values = list(dict.fromkeys(run[setting] for run in runs))
    if base not in values:
        raise UserError(f"{path} has no {setting} {base}; use one of {', '.join(values)}")
    others = [name for name in settings if name != setting]
    found: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for run in runs:
        place = found.setdefault(tuple(run[name] for name in others), {})
        place.setdefault(run[setting], {})[run["seed"]] = float(run[MEASURE])
    rows = []
    for value in values:
        for place, measured in found.items():
            own, reference = measured.get(value, {}), measured.get(base, {})
            pairs = [own[seed] - reference[seed] for seed in own if seed in reference]
            if value == base or not pairs:
                continue
            center, error, p = paired_difference(pairs)
            shown = [plus_minus(center, error, sign="+"), "" if p is None else f"{p:.3f}"]
            rows.append([f"{value} - {base}", *place, str(len(pairs)), *shown])
    return markdown_table([setting, *others, "seeds", f"{MEASURE}, paired", "p"], rows)


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", metavar="runs.csv", type=Path, help="of a sweep")
    parser.add_argument("setting", help="whose values are compared")
    parser.add_argument("base", help="the value that all others are compared with")
    given = parser.parse_args(arguments)
    print("\n".join(table(given.file, given.setting, given.base)))


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
