"""Checkpoints: one file, written atomically, verified when read, and safe to load (safetensors)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ssd.errors import UserError, one_line
from ssd.storage.files import dumps, write_atomically


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes named tensors and a state that JSON can hold, with a checksum over both."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = dumps(state)
    metadata = {"state": text, "sha256": _digest(contiguous, text)}
    write_atomically(path, save(contiguous, metadata))


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what save_checkpoint wrote.

    Raises:
        UserError: the file is damaged or not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["sha256"] != _digest(tensors, metadata["state"]):
            raise ValueError("checksum differs")
        state = json.loads(metadata["state"])
        if not isinstance(state, dict):
            raise ValueError("its state is not an object")
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own for a damaged file
        reason = f"checkpoint {path} is damaged ({one_line(error)})"
        advice = "delete its folder to start again, or use another --out"
        raise UserError(f"{reason}; {advice}") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}, state


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()
