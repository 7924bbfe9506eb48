"""Builds an extractor, embeds a data set, writes the features; resumable."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd import data
from ssd.cli import check_file, choose_device, in_words
from ssd.data import Dataset, default_root
from ssd.embed.convmixer import ALGORITHM, Pretrainer, Settings, describe, load_weights, read
from ssd.embed.extractors import TORCHVISION, Extractor, freeze, load_torchvision, torchvision_model
from ssd.embed.images import (
    PRETRAIN,
    SHAPES,
    load_folder,
    load_images,
    pixels,
    refuse_channels,
    refuse_same,
)
from ssd.errors import Interrupted, UserError
from ssd.metrics import finite
from ssd.progress import Display
from ssd.storage.checkpoint import save_checkpoint
from ssd.storage.files import difference, dumps, write_atomically

TORCHVISION_BATCH = 64
TRAINING = ("pretrain", "pretrain_folder", "epochs", "lr", "seed")


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
        settings, every, pretrain = self.settings, self.checkpoint_every, self.pretrain
        for option, value, holds, rule in (
            ("--epochs", settings.epochs, settings.epochs >= 1, "at least 1"),
            ("--batch-size", settings.batch_size, settings.batch_size >= 1, "at least 1"),
            ("--lr", settings.lr, 0 < settings.lr <= 1, "in 0..1, not 0"),
            ("--seed", settings.seed, 0 <= settings.seed < 2**32, "in 0..2^32-1"),
            ("--checkpoint-every", every, every >= 0, "at least 0"),
        ):
            if not holds:
                raise UserError(f"{option} {value} must be {rule}")
        if not pretrain:
            raise UserError(
                f"--dataset {self.dataset} has no data set to pretrain on; name one with --pretrain"
            )
        require_known("--pretrain", pretrain)
        refuse_same(self.dataset, pretrain, f"--pretrain {pretrain}")
        refuse_channels(self.dataset, SHAPES[pretrain][0], f"--pretrain {pretrain}")
        if self.pretrain_folder is not None and not self.pretrain_folder.is_dir():
            raise UserError(f"--pretrain-folder {self.pretrain_folder} is not a folder")
        if self.weights is not None and not self.weights.is_file():
            raise UserError(f"--weights {self.weights} is not a file")
        for path in (self.out, self.pretraining, self.partial):
            if path.exists() and not self.resume:
                raise UserError(f"{path} exists already; add --resume or use another --out")


def require_known(option: str, dataset: str) -> None:
    """UserError unless this is a data set of images."""
    if dataset not in SHAPES:
        raise UserError(f"{option} {dataset} is unknown; choose from {', '.join(SHAPES)}")


def exclude(given: Mapping[str, Any], names: Iterable[str], other: str) -> None:
    """UserError if one of these options is given beside another one."""
    for name in names:
        if name in given:
            raise UserError(f"--{name.replace('_', '-')} does not go with {other}")


def check(given: Mapping[str, Any]) -> Request:
    """The request of a command line.

    Args:
        given: values by option; an option that was not given is absent.

    Raises:
        UserError: options contradict each other, or one has a value that it cannot have.
    """
    for name in ("dataset", "extractor"):
        if name not in given:
            raise UserError(f"--{name} is missing (see --help)")
    dataset, extractor = given["dataset"], given["extractor"]
    require_known("--dataset", dataset)
    options: dict[str, Any] = {"pretrain": PRETRAIN[dataset], "data_root": default_root()}
    if extractor.startswith(TORCHVISION):
        torchvision_model(extractor.removeprefix(TORCHVISION))
        exclude(given, (*TRAINING, "weights"), f"--extractor {extractor}")
        options["batch_size"] = TORCHVISION_BATCH
    elif extractor != "convmixer":
        raise UserError(f"--extractor {extractor} is unknown; use convmixer or torchvision:<model>")
    if "weights" in given:
        exclude(given, TRAINING, "--weights")
    if "pretrain_folder" in given:
        exclude(given, ["pretrain"], "--pretrain-folder")
    options |= given
    device = choose_device(options.pop("device", None))
    names = [field.name for field in fields(Settings) if field.name in options]
    settings = Settings(**{name: options.pop(name) for name in names})
    return Request(device=device, settings=settings, **options)


def check_out(out: Path) -> None:
    """UserError where --out cannot be written."""
    if out.suffix != ".npz":
        raise UserError(f"--out {out} must end in .npz")
    check_file(out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it")
    try:
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(
            f"--out {out}: {out.parent} cannot be written to ({error.strerror}); use another"
        ) from error


def write_features(out: Path, features: Dataset, origin: Mapping[str, Any]) -> str:
    """Writes the file that ssd.data.load("features", ..) reads.

    Args:
        out: the file.
        features: the data set, its images replaced by features.
        origin: how they were made; JSON-able.

    Returns:
        What was written, in words.
    """
    arrays = {
        name: getattr(features, name).numpy() for name in ("x_train", "y_train", "x_test", "y_test")
    }
    text = np.array(dumps(origin))
    write_atomically(
        out, lambda stream: np.savez(stream, allow_pickle=False, origin=text, **arrays)
    )
    counts = f"{len(features.y_train)} + {len(features.y_test)} samples"
    return f"{counts} of {features.x_train.shape[1]} features -> {out}"


def convert(source: Path, out: Path) -> str:
    """Converts the feature files of the SDMLP repository; returns what was done, in words.

    Raises:
        UserError: the source is damaged or of another layout, or `out` exists.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; use another")
    with in_words({"--features": "--convert"}):
        loaded = data.load("features", default_root(), source)
    origin = {"converted": source.name, "data_crc32": loaded.checksum()}
    return f"converted {source}: {write_features(out, loaded, origin)}"


@dataclass(frozen=True)
class Session:
    """One invocation: builds the extractor, embeds and writes, or resumes that."""

    request: Request
    data: Dataset
    display: Display
    stopped: Callable[[], bool]  # whether to stop at the next step

    def run(self) -> str:
        """Runs the request; returns what was done, in words.

        Raises:
            UserError: data, weights or checkpoints do not fit.
            Interrupted: the work was stopped.
        """
        request, images = self.request, self.data
        origin, make = self._prepare()
        if request.out.is_file():
            self._check_finished(origin)
            request.partial.unlink(missing_ok=True)  # of a process killed at its very end
            return f"{request.out} is finished already"
        extractor = make()
        refuse_channels(request.dataset, extractor.channels, f"--extractor {request.extractor}")
        origin["weights_crc32"] = extractor.crc32
        x = torch.cat([images.x_train, images.x_test])
        found = self._embed(extractor, pixels(x, SHAPES[request.dataset]), origin)
        x_train, x_test = found.split([len(images.y_train), len(images.y_test)])
        features = replace(images, x_train=x_train, x_test=x_test)
        line = write_features(request.out, features, origin)
        request.partial.unlink(missing_ok=True)
        return f"{request.dataset} by {request.extractor}: {line}"

    def _prepare(self) -> tuple[dict[str, Any], Callable[[], Extractor]]:
        """What the features will depend on, and a function that builds the extractor."""
        request, device = self.request, self.request.device
        origin: dict[str, Any] = {
            "dataset": request.dataset,
            "data_crc32": self.data.checksum(),
            "extractor": request.extractor,
            "batch_size": request.settings.batch_size,
            "device": device.type,
            "algorithm": ALGORITHM,
        }
        if request.extractor.startswith(TORCHVISION):
            name = request.extractor.removeprefix(TORCHVISION)
            origin["weights"] = str(torchvision_model(name))
            return origin, lambda: load_torchvision(name, device, self.display.visible)
        if request.weights is not None:
            model, origin["pretraining"] = load_weights(request.weights, device)
            source = f"--weights {request.weights}"
            refuse_same(request.dataset, origin["pretraining"]["data"], source)
            extractor = freeze(model, model.embed, len(model.mean), device)
            origin["weights_crc32"] = extractor.crc32
            return origin, lambda: extractor
        if request.pretrain_folder is not None:
            images = load_folder(request.pretrain_folder, self.display.update)
        else:
            images = load_images(request.pretrain, request.data_root)
        origin["pretraining"] = describe(images, request.settings)

        def pretrain() -> Extractor:
            trainer = Pretrainer(images, request.settings, device, request.pretraining)
            trainer.restore()
            model = trainer.run(request.checkpoint_every, self.display.update, self.stopped)
            return freeze(model, model.embed, len(model.mean), device)

        return origin, pretrain

    def _check_finished(self, origin: Mapping[str, Any]) -> None:
        """UserError unless the finished file is that of this request."""
        out = self.request.out
        try:
            with np.load(out, allow_pickle=False) as archive:
                before = dict(json.loads(str(archive["origin"])))
        except Exception as error:
            raise UserError(f"--out {out} was not written by this command; use another") from error
        if changed := difference(before, origin):
            raise UserError(f"--out {out} is of another command ({changed}); use another")

    def _embed(self, extractor: Extractor, images: Tensor, origin: Mapping[str, Any]) -> Tensor:
        """Features [N, F] of images [N, channels, H, W]; resumes from the partial file."""
        request, size = self.request, self.request.settings.batch_size
        parts: list[Tensor] = []
        if request.partial.is_file():
            tensors, state = read(request.partial, torch.device("cpu"))
            if changed := difference(state, origin):
                raise UserError(
                    f"{request.partial} is of another command ({changed}); use another --out"
                )
            parts.append(tensors["features"])
        saved = time.perf_counter()
        for first in range(sum(map(len, parts)), len(images), size):
            batch = images[first : first + size].to(request.device)
            features = extractor.function(batch).cpu()
            if not finite(features):
                raise UserError(
                    f"--extractor {request.extractor} gives features that are not finite"
                )
            parts.append(features)
            done = first + len(batch)
            self.display.update(f"embedding {request.dataset}", done, len(images))
            stop = self.stopped() and done < len(images)
            if stop or time.perf_counter() - saved > request.checkpoint_every:
                parts = [torch.cat(parts)]
                save_checkpoint(request.partial, {"features": parts[0]}, origin)
                saved = time.perf_counter()
            if stop:
                raise Interrupted
        return torch.cat(parts)
