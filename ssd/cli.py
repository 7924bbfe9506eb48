"""What the commands share: options, exit status, output, interruption and the device."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

import torch
from rich.console import Console

from ssd import BEGINS_AGAIN, end_guard
from ssd.config import Config, option
from ssd.errors import Interrupted, UserError
from ssd.executors import EXECUTORS, HERE
from ssd.storage.run_folder import CONFIG

# Library code names settings by the options of ssd.train; settings files use the bare names.
SETTINGS = {option(field.name): field.name for field in fields(Config)}
SETTINGS |= {"--preset": "preset", "--seeds": "seeds"}
MOST_RUNS = 10_000  # of one command, which lists all of them before it trains the first
# Options of several commands: value in the help text, type, default, help.
COMMON: Mapping[str, tuple[str, type, Any, str]] = {
    "--data-root": ("DIR", Path, None, "data sets (default $SSD_DATA or data)"),
    "--device": ("NAME", str, None, "cpu, cuda, cuda:1, .. (default cuda if there is one)"),
    "--checkpoint-every": ("X", float, None, "seconds (default 30)"),
    "--quiet": ("", bool, False, "print the result line alone"),
    "--on": ("WHERE", str, HERE, f"train on {', '.join([HERE, *EXECUTORS])} (default {HERE})"),
    "--job": ("KEY=VALUE", list, (), "what a job asks of --on, as num_gpus=1; may be repeated"),
}


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for argument in sys.argv[1:] if args is None else args:
            if "\0" in argument:  # no path holds it
                raise UserError(f"{argument!r} holds a NUL character")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def add_common(add: Callable[..., Any], *names: str) -> None:
    """Adds options of COMMON; `add` is add_argument of a parser or a group."""
    for name in names:
        value, kind, default, text = COMMON[name]
        if kind is bool:
            add(name, action="store_true", help=text)
        elif kind is list:
            add(name, metavar=value, action="append", default=list(default), help=text)
        else:
            known = {} if default is None else {"default": default}  # the parser may have its own
            add(name, metavar=value, type=kind, help=text, **known)


def exit_status(work: Callable[[], int | None], place: str = "--out") -> int:
    """Does the work of a command and returns its exit status.

    Args:
        work: the command; it may return its own status.
        place: the options that say where it writes, for the message about a full disk.

    Returns:
        0: done. 2: a mistake, reported in one line on stderr. 130: interrupted.
    """
    out, err = (cast(TextIO, stream) for stream in (_Output(sys.stdout), _Errors(sys.stderr)))
    with redirect_stdout(out), redirect_stderr(err):
        try:
            try:
                end_guard()
                return work() or 0
            finally:
                out.flush()
        except UserError as error:
            return _fail(str(error))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            advice = f"; make room or use another {place}" if place else ""
            return _fail(f"{error.strerror or error}{where}{advice}")
        except Interrupted:
            return 130
        except KeyboardInterrupt:
            print(BEGINS_AGAIN, file=sys.stderr)
            return 130


def _fail(reason: str) -> int:
    print("error: " + " ".join(reason.splitlines()), file=sys.stderr)
    return 2


class _Output:
    """A standard stream whose failures do not end the work.

    It replaces characters that its encoding lacks by ?, and drops text once the reader is gone.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unread():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._unread():
            if self._stream is not None:
                self._stream.flush()

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            assert self._stream is not None
            null = os.open(os.devnull, os.O_WRONLY)  # takes what is buffered and what follows
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal was closed
                error.filename = self._stream.name
                raise


class _Errors(_Output):
    """stderr: its failure cannot be reported anywhere."""

    @contextmanager
    def _unread(self) -> Iterator[None]:
        with suppress(OSError), super()._unread():
            yield


def reword(text: str, words: Mapping[str, str]) -> str:
    """A message of library code with its options replaced; words: as in {"--lr": "lr"}."""
    return re.sub(r"(?<![\w/.-])--?[a-z][a-z-]*", lambda m: words.get(m[0], m[0]), text)


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Rewords UserErrors of library code for a command whose options have other names."""
    try:
        yield
    except UserError as error:
        raise UserError(reword(str(error), words)) from error


def note(line: str) -> None:
    """Prints a note on stderr, in one line even on a narrow terminal."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    console.print(f"note: {line}", style="yellow")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["python", "-m", module, *arguments])


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """After Ctrl-C, says how to go on and raises Interrupted."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        print(f"interrupted; {how}", file=sys.stderr)
        raise Interrupted from None


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C came; a second Ctrl-C interrupts at once."""
    hits: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if hits:
            raise KeyboardInterrupt
        hits.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(hits)
    finally:
        signal.signal(signal.SIGINT, before)


def choose_device(name: str | None, elsewhere: bool = False) -> torch.device:
    """The device to train on, by default CUDA if there is one; UserError if it is absent.

    Args:
        name: as torch.device takes it.
        elsewhere: whether other machines train, which may have what this one lacks.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda")
    if elsewhere and device.index is not None:
        raise UserError(f"--device {name} is a GPU of this machine; use cuda with --on")
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not elsewhere and (device.index or 0) >= here:
        raise UserError(f"--device {name} is not on this machine; use --device cpu")
    return device


def check_seeds(count: int) -> None:
    """UserError if --seeds is no number of runs."""
    if not 1 <= count <= MOST_RUNS:
        raise UserError(f"--seeds {count} must be in 1..{MOST_RUNS}")


def check_file(out: Path) -> None:
    """UserError if --out cannot be a file."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    if out.exists() and not out.is_file():  # reading a device or a pipe might never end
        raise UserError(f"--out {out} is not an ordinary file; name another")


def check_folder(out: Path, name: str = "--out") -> None:
    """UserError if --out cannot be a folder of many runs."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{name} {out} is not a folder; use another {name}")
    if (out / CONFIG).is_file():
        raise UserError(f"{name} {out} is the folder of one run; use another {name}")
