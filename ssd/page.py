"""Finished runs as one HTML file that needs no network: curves, matrix, neurons, settings.

The template is page.html; its script draws what the JSON block holds.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssd.cli import command_line
from ssd.config import LIMIT, PRESETS, Config, option, resolve
from ssd.data import SOURCES
from ssd.metrics import USED
from ssd.storage.files import dumps, read_text, write_atomically
from ssd.storage.run_folder import read_frequency, read_records, read_summary

REPORT = "report.html"
VALUES = 20_000  # accuracies in the curves of a run; a long run shows every n-th evaluation
# A frequency travels as a byte, its position among edges that are 3.7 % apart. USED is an edge.
EDGES = 10.0 ** (np.arange(-4 * 63, 1) / 63)
LEVELS = np.concatenate([[0.0, EDGES[0]], np.sqrt(EDGES[:-1] * EDGES[1:]), [1.0]])


def write_report(folder: Path) -> None:
    """Writes report.html into the folder of a finished run; see write_page."""
    write_page({folder.resolve().name: folder}, folder / REPORT)


def write_page(folders: dict[str, Path], path: Path) -> None:
    """Writes a page of finished runs, side by side.

    Args:
        folders: of the runs, by the names that the page gives them.
        path: of the page.

    Raises:
        UserError: a file of a run is damaged.
    """
    runs = [_content(name, folder) for name, folder in folders.items()]
    title = f"ssd: {runs[0]['name']}" if len(runs) == 1 else f"ssd: {len(runs)} runs"
    data = dumps({"runs": runs, "levels": LEVELS.round(7).tolist(), "used": USED})
    template = read_text(Path(__file__).with_name("page.html"))
    before, between, after = re.split("@title@|@data@", template)
    # Nothing in the data may end the script that holds them.
    data = data.replace("<", "\\u003c")
    write_atomically(path, f"{before}{html.escape(title)}{between}{data}{after}")


def _content(name: str, folder: Path) -> dict[str, Any]:
    """What the page shows of a run."""
    summary = read_summary(folder)
    config = Config(**summary["config"])
    records, frequency = read_records(folder, config), read_frequency(folder, config)
    measured = [record for record in records if "test_accuracy" in record]
    kept = thinned(measured)
    shown = ("dataset", "method", "evaluated_on", "device", "commit", "versions", "config")
    measures = ("mean_accuracy", "bwt", "forgetting", "seconds")
    return {
        "name": name,
        **{entry: summary[entry] for entry in shown},
        "measures": {measure: round(summary[measure], 4) for measure in measures},
        "command": command_of(config),
        "matrix": np.round(summary["accuracy_matrix"], 4).tolist(),
        "times": [round(r["task"] + (r["epoch"] + 1) / config.epochs, 4) for r in kept],
        # Of the tasks that have begun.
        "curves": [np.round(r["test_accuracy"][: r["task"] + 1], 4).tolist() for r in kept],
        "evaluations": len(measured),
        "neurons": config.neurons,
        "frequency": base64.b64encode(encode(frequency).tobytes()).decode(),
    }


def thinned(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th evaluation of a log and the last of each task, so that about VALUES remain."""
    step = -(-sum(record["task"] + 1 for record in measured) // VALUES)
    following = [*(record["task"] for record in measured[1:]), None]
    return [
        record
        for number, (record, after) in enumerate(zip(measured, following, strict=True))
        if number % step == 0 or after != record["task"]
    ]


def encode(frequency: np.ndarray) -> np.ndarray:
    """Activation frequencies of any shape as uint8 positions in LEVELS; 0 stays 0 exactly."""
    above = np.searchsorted(EDGES, frequency, side="right")
    return (above + (frequency > 0)).astype(np.uint8)


def command_of(config: Config) -> str:
    """The command of ssd.train that has these settings, from the preset that leaves least to say.

    It names what the everyday preset derives from the data, so it needs no data to be exact.
    """
    settings = config.to_dict()
    named = {n: settings[n] for n in ("dataset", "features", "method", "tasks", "seed")}
    known = config.dataset if config.dataset in SOURCES else "features"  # a data set of the user's

    def options(preset: str) -> dict[str, Any]:
        given = {"preset": preset, "dataset": known, "tasks": config.tasks}
        usual = [resolve(given, samples).to_dict() for samples in (1, LIMIT)]
        return named | {
            name: value
            for name, value in settings.items()
            if any(value != other[name] for other in usual)
        }

    preset = min(PRESETS, key=lambda name: len(options(name)))
    words = [] if preset == PRESETS[0] else ["--preset", preset]
    for name, value in options(preset).items():
        words += [] if value is None else [option(name), str(value)]
    return command_line("ssd.train", words)
