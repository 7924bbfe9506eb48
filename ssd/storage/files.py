"""Files that are written as a whole and checked when they are read: text, JSON, numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from ssd.errors import UserError


def dumps(content: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON that every parser reads: NaN and infinity become null."""
    return json.dumps(_plain(content), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _plain(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content


def temporary(path: Path) -> Path:
    """The file that write_atomically fills first; a killed process leaves it behind."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], None]) -> None:
    """Replaces a file in one step, so that neither a reader nor a crash sees half of it.

    Args:
        path: of the file; a link stays, and the file that it names is replaced.
        content: bytes, text, or a function that writes to the open file (to save memory).
    """
    place = Path(os.path.realpath(path))
    if isinstance(content, str):
        # The text may hold a path that is not UTF-8.
        content = (
            content.encode(errors="surrogateescape").decode(errors="backslashreplace").encode()
        )
    try:
        with open(temporary(place), "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary(place), place)
    except BaseException as error:
        with suppress(OSError):
            temporary(place).unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # the system does not name the file when the disk is full
        raise


def write_json(path: Path, content: Any) -> None:
    """Replaces a file by indented JSON."""
    write_atomically(path, dumps(content, indent=2) + "\n")


def read_text(path: Path) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        UserError: it is not UTF-8. OSError: it cannot be read.
    """
    if path.is_char_device():  # reading it might never end
        raise UserError(f"{path} cannot be read: it is a device; name a file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as in UTF-16 without its mark
        raise UserError(f"{path} cannot be read: not UTF-8; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if there is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, "not an object")
    return content


def damaged(path: Path, how: object) -> UserError:
    """The error for a file of a run that does not hold what the run wrote."""
    return UserError(f"{path} is damaged ({how}); move its folder away or use another")


def require_sound(path: Path, sound: Mapping[str, bool]) -> None:
    """UserError for the first entry of a file that is not sound."""
    for name, holds in sound.items():
        if not holds:
            raise damaged(path, f"{name} is missing or wrong")


def are_numbers(values: Any, *shape: int) -> bool:
    """Whether nested lists hold finite numbers and have this shape; no shape: a single number."""
    try:
        array = np.array(values)
    except ValueError:  # rows of several lengths
        return False
    return array.dtype.kind in "fi" and array.shape == shape and bool(np.isfinite(array).all())


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which values of `now` differ from those of `before`, as text; empty if none do."""
    found = []
    for key, value in now.items():
        earlier = before.get(key)
        if isinstance(earlier, dict) and isinstance(value, dict):
            found += [
                f"{k} {earlier.get(k)}, now {value.get(k)}"
                for k in sorted(earlier.keys() | value.keys())
                if earlier.get(k) != value.get(k)
            ]
        elif earlier != value:
            found.append(f"{key} {earlier}, now {value}")
    return "; ".join(found)
