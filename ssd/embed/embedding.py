"""Builds an extractor, embeds a data set, writes the features; resumable."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd import data
from ssd.cli import check_file, choose_device, in_words
from ssd.data import Dataset, default_root
from ssd.embed.convmixer import ALGORITHM, Settings, read
from ssd.embed.extractors import EXTRACTORS, TRAINING, Extractor, find
from ssd.embed.images import PRETRAIN, SHAPES, pixels, refuse_channels, require_known
from ssd.embed.request import Request, Work
from ssd.errors import Interrupted, UserError
from ssd.metrics import finite
from ssd.storage.checkpoint import save_checkpoint
from ssd.storage.files import difference, dumps, write_atomically


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
    row, _ = find(extractor)
    options: dict[str, Any] = {
        "pretrain": PRETRAIN[dataset],
        "data_root": default_root(),
        "batch_size": row.batch_size,
    }
    others = [name for other in EXTRACTORS.values() for name in other.options]
    foreign = [name for name in others if name not in row.options]
    exclude(given, foreign, f"--extractor {extractor}")
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


def run(work: Work) -> str:
    """Builds the extractor, embeds and writes, or resumes that; returns what was done, in words.

    Raises:
        UserError: extractor, data, weights or checkpoints do not fit.
        Interrupted: the work was stopped.
    """
    request = work.request
    row, model = find(request.extractor)
    described, build = row.prepare(model, work)
    images = data.load(request.dataset, request.data_root, strict=True)
    origin = {
        "dataset": request.dataset,
        "data_crc32": images.checksum(),
        "extractor": request.extractor,
        "batch_size": request.settings.batch_size,
        "device": request.device.type,
        "algorithm": ALGORITHM,
        **described,
    }
    if request.out.is_file():
        _check_finished(request.out, origin)
        request.partial.unlink(missing_ok=True)  # of a process killed at its very end
        return f"{request.out} is finished already"
    extractor = build()
    refuse_channels(request.dataset, extractor.channels, f"--extractor {request.extractor}")
    origin["weights_crc32"] = extractor.crc32
    x = torch.cat([images.x_train, images.x_test])
    found = _embed(extractor, pixels(x, SHAPES[request.dataset]), origin, work)
    x_train, x_test = found.split([len(images.y_train), len(images.y_test)])
    features = replace(images, x_train=x_train, x_test=x_test)
    line = write_features(request.out, features, origin)
    request.partial.unlink(missing_ok=True)
    return f"{request.dataset} by {request.extractor}: {line}"


def _check_finished(out: Path, origin: Mapping[str, Any]) -> None:
    """UserError unless the finished file is that of this request."""
    try:
        with np.load(out, allow_pickle=False) as archive:
            before = dict(json.loads(str(archive["origin"])))
    except Exception as error:
        raise UserError(f"--out {out} was not written by this command; use another") from error
    if changed := difference(before, origin):
        raise UserError(f"--out {out} is of another command ({changed}); use another")


def _embed(extractor: Extractor, images: Tensor, origin: Mapping[str, Any], work: Work) -> Tensor:
    """Features [N, F] of images [N, channels, H, W]; resumes from the partial file."""
    request, size = work.request, work.request.settings.batch_size
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
        if features.ndim != 2:
            shape = list(features.shape)
            raise UserError(f"--extractor {request.extractor} gives {shape}, not [B, F]")
        if not finite(features):
            raise UserError(f"--extractor {request.extractor} gives features that are not finite")
        parts.append(features)
        done = first + len(batch)
        work.display.update(f"embedding {request.dataset}", done, len(images))
        stop = work.stopped() and done < len(images)
        if stop or time.perf_counter() - saved > request.checkpoint_every:
            parts = [torch.cat(parts)]
            save_checkpoint(request.partial, {"features": parts[0]}, origin)
            saved = time.perf_counter()
        if stop:
            raise Interrupted
    return torch.cat(parts)
