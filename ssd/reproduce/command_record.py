"""What a command of ssd.reproduce took from end to end, its interruptions added up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd.storage.files import damaged, dumps, read_json, write_atomically
from ssd.storage.provenance import commit, machine, versions

COMMANDS = "command.json"
SUMMED: dict[str, type | tuple[type, ...]] = {
    "commits": list,
    "runs_trained": int,
    "seconds": (int, float),
}


@dataclass
class CommandRecord:
    """A command's entry in the file of all commands that wrote into a folder.

    A command that was stopped goes on with its entry. One that had ended keeps it while there is
    nothing to train, and begins a new one otherwise, as it does on other data.

    Args:
        path: the JSON file, {command: entry}. command: as typed. device: of the runs.
        data: checksum of each benchmark's.
        needed: runs that it shows and may train; those it did not train were there before.
        start: time.perf_counter() when the process took it up.

    Raises:
        UserError: the file is damaged.
    """

    path: Path
    command: str
    device: str
    data: Mapping[str, str]
    needed: int
    start: float

    def __post_init__(self) -> None:
        before = self._entries().get(self.command, {})
        self.before = before if before.get("data") == self.data else {}

    def _entries(self) -> dict[str, Any]:
        entries = read_json(self.path) if self.path.is_file() else {}
        for entry in entries.values():
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(name), kind) for name, kind in SUMMED.items()
            ):
                raise damaged(self.path, f"not an entry with {', '.join(SUMMED)}")
        return entries

    def save(self, trained: int, finished: bool = False) -> None:
        """Writes the entry.

        Args:
            trained: runs that this process has trained. finished: whether the command has ended.
        """
        ended = self.before.get("finished", False)
        if ended and not trained:
            return
        before = {} if ended else self.before
        entry = {
            "commits": sorted({*before.get("commits", []), commit()}),
            "machine": machine(),
            "device": self.device,
            "data": self.data,
            "versions": versions(),
            "runs_needed": self.needed,
            "runs_trained": before.get("runs_trained", 0) + trained,
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - self.start,
            "finished": finished,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = {**self._entries(), self.command: entry}
        write_atomically(self.path, dumps(entries, indent=2) + "\n")
