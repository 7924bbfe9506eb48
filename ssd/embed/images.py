"""Data sets as images: their shapes, and what an extractor is pretrained on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ssd import data
from ssd.errors import UserError, one_line

# [channels, height, width], and the data set to pretrain on: another one of the same shape.
SHAPES = {name: source.shape for name, source in data.SOURCES.items() if source.shape}
PRETRAIN = {name: data.SOURCES[name].pretrain for name in SHAPES}
FOLDER_SHAPE = (3, 32, 32)
FOLDER_CHUNK = 4096  # images read at a time


@dataclass(frozen=True)
class Images:
    """The training images of a data set, with labels."""

    name: str
    pixels: Tensor  # [N, channels, H, W] uint8
    labels: Tensor  # [N] int64 in 0..C-1
    flip: bool  # whether a mirrored image shows the same class

    @cached_property
    def crc32(self) -> str:
        """Of pixels and labels."""
        crc = zlib.crc32(self.pixels.numpy().data)
        return f"{zlib.crc32(self.labels.numpy().data, crc):08x}"


def pixels(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [N, channels, H, W], uint8, of the rows [N, d] of a data set, in 0..1."""
    return x.mul(255).round().to(torch.uint8).view(-1, *shape)


def load_images(name: str, root: Path) -> Images:
    """The training images of a data set."""
    loaded = data.load(name, root, strict=True)
    flip = data.SOURCES[name].mirrored
    return Images(name, pixels(loaded.x_train, SHAPES[name]), loaded.y_train, flip)


def load_folder(path: Path, watch: Callable[[str, int, int], None]) -> Images:
    """All images of an ImageFolder, scaled to 32 x 32; watch takes text, images done, all.

    Raises:
        UserError: a folder without images, or an image that cannot be read.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor, resize

    try:
        folder = ImageFolder(str(path))
    except OSError as error:
        raise UserError(f"--pretrain-folder {path}: {one_line(error)}") from error

    def read_image(file: str) -> Tensor:
        try:
            return pil_to_tensor(resize(folder.loader(file), list(FOLDER_SHAPE[1:])))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"--pretrain-folder: {file} cannot be read; remove it") from error

    files = [file for file, _ in folder.samples]
    images = torch.empty(len(files), *FOLDER_SHAPE, dtype=torch.uint8, device="cpu")
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), FOLDER_CHUNK):
            chunk = list(pool.map(read_image, files[first : first + FOLDER_CHUNK]))
            images[first : first + len(chunk)] = torch.stack(chunk)
            watch(f"reading {path}", first + len(chunk), len(files))
    labels = torch.tensor(folder.targets, device="cpu")
    return Images(f"folder {path.resolve().name}", images, labels, flip=True)


def require_known(option: str, dataset: str) -> None:
    """UserError unless this is a data set of images."""
    if dataset not in SHAPES:
        raise UserError(f"{option} {dataset} is unknown; choose from {', '.join(SHAPES)}")


def refuse_same(dataset: str, pretrain: str, source: str) -> None:
    """UserError where an extractor would have seen the labels of what it embeds."""
    own = data.SOURCES[dataset]
    other = data.SOURCES.get(pretrain, own)
    if dataset in (pretrain, other.subset) or pretrain == own.subset:
        raise UserError(
            f"{source}: an extractor must not have seen the labels of what it embeds; "
            f"use {PRETRAIN[dataset]}"
        )


def refuse_channels(dataset: str, channels: int, source: str) -> None:
    """UserError where an extractor for grey images would embed coloured ones."""
    if SHAPES[dataset][0] > channels:
        raise UserError(
            f"{source} has images of {channels} channel, {dataset} of {SHAPES[dataset][0]}; "
            f"use {PRETRAIN[dataset]}"
        )
