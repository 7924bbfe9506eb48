"""python -m ssd.embed: features of images by a frozen extractor, for ssd.train --features.

The extractor `convmixer` is pretrained here, on another data set than the one it embeds, so that it
has never seen a label of that: CIFAR-10 is embedded by a network pretrained on CIFAR-100, CIFAR-100
by one pretrained on CIFAR-10, MNIST and Fashion-MNIST likewise. The paper pretrains on ImageNet32,
which may not be redistributed; those who have it name its folder with --pretrain-folder. The
extractors `torchvision:<model>` are torchvision's classifiers with their default weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ssd import data
from ssd.cli import (
    ArgumentParser,
    check_file,
    choose_device,
    command_line,
    exit_status,
    in_words,
    resumable,
    stop_on_interrupt,
)
from ssd.data import Dataset, default_root
from ssd.embed.convmixer import ALGORITHM, Pretrainer, Settings, describe, load_weights, read
from ssd.embed.extractors import TORCHVISION, Extractor, freeze, load_torchvision, torchvision_model
from ssd.embed.images import (
    PRETRAIN,
    SHAPES,
    Images,
    load_folder,
    load_images,
    pixels,
    refuse_channels,
    refuse_same,
)
from ssd.errors import Interrupted, UserError, is_out_of_memory
from ssd.metrics import finite
from ssd.progress import Display
from ssd.storage.checkpoint import save_checkpoint
from ssd.storage.files import difference, dumps, write_atomically
from ssd.storage.lock import file_lock

TORCHVISION_BATCH = 64

# Options that choose how an extractor is made.
TRAINING = ("pretrain", "pretrain_folder", "epochs", "lr", "seed")
CONVERTING = ("convert", "out", "quiet")


def build_parser() -> ArgumentParser:
    """The command line; an option that is not given is absent from the result."""
    parser = ArgumentParser(
        prog="python -m ssd.embed",
        usage="%(prog)s --dataset NAME --extractor NAME --out FILE.npz [options]\n"
        "       %(prog)s --convert PATH --out FILE.npz",
        description="Write the features of a data set's images, by a frozen extractor, to the file "
        "that python -m ssd.train --features reads.",
        epilog="The extractor convmixer is pretrained by this command on a data set other than the "
        "one it embeds (default: CIFAR-100 for CIFAR-10 and the reverse, Fashion-MNIST for MNIST "
        "and the reverse), so that it has seen none of the labels to be learned. The paper "
        "pretrains on ImageNet32: --pretrain-folder, if you have it. Its weights stay next to "
        "FILE.npz, as FILE.convmixer.safetensors.",
        argument_default=argparse.SUPPRESS,
    )
    defaults = {field.name: field.default for field in fields(Settings)}
    add = parser.add_argument
    add("--dataset", metavar="NAME", help=", ".join(SHAPES))
    add("--extractor", metavar="NAME", help="convmixer or torchvision:<model>, as resnet18")
    add("--convert", metavar="PATH", type=Path,
        help="instead: a .pt of ((x_train, y_train), (x_test, y_test)), or a folder with the "
        "SDMLP repository's all_data_train.pt and all_data_test.pt")  # fmt: skip
    add("--out", metavar="FILE", type=Path, help="the .npz to write")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add("--data-root", metavar="DIR", type=Path, help="data sets (default $SSD_DATA or data)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, .. (default cuda if there is one)")
    add("--batch-size", metavar="N", type=int,
        help=f"images (default {defaults['batch_size']}; torchvision {TORCHVISION_BATCH})"
    )  # fmt: skip
    add("--checkpoint-every", metavar="X", type=float, help="seconds (default 30)")
    add("--quiet", action="store_true", help="print the last line alone")
    add = parser.add_argument_group("convmixer").add_argument
    add("--pretrain", metavar="NAME", help="data set to pretrain on (default: see below)")
    add("--pretrain-folder", metavar="DIR", type=Path,
        help="pretrain on a folder of a folder of images a class, scaled to 32 x 32")  # fmt: skip
    add("--weights", metavar="FILE", type=Path, help="pretrain nothing, use a .safetensors")
    add("--epochs", metavar="N", type=int, help=f"(default {defaults['epochs']})")
    add("--lr", metavar="X", type=float, help=f"peak (default {defaults['lr']})")
    add("--seed", metavar="N", type=int, help=f"(default {defaults['seed']})")
    return parser


@dataclass(frozen=True)
class Request:
    """What a command line asks for, checked as far as is possible without reading data."""

    dataset: str
    extractor: str
    out: Path
    root: Path
    device: torch.device
    settings: Settings
    pretrain: str
    folder: Path | None
    weights: Path | None
    resume: bool
    every: float

    @property
    def pretraining(self) -> Path:
        """The checkpoint, and in the end the weights, of the extractor that is trained here."""
        return self.out.with_suffix(".convmixer.safetensors")

    @property
    def partial(self) -> Path:
        """The features of the images that are done."""
        return self.out.with_suffix(".partial.safetensors")

    @property
    def trains(self) -> bool:
        return self.extractor == "convmixer" and self.weights is None


def check(given: dict[str, Any]) -> Request:
    """The request of a command line.

    Raises:
        UserError: it contradicts itself, or names what does not exist.
    """
    for name in ("dataset", "extractor"):
        if name not in given:
            raise UserError(f"--{name} is missing (see --help)")
    dataset, extractor = given["dataset"], given["extractor"]
    if dataset not in SHAPES:
        raise UserError(f"--dataset {dataset} is unknown; choose from {', '.join(SHAPES)}")
    if extractor.startswith(TORCHVISION):
        torchvision_model(extractor.removeprefix(TORCHVISION))
        foreign = [name for name in (*TRAINING, "weights") if name in given]
        given = {"batch_size": TORCHVISION_BATCH, **given}
    elif extractor == "convmixer":
        foreign = [name for name in TRAINING if name in given and "weights" in given]
    else:
        raise UserError(f"--extractor {extractor} is unknown; use convmixer or torchvision:<model>")
    if foreign:
        other = "--weights" if extractor == "convmixer" else f"--extractor {extractor}"
        raise UserError(f"--{foreign[0].replace('_', '-')} does not go with {other}")
    names = {field.name for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if name in names})
    every = given.get("checkpoint_every", 30.0)
    for option, value, holds, rule in (
        ("--epochs", settings.epochs, settings.epochs >= 1, "at least 1"),
        ("--batch-size", settings.batch_size, settings.batch_size >= 1, "at least 1"),
        ("--lr", settings.lr, 0 < settings.lr <= 1, "in 0..1, not 0"),
        ("--seed", settings.seed, 0 <= settings.seed < 2**32, "in 0..2^32-1"),
        ("--checkpoint-every", every, every >= 0, "at least 0"),
    ):
        if not holds:
            raise UserError(f"{option} {value} must be {rule}")
    if "pretrain" in given and "pretrain_folder" in given:
        raise UserError("--pretrain and --pretrain-folder exclude one another")
    pretrain, folder = given.get("pretrain", PRETRAIN[dataset]), given.get("pretrain_folder")
    if pretrain not in SHAPES:
        raise UserError(f"--pretrain {pretrain} is unknown; choose from {', '.join(SHAPES)}")
    refuse_same(dataset, pretrain, f"--pretrain {pretrain}")
    refuse_channels(dataset, SHAPES[pretrain][0], f"--pretrain {pretrain}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--pretrain-folder {folder} is not a folder")
    weights = given.get("weights")
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights {weights} is not a file")
    request = Request(
        dataset, extractor, given["out"], given.get("data_root", default_root()),
        choose_device(given.get("device")), settings, pretrain, folder, weights,
        given.get("resume", False), every,
    )  # fmt: skip
    for path in (request.out, request.pretraining, request.partial):
        if path.exists() and not request.resume:
            raise UserError(f"{path} exists already; add --resume or use another --out")
    return request


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


def write_features(out: Path, arrays: Sequence[Tensor], origin: dict[str, Any]) -> None:
    """Writes the file that ssd.data.load("features", ..) reads.

    Args:
        arrays: x_train [N, F], y_train [N], x_test, y_test. origin: of the features; JSON-able.
    """
    names = ("x_train", "y_train", "x_test", "y_test")
    kinds = (np.float32, np.int64) * 2
    content = {
        name: array.numpy().astype(kind)
        for name, array, kind in zip(names, arrays, kinds, strict=True)
    }

    def write(stream: IO[bytes]) -> None:
        np.savez(stream, allow_pickle=False, origin=np.array(dumps(origin)), **content)

    write_atomically(out, write)


def convert(source: Path, out: Path) -> str:
    """Converts the feature files of the SDMLP repository; returns the line that says so.

    Raises:
        UserError: the source is damaged or of another layout, or `out` exists.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already; use another")
    with in_words({"--features": "--convert"}):
        loaded = data.load("features", default_root(), source)
    arrays = (loaded.x_train, loaded.y_train, loaded.x_test, loaded.y_test)
    write_features(out, arrays, {"converted": source.name, "data_crc32": loaded.checksum()})
    return summary(f"converted {source}", loaded.x_train.shape[1], arrays, out)


def summary(what: str, width: int, arrays: Sequence[Tensor], out: Path) -> str:
    return f"{what}: {len(arrays[1])} + {len(arrays[3])} samples of {width} features -> {out}"


class Session:
    """One invocation: makes the extractor, embeds, writes; resumes what was interrupted."""

    def __init__(
        self,
        request: Request,
        loaded: Dataset,
        display: Display,
        stopped: Callable[[], bool],
    ) -> None:
        self.request, self.data, self.display, self.stopped = request, loaded, display, stopped

    def run(self) -> str:
        """Returns the line that says what was done.

        Raises:
            UserError: data, weights or checkpoints that do not fit. Interrupted: it was stopped.
        """
        request, loaded = self.request, self.data
        origin, make = self.prepare()
        if request.out.is_file():
            self.check_finished(origin)
            request.partial.unlink(missing_ok=True)  # of a process killed at its very end
            return f"{request.out} is finished already"
        extractor = make()
        refuse_channels(request.dataset, extractor.channels, f"--extractor {request.extractor}")
        origin["weights_crc32"] = extractor.crc32
        shape = SHAPES[request.dataset]
        images = torch.cat([pixels(x, shape) for x in (loaded.x_train, loaded.x_test)])
        features = self.embed(extractor, images, origin)
        x_train, x_test = features.split([len(loaded.y_train), len(loaded.y_test)])
        arrays = (x_train, loaded.y_train, x_test, loaded.y_test)
        write_features(request.out, arrays, origin)
        request.partial.unlink(missing_ok=True)
        what = f"{request.dataset} by {request.extractor}"
        return summary(what, features.shape[1], arrays, request.out)

    def prepare(self) -> tuple[dict[str, Any], Callable[[], Extractor]]:
        """The origin of the features, known before any work, and what makes the extractor."""
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
            refuse_same(
                request.dataset, origin["pretraining"]["data"], f"--weights {request.weights}"
            )
            extractor = freeze(model, model.embed, len(model.mean), device)
            origin["weights_crc32"] = extractor.crc32
            return origin, lambda: extractor
        if request.folder is not None:
            images = load_folder(request.folder, self.display.update)
        else:
            images = load_images(request.pretrain, request.root)
        described = origin["pretraining"] = describe(images, request.settings)
        return origin, lambda: self.pretrain(images, described)

    def pretrain(self, images: Images, described: dict[str, Any]) -> Extractor:
        request = self.request
        trainer = Pretrainer(
            images, request.settings, request.device, request.pretraining, described
        )
        trainer.restore()
        model = trainer.run(request.every, self.display.update, self.stopped)
        return freeze(model, model.embed, len(model.mean), request.device)

    def check_finished(self, origin: dict[str, Any]) -> None:
        """UserError if the file that is there is not the one that was asked for."""
        out = self.request.out
        try:
            with np.load(out, allow_pickle=False) as archive:
                before = dict(json.loads(str(archive["origin"])))
        except Exception as error:
            raise UserError(f"--out {out} was not written by this command; use another") from error
        changed = difference(before, origin)
        if changed:
            raise UserError(f"--out {out} is of another command ({changed}); use another")

    def embed(self, extractor: Extractor, images: Tensor, origin: dict[str, Any]) -> Tensor:
        """Features [N, F], batch by batch, from the partial file on if there is one."""
        request, size = self.request, self.request.settings.batch_size
        chunks: list[Tensor] = []
        if request.partial.is_file():
            tensors, state = read(request.partial, torch.device("cpu"))
            changed = difference(state, origin)
            if changed:
                raise UserError(
                    f"{request.partial} is of another command ({changed}); use another --out"
                )
            chunks.append(tensors["features"])
        saved = time.perf_counter()
        for first in range(sum(map(len, chunks)), len(images), size):
            batch = images[first : first + size].to(request.device)
            found = extractor.function(batch).cpu()
            if not finite(found):
                raise UserError(
                    f"--extractor {request.extractor} gives features that are not finite"
                )
            chunks.append(found)
            done = first + len(batch)
            self.display.update(f"embedding {request.dataset}", done, len(images), False)
            stop = self.stopped() and done < len(images)
            if stop or time.perf_counter() - saved > request.every:
                chunks = [torch.cat(chunks)]
                save_checkpoint(request.partial, {"features": chunks[0]}, origin)
                saved = time.perf_counter()
            if stop:
                raise Interrupted
        return torch.cat(chunks)


def execute(arguments: Sequence[str]) -> None:
    """Parses, checks, loads, pretrains, embeds and writes; bad input is refused before any work."""
    given = vars(build_parser().parse_args(arguments))
    if "out" not in given:
        raise UserError("--out is missing (see --help)")
    out = given["out"]
    if "convert" in given:
        foreign = [name for name in given if name not in CONVERTING]
        if foreign:
            raise UserError(f"--{foreign[0].replace('_', '-')} does not go with --convert")
        check_out(out)
        with file_lock(out):
            print(convert(given["convert"], out))
        return
    check_out(out)
    request = check(given)
    again = command_line("ssd.embed", [*arguments, *([] if request.resume else ["--resume"])])
    display = Display(Console(), given.get("quiet", False))
    try:
        with resumable(f"go on with: {again}"), file_lock(out):
            loaded = data.load(request.dataset, request.root, strict=True)
            with stop_on_interrupt() as stopped, display:
                line = Session(request, loaded, display, stopped).run()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--batch-size {request.settings.batch_size} needs more memory than {request.device} "
            "has; use a smaller one"
        ) from error
    print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of embedding; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
