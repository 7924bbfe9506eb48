"""The JSON that all files of this project are written in."""

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
    """JSON text, valid for every reader: a number that is NaN or infinite becomes null."""
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
    """Where write_atomically prepares a file; a kill may leave it behind."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: Path, content: bytes | str | Callable[[IO[bytes]], None]) -> None:
    """Replaces a file as a whole: a reader or a crash sees the old content or the new one.

    Args:
        content: of the file, or what writes it to a stream, for content too large to hold twice.
    """
    place = Path(os.path.realpath(path))  # a link goes on to name the file
    if isinstance(content, str):
        # A path in it may be no UTF-8.
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
            error.filename = str(path)  # a full disk does not name the file
        raise


def read_text(path: Path) -> str:
    """The text of a file that a user may have written; a byte-order mark is no part of it.

    Raises:
        UserError: it is not UTF-8. OSError: it cannot be read.
    """
    if path.is_char_device():  # it may have no end
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
    """A JSON object of a run; UserError if it is damaged."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(content, dict):
        raise damaged(path, "not an object")
    return content


def damaged(path: Path, how: object) -> UserError:
    """What is said of a run's file that is not as it was written."""
    return UserError(f"{path} is damaged ({how}); move its folder away or use another")


def are_numbers(values: Any, *shape: int) -> bool:
    """Whether these are finite numbers of a shape; of none: a single one."""
    try:
        array = np.array(values)
    except ValueError:  # rows of several lengths
        return False
    return array.dtype.kind in "fi" and array.shape == shape and bool(np.isfinite(array).all())


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What of `now` was otherwise before, as text; empty if nothing was."""
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
