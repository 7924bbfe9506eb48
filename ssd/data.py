"""Data sets, class-incremental streams of tasks made of them, and the order of samples.

SOURCES lists the data sets. A new one is a function that returns four arrays, and a row there.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.errors import UserError, one_line
from ssd_kernels.reference import power_of_two

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer
# The user is told if more than this share of the rows or columns carries no information.
DEAD_SHARE = 0.5
# Rows are almost parallel if the cosine of two of them is above this in the mean.
PARALLEL = 0.9
SHOWN = 2_000  # at most so many rows, evenly spaced, are compared for it
# A column that spans fewer float32 steps than this has lost its values to rounding.
STEPS = 256
FOLDER_FILES = ("all_data_train.pt", "all_data_test.pt")  # as the SDMLP repository names them
MNIST_5K = Path(__file__).with_name("mnist_5k.npz")  # mnist_5k.txt: its source and licence
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Dataset:
    """A classification data set in memory."""

    name: str
    x_train: Tensor  # [N, d] float32; pixels in 0..1
    y_train: Tensor  # [N] int64 in 0..C-1
    x_test: Tensor
    y_test: Tensor

    @property
    def classes(self) -> int:
        return int(self.y_train.max()) + 1

    def checksum(self) -> str:
        """CRC-32 of all data: a run must resume on the data it began with."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        crc = 0
        for name in ARRAYS:
            tensor = getattr(self, name)
            crc = zlib.crc32(str(list(tensor.shape)).encode(), crc)
            crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
        return f"{crc:08x}"


@dataclass(frozen=True)
class Task:
    """One task of a stream: some classes of a data set, with the data set's labels."""

    classes: tuple[int, ...]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: torch.device) -> Task:
        return replace(self, **{name: getattr(self, name).to(device) for name in ARRAYS})


def class_order(classes: int, seed: int) -> list[int]:
    """The order in which classes come: ascending for seed 0, else a permutation drawn from it."""
    if seed == 0:
        return list(range(classes))
    draw = torch.Generator().manual_seed(seed)
    return torch.randperm(classes, generator=draw, device="cpu").tolist()


def split(data: Dataset, tasks: int, order: list[int]) -> list[Task]:
    """Cuts a data set into tasks with equally many classes, taken in this order.

    Raises:
        UserError: `tasks` does not divide the number of classes, or a label is not in `order`.
    """
    if tasks < 1 or len(order) % tasks:
        fits = [t for t in range(1, len(order) + 1) if len(order) % t == 0]
        raise UserError(
            f"--tasks {tasks} does not divide the {len(order)} classes of {data.name}; "
            f"use one of {', '.join(map(str, fits))}"
        )
    for part, y in (("train", data.y_train), ("test", data.y_test)):
        strange = set(y.unique().tolist()) - set(order)
        if strange:
            raise UserError(
                f"{data.name}: y_{part} holds the label {min(strange)}, which is none of the "
                f"{len(order)} classes; remove its samples"
            )
    size = len(order) // tasks
    stream = []
    for first in range(0, len(order), size):
        classes = order[first : first + size]
        train = torch.isin(data.y_train, data.y_train.new_tensor(classes))
        test = torch.isin(data.y_test, data.y_test.new_tensor(classes))
        arrays = data.x_train[train], data.y_train[train], data.x_test[test], data.y_test[test]
        stream.append(Task(tuple(classes), *arrays))
    return stream


def cumulated(tasks: Sequence[Task]) -> list[Task]:
    """The stream with each task's training data joined to those of all tasks before it."""

    def joined(name: str, last: int) -> Tensor:
        return torch.cat([getattr(task, name) for task in tasks[: last + 1]])

    return [
        replace(task, x_train=joined("x_train", number), y_train=joined("y_train", number))
        for number, task in enumerate(tasks)
    ]


def hold_out(data: Dataset, share: float) -> Dataset:
    """The last `share` of each class's training data replaces the test set, which stays unseen."""
    held = torch.zeros_like(data.y_train, dtype=torch.bool)
    for label in range(data.classes):
        members = (data.y_train == label).nonzero().squeeze(1)
        count = round(share * len(members))
        if not 0 < count < len(members):
            raise UserError(
                f"--validation {share} leaves class {label} of {data.name} "
                f"({len(members)} samples) without training or validation data"
            )
        held[members[-count:]] = True
    arrays = data.x_train[~held], data.y_train[~held], data.x_train[held], data.y_train[held]
    return Dataset(data.name, *arrays)


# splitmix64 (Steele et al. 2014): increment and multipliers.
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def shuffled(count: int, *key: int, device: torch.device | str = "cpu") -> Tensor:
    """A permutation of 0..count-1 that depends on the key alone, [count] int64.

    It sorts the 64-bit numbers that splitmix64 gives counters 0..count-1 of the stream `key`.
    There is no state, so any epoch's order can be drawn at any time.
    """
    stream = 0
    for part in key:
        stream = _mix(stream + INCREMENT + part)
    counters = torch.arange(count, device=device)
    keys = _mix_tensor(counters * _signed(INCREMENT) + _signed(stream))
    return keys.sort(stable=True).indices


def _mix(z: int) -> int:
    z %= 2**64
    z = (z ^ z >> 30) * FIRST % 2**64
    z = (z ^ z >> 27) * SECOND % 2**64
    return z ^ z >> 31


def _mix_tensor(z: Tensor) -> Tensor:
    # int64 wraps around; its right shift keeps the sign, which the masks cut off.
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(FIRST)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(SECOND)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


Arrays = Sequence[Any]  # x_train, y_train, x_test, y_test, as a data set's files hold them


class Unavailable(Exception):
    """A file is not on disk and cannot be downloaded."""


def _damaged(
    path: Path, how: str, remedy: str = "delete it to have it downloaded again"
) -> UserError:
    return UserError(f"{path} is damaged ({how}); {remedy}")


@contextmanager
def downloading() -> Iterator[None]:
    """Turns the errors of a download into Unavailable; a silent server ends it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise Unavailable(one_line(error)) from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _downloading_to(root: Path) -> Iterator[None]:
    with downloading(), redirect_stdout(StringIO()):
        root.mkdir(parents=True, exist_ok=True)
        yield


def _mnist_like(kind: str, root: Path) -> Arrays:
    from torchvision import datasets

    reader = getattr(datasets, kind)
    raw = root / kind / "raw"
    if not all((raw / Path(file).stem).is_file() for file, _ in reader.resources):
        with _downloading_to(root):
            reader(str(root), download=True)
    try:
        sets = [reader(str(root), train=train) for train in (True, False)]
        sizes = [(*s.data.shape, len(s.targets)) for s in sets]
    except Exception as error:
        raise _damaged(raw, one_line(error)) from error
    if sizes != [(60000, 28, 28, 60000), (10000, 28, 28, 10000)]:
        raise _damaged(raw, f"images and labels {sizes}")
    x_train, x_test = (s.data.flatten(1).float() / 255 for s in sets)
    return x_train, sets[0].targets, x_test, sets[1].targets


def _mnist_5k(_: Path) -> Arrays:
    """The bundled subset; the last 100 of each class's 500 images are for testing."""
    try:
        with np.load(MNIST_5K, allow_pickle=False) as archive:
            images, labels = archive["x"], archive["y"]
    except Exception as error:
        raise _damaged(MNIST_5K, one_line(error), "install ssd-kernels again") from error
    x = torch.tensor(images, dtype=torch.float32, device="cpu") / 255
    y = torch.tensor(labels, device="cpu").long()
    parts = hold_out(Dataset("mnist-5k", x, y, x, y), 0.2)
    return [getattr(parts, name) for name in ARRAYS]


def _cifar(kind: str, root: Path) -> Arrays:
    """Reads CIFAR's files, which are pickles, without running code that a pickle names."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive

    reader = getattr(datasets, kind)
    folder, files = root / reader.base_folder, [*reader.train_list, *reader.test_list]
    if not all((folder / file).is_file() for file, _ in files):
        with _downloading_to(root):
            download_and_extract_archive(
                reader.url, str(root), filename=reader.filename, md5=reader.tgz_md5
            )
    parts = [_cifar_part(folder / file, md5) for file, md5 in files]
    pixels = [torch.tensor(x, dtype=torch.float32, device="cpu") / 255 for x, _ in parts]
    labels = [torch.tensor(y, device="cpu") for _, y in parts]
    count = len(reader.train_list)
    x_train, x_test = torch.cat(pixels[:count]), torch.cat(pixels[count:])
    return x_train, torch.cat(labels[:count]), x_test, torch.cat(labels[count:])


def _cifar_part(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3072] and labels [N] of one of CIFAR's files."""
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(str(path), md5):
        raise _damaged(path, "wrong MD5")
    try:
        with open(path, "rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
        labels = content["labels"] if "labels" in content else content["fine_labels"]
        return np.asarray(content["data"]), np.asarray(labels, dtype=np.int64)
    except Exception as error:
        raise _damaged(path, one_line(error)) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _features(path: Path) -> Arrays:
    if path.is_dir():
        files = [path / file for file in FOLDER_FILES]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"--features {path} is a folder without {' and '.join(missing)}")
        return [array for file in files for array in _pair(_load_pt(file), file, "(x, y)")]
    if not path.is_file():
        raise UserError(f"--features {path} is not a file")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise UserError(f"--features {path} lacks {', '.join(missing)}")
            return [archive[name] for name in ARRAYS]
    if path.suffix == ".pt":
        expected = "((x_train, y_train), (x_test, y_test))"
        pairs = _pair(_load_pt(path), path, expected)
        return [array for pair in pairs for array in _pair(pair, path, expected)]
    raise UserError(f"--features {path} must end in .npz or .pt")


def _pair(content: Any, path: Path, expected: str) -> Sequence[Any]:
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise UserError(f"--features {path} must hold {expected}")
    return content


def _load_pt(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch.load goes on to refuse
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message tells how to run the file's code.
        raise UserError(f"--features {path} holds something other than tensors") from error


@dataclass(frozen=True)
class Source:
    """How a data set is read, and what it needs beside that.

    Args:
        read: the folder of data sets (or the file of --features) -> x_train [N, ..], y_train [N],
            x_test, y_test, as arrays or tensors; labels are integers in 0..C-1, pixels in 0..1.
        tasks: into how many tasks its classes are split, unless a run says otherwise.
        shape: [channels, height, width] of its images; None if it has none.
        pretrain: the data set of the same shape that ssd.embed trains an extractor on.
        subset: the data set, part of this one, that serves if this can be neither read nor
            downloaded.
        mirrored: whether a mirrored image shows the same class.
    """

    read: Callable[[Path], Arrays]
    tasks: int = 5
    shape: tuple[int, int, int] | None = None
    pretrain: str = ""
    subset: str = ""
    mirrored: bool = True


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)
SOURCES = {
    "mnist": Source(
        partial(_mnist_like, "MNIST"), 5, _GREY, "fashion-mnist", "mnist-5k", mirrored=False
    ),
    "fashion-mnist": Source(partial(_mnist_like, "FashionMNIST"), 5, _GREY, "mnist"),
    "mnist-5k": Source(_mnist_5k, 5, _GREY, "fashion-mnist", mirrored=False),
    "cifar10": Source(partial(_cifar, "CIFAR10"), 5, _COLOUR, "cifar100"),
    "cifar100": Source(partial(_cifar, "CIFAR100"), 50, _COLOUR, "cifar10"),
    "features": Source(_features),
}


def _say(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def load(
    name: str,
    root: Path,
    features: Path | None = None,
    strict: bool = False,
    notice: Callable[[str], None] = _say,
) -> Dataset:
    """Reads a data set, from disk or by downloading it there.

    Args:
        name: one of SOURCES.
        root: folder of the data sets, in torchvision's layout.
        features: the file of the data set "features", or a folder with the files of FOLDER_FILES.
        strict: MNIST that cannot be had is an error; otherwise its 5,000-image subset serves.
        notice: takes the line that says so, and one line per doubt about the data.

    Raises:
        UserError: the data set cannot be had, is damaged, or is no classification data set.
    """
    if (name == "features") != (features is not None):
        raise UserError("--dataset features and --features FILE go together")
    source = SOURCES[name]
    try:
        arrays = [to_tensor(array) for array in source.read(features or root)]
        data = _dataset(name, str(features or name), *arrays)
    except Unavailable as reason:
        missing = f"neither in {root} nor to be downloaded"
        if strict or not source.subset:
            raise UserError(
                f"{name} is {missing} ({reason}); put it there or name its folder with --data-root"
            ) from reason
        notice(f"{name.upper()} is {missing}: training on {source.subset}, the 5,000-image subset")
        return load(source.subset, root, notice=notice)
    except Exception as error:
        if features is None or isinstance(error, UserError):
            raise
        raise UserError(f"--features {features} cannot be read: {one_line(error)}") from error
    for line in _notes(data, arrays[0].flatten(1)):
        notice(line)
    return data


def from_arrays(
    x_train: Any,
    y_train: Any,
    x_test: Any,
    y_test: Any,
    *,
    notice: Callable[[str], None] = _say,
) -> Dataset:
    """The data set "features" of arrays in memory.

    Args:
        x_train: [N, ..] real numbers, numpy or torch; y_train: [N] integers in 0..C-1.
        x_test, y_test: alike.
        notice: takes one line per doubt about the data.

    Raises:
        UserError: they are no classification data set.
    """
    arrays = [to_tensor(array) for array in (x_train, y_train, x_test, y_test)]
    data = _dataset("features", "data", *arrays)
    for line in _notes(data, arrays[0].flatten(1)):
        notice(line)
    return data


def default_root() -> Path:
    """SSD_DATA, or ./data."""
    return Path(os.environ.get("SSD_DATA") or "data")


def to_tensor(array: Any) -> Tensor:
    """What torch can read, without gradient; numpy arrays of any byte order."""
    if isinstance(array, np.ndarray):  # torch takes this machine's byte order alone
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return (array if isinstance(array, Tensor) else torch.as_tensor(array, device="cpu")).detach()


def _dataset(
    name: str, where: str, x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor
) -> Dataset:
    """The data set of four arrays; UserError unless training and evaluation can use them."""
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        for letter, array in (("x", x), ("y", y)):
            strided = array.layout == torch.strided and array.device.type == "cpu"
            if not strided or array.is_quantized or array.is_nested:
                kind = f"{array.layout} on {array.device}, {array.dtype}"
                raise UserError(f"{where}: {letter}_{part} must be a dense tensor, not {kind}")
        if y.is_floating_point() or y.is_complex() or y.dim() != 1:
            raise UserError(
                f"{where}: y_{part} must be integers [N], not {y.dtype} {list(y.shape)}"
            )
        if x.is_complex() or x.dim() < 2 or len(x) != len(y) or x.numel() == 0:
            raise UserError(
                f"{where}: x_{part} must be real numbers [N, d], d > 0, with N = {len(y)} > 0, "
                f"not {x.dtype} {list(x.shape)}"
            )
    if x_train.shape[1:] != x_test.shape[1:]:
        samples = [list(x.shape[1:]) for x in (x_train, x_test)]
        raise UserError(f"{where}: samples are {samples[0]} in x_train, {samples[1]} in x_test")
    x_train = _narrowed(x_train.flatten(1), "x_train", where)
    x_test = _narrowed(x_test.flatten(1), "x_test", where)
    data = Dataset(name, x_train, y_train.long(), x_test, y_test.long())
    _check(data)
    return data


def _narrowed(x: Tensor, name: str, where: str) -> Tensor:
    """Features as float32; UserError if a row would become infinite or all zero."""
    if x.dtype != torch.float64:
        return x.float()
    limits, peaks = torch.finfo(torch.float32), x.abs().amax(1)
    over = int(((peaks > limits.max) & peaks.isfinite()).sum())
    under = int(((peaks < limits.tiny) & (peaks > 0)).sum())
    if over or under:
        outside = f"above {limits.max:.1e}" if over else f"below {limits.tiny:.1e}"
        largest = peaks[peaks.isfinite()].max().item()
        also = "" if over else ", or set rows as small as these to 0"
        raise UserError(
            f"{where}: {over or under} rows of {name} lie {outside}, out of float32's range (the "
            f"largest entry of all is {largest:.1e}); scale all features to about 1{also}"
        )
    return x.float()


def _check(data: Dataset) -> None:
    """UserError unless the features are finite and the labels run from 0 without a gap."""
    for part, x, y in (("train", data.x_train, data.y_train), ("test", data.x_test, data.y_test)):
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).any(1).sum())
            raise UserError(
                f"{data.name}: {bad} rows of x_{part} hold NaN or infinity; remove them"
            )
        if int(y.min()) < 0:
            raise UserError(f"{data.name}: y_{part} holds the label {int(y.min())}; use 0..C-1")
    present = data.y_train.unique()
    if len(present) != data.classes:
        gap = int((present != torch.arange(len(present), device=present.device)).nonzero()[0])
        raise UserError(
            f"{data.name}: labels run to {data.classes - 1} but no training sample has the label "
            f"{gap}; number the classes 0..C-1"
        )
    strange = set(data.y_test.unique().tolist()) ^ set(present.tolist())
    if strange:
        raise UserError(
            f"{data.name}: the label {min(strange)} is in only one of y_train and y_test"
        )


def _notes(data: Dataset, x_read: Tensor) -> list[str]:
    """What the user should know of usable data, one line each; x_read [N, d]: x_train as read."""
    found = []
    columns, blurred = data.x_train.shape[1], _blurred(x_read, data.x_train)
    if blurred > DEAD_SHARE * columns:
        found.append(
            f"{blurred:,} of the {columns:,} columns of x_train vary by less than {STEPS} steps of "
            "float32, which training takes: subtract the mean of each column first"
        )
    for part, x in (("train", data.x_train), ("test", data.x_test)):
        dark = int((x.amax(1) <= 0).sum())
        if dark > DEAD_SHARE * len(x):
            found.append(
                f"{dark:,} of the {len(x):,} rows of x_{part} have no entry above 0: "
                "SDMLP takes the positive part, which is all zero there"
            )
    least, most = data.x_train.aminmax(dim=0)
    constant = int((least == most).sum())
    if constant > DEAD_SHARE * columns:
        found.append(
            f"{constant:,} of the {columns:,} columns of x_train are constant: they tell no "
            "class from another"
        )
    alike = mean_cosine(data.x_train)
    if alike > PARALLEL:
        found.append(
            f"the rows of x_train are almost parallel (mean cosine {alike:.2f}): SDMLP can tell "
            "them apart only with their mean subtracted (ssd train --center)"
        )
    return found


def mean_cosine(x: Tensor) -> float:
    """The mean cosine of all pairs of rows of relu(x), x [N, d], on up to SHOWN rows."""
    rows = x[:: -(-len(x) // SHOWN)].relu()
    directions = F.normalize(rows / power_of_two(rows.amax()), dim=1)
    # The squared length of the mean direction.
    return directions.mean(0).square().sum().item()


def _blurred(x: Tensor, narrow: Tensor) -> int:
    """Columns of x [N, d] that float32, narrow [N, d], cannot tell well from constant ones."""
    if x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return 0
    wide = x.double()
    least, most = wide.aminmax(dim=0)
    step = torch.maximum(least.abs(), most.abs()) * torch.finfo(torch.float32).eps
    coarse = (most > least) & (most - least < STEPS * step)
    return int((coarse & (narrow != wide).any(0)).sum())
