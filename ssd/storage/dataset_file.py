"""Data sets as files, for workers on other machines."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch

from ssd.data import ARRAYS, Dataset
from ssd.errors import UserError
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint


@contextmanager
def stored(found: Iterable[Dataset], folder: Path) -> Iterator[dict[str, Path]]:
    """Files of data sets, by their checksum; they are removed at the end.

    Args:
        found: the data sets, some of them repeatedly.
        folder: where the files are; made if it is absent.
    """
    files: dict[str, Path] = {}
    try:
        for data in found:
            if data.checksum() not in files:
                folder.mkdir(parents=True, exist_ok=True)
                file = folder.absolute() / f"data-{uuid4().hex}.safetensors"
                files[data.checksum()] = file
                tensors = {name: getattr(data, name) for name in ARRAYS}
                save_checkpoint(file, tensors, {"name": data.name})
        yield files
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def read_dataset(file: Path) -> Dataset:
    """The data set in a file that `stored` wrote; UserError if it is damaged or out of sight."""
    try:
        tensors, state = load_checkpoint(file, torch.device("cpu"))
    except FileNotFoundError as error:
        reason = f"{file} cannot be seen from {platform.node()}"
        raise UserError(f"{reason}; use a folder that all machines share") from error
    return Dataset(state["name"], **tensors)
