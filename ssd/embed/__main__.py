"""python -m ssd.embed: features of images by a frozen extractor, for ssd.train --features.

The extractor `convmixer` is pretrained here, on another data set than the one it embeds, so that it
has seen none of the labels to be learned. The paper pretrains on ImageNet32, which may not be
redistributed; those who have it name its folder with --pretrain-folder. The other extractors come
with their weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from ssd.cli import (
    ArgumentParser,
    add_common,
    command_line,
    exit_status,
    resumable,
    stop_on_interrupt,
)
from ssd.embed.convmixer import Settings
from ssd.embed.embedding import check, check_out, convert, exclude, run
from ssd.embed.extractors import Row, choices
from ssd.embed.images import SHAPES
from ssd.embed.request import Work
from ssd.errors import UserError, fitting
from ssd.progress import Display
from ssd.storage.lock import file_lock

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
    default = {field.name: field.default for field in fields(Settings)}
    batch = f"images (default {default['batch_size']} for convmixer, {Row.batch_size} for others)"
    source = (
        "instead: a .pt of ((x_train, y_train), (x_test, y_test)), or a folder with the SDMLP "
        "repository's all_data_train.pt and all_data_test.pt"
    )
    folder = "pretrain on a folder of a folder of images a class, scaled to 32 x 32"
    add = parser.add_argument
    add("--dataset", metavar="NAME", help=", ".join(SHAPES))
    add("--extractor", metavar="NAME", help=choices())
    add("--convert", metavar="PATH", type=Path, help=source)
    add("--out", metavar="FILE", type=Path, help="the .npz to write")
    add("--resume", action="store_true", help="go on where the same command was interrupted")
    add_common(add, "--data-root", "--device")
    add("--batch-size", metavar="N", type=int, help=batch)
    add_common(add, "--checkpoint-every", "--quiet")
    add = parser.add_argument_group("convmixer").add_argument
    add("--pretrain", metavar="NAME", help="data set to pretrain on (default: see below)")
    add("--pretrain-folder", metavar="DIR", type=Path, help=folder)
    add("--weights", metavar="FILE", type=Path, help="pretrain nothing, use a .safetensors")
    add("--epochs", metavar="N", type=int, help=f"(default {default['epochs']})")
    add("--lr", metavar="X", type=float, help=f"peak (default {default['lr']})")
    add("--seed", metavar="N", type=int, help=f"(default {default['seed']})")
    return parser


def execute(arguments: Sequence[str]) -> None:
    """Parses, checks, loads, pretrains, embeds and writes; refuses bad input before any work."""
    given = vars(build_parser().parse_args(arguments))
    if "out" not in given:
        raise UserError("--out is missing (see --help)")
    out = given["out"]
    if "convert" in given:
        exclude(given, [name for name in given if name not in CONVERTING], "--convert")
        check_out(out)
        with file_lock(out):
            print(convert(given["convert"], out))
        return
    check_out(out)
    request = check(given)
    again = command_line("ssd.embed", [*arguments, *([] if request.resume else ["--resume"])])
    display = Display(Console(), request.quiet)
    batch = f"--batch-size {request.settings.batch_size}"
    with (
        fitting(batch, request.device),
        resumable(f"go on with: {again}"),
        file_lock(out),
        stop_on_interrupt() as stopped,
        display,
    ):
        line = run(Work(request, display, stopped))
    print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of embedding; returns the exit status."""
    return exit_status(lambda: execute(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
