"""What a command line asks for, and a command under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ssd.embed.convmixer import Settings
from ssd.errors import UserError
from ssd.progress import Display


@dataclass(frozen=True)
class Request:
    """A command line's options by their names, checked without reading data."""

    dataset: str
    extractor: str
    out: Path
    data_root: Path
    device: torch.device
    settings: Settings
    pretrain: str
    pretrain_folder: Path | None = None
    weights: Path | None = None
    resume: bool = False
    checkpoint_every: float = 30.0  # seconds
    quiet: bool = False

    @property
    def pretraining(self) -> Path:
        """The checkpoint, and in the end the weights, of the extractor that is trained here."""
        return self.out.with_suffix(".convmixer.safetensors")

    @property
    def partial(self) -> Path:
        """The features of the images embedded so far."""
        return self.out.with_suffix(".partial.safetensors")

    def __post_init__(self) -> None:
        """UserError if a value is out of range, or names what does not exist."""
        settings, every = self.settings, self.checkpoint_every
        for option, value, holds, rule in (
            ("--epochs", settings.epochs, settings.epochs >= 1, "at least 1"),
            ("--batch-size", settings.batch_size, settings.batch_size >= 1, "at least 1"),
            ("--lr", settings.lr, 0 < settings.lr <= 1, "in 0..1, not 0"),
            ("--seed", settings.seed, 0 <= settings.seed < 2**32, "in 0..2^32-1"),
            ("--checkpoint-every", every, every >= 0, "at least 0"),
        ):
            if not holds:
                raise UserError(f"{option} {value} must be {rule}")
        if self.pretrain_folder is not None and not self.pretrain_folder.is_dir():
            raise UserError(f"--pretrain-folder {self.pretrain_folder} is not a folder")
        if self.weights is not None and not self.weights.is_file():
            raise UserError(f"--weights {self.weights} is not a file")
        for path in (self.out, self.pretraining, self.partial):
            if path.exists() and not self.resume:
                raise UserError(f"{path} exists already; add --resume or use another --out")


@dataclass(frozen=True)
class Work:
    """A request under way. stopped: whether to stop at the next step."""

    request: Request
    display: Display
    stopped: Callable[[], bool] = lambda: False
