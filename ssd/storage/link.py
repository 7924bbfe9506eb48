"""How a study and its workers hear of each other: by files, which reach other machines too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from ssd.storage.files import read_json, write_json

LOOK = 1.0  # seconds between two looks at a file


class Every:
    """True at the first call, and then once in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.due = seconds, 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + self.seconds
        return True

    def __reduce__(self) -> tuple[type[Every], tuple[float]]:
        return type(self), (self.seconds,)  # machines have clocks of their own


@contextmanager
def alive(folder: Path) -> Iterator[Path]:
    """A file of a study, in a folder; without it, its workers save and end."""
    file = folder.absolute() / f"study-{uuid4().hex}"
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def is_gone(file: Path) -> bool:
    """Whether a file was removed; a file system that does not answer has not said so."""
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


class Link:
    """Between a study and the worker that trains a batch.

    Args:
        alive: of the study.
        checkpoint: of the batch.
    """

    def __init__(self, alive: Path, checkpoint: Path) -> None:
        self.alive, self.reached = alive, checkpoint.with_suffix(".progress")
        self.look, self.tell, self.stopped = Every(LOOK), Every(LOOK), False
        self.clear()

    def clear(self) -> None:
        with suppress(OSError):
            self.reached.unlink(missing_ok=True)

    def is_stopped(self) -> bool:
        """Whether the study wants no more; for the worker."""
        if not self.stopped and self.look():
            self.stopped = is_gone(self.alive)
        return self.stopped

    def report(self, where: str, steps: int, total: int) -> None:
        """Tells the study, see ssd.progress.position; for the worker."""
        if self.tell():
            with suppress(OSError):  # no reason to stop
                write_json(self.reached, {"where": where, "steps": steps, "total": total})

    def position(self) -> tuple[str, int, int] | None:
        """What the worker told last, None if nothing; for the study."""
        with suppress(OSError):
            found = read_json(self.reached)
            return found["where"], found["steps"], found["total"]
        return None
