"""Checkpoints: one file, written atomically, verified when read, and safe to load (safetensors)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ssd.errors import UserError
from ssd.strict_json import dumps


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


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes named tensors and a JSON-able state, sealed with a checksum."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = dumps(state)
    metadata = {"state": text, "sha256": _digest(contiguous, text)}
    write_atomically(path, save(contiguous, metadata))


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what save_checkpoint wrote.

    Raises:
        UserError: the file is damaged or is no checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sound = metadata["sha256"] == _digest(tensors, metadata["state"])
        state = json.loads(metadata["state"])
        if not isinstance(state, dict):
            raise ValueError("its state is no object")
    except OSError:
        raise
    except Exception as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(f"checkpoint {path} is damaged ({line}); {_ADVICE}") from error
    if not sound:
        raise UserError(f"checkpoint {path} is damaged (checksum differs); {_ADVICE}")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, state


_ADVICE = "delete its folder to start again, or use another --out"


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()
