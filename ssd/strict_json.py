"""The JSON that all files of this project are written in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


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
