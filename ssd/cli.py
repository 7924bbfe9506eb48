"""What all commands share: options, exit status, output, interruption and the device."""

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
from ssd.storage.run_folder import CONFIG

# Settings as files of settings name them; library code says them as ssd.train's options.
SETTINGS = {option(field.name): field.name for field in fields(Config)} | {
    "--preset": "preset", "--seeds": "seeds"
}  # fmt: skip


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        for each in sys.argv[1:] if args is None else args:
            if "\0" in each:  # no path holds it
                raise UserError(f"{each!r} holds a NUL character")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def exit_status(work: Callable[[], int | None], place: str = "--out") -> int:
    """Does the work: 0 done, 2 a mistake of the user's (one line on stderr), 130 interrupted.

    Args:
        work: may return an exit status of its own.
        place: the options that name where it writes; "" if it has none.
    """
    out, err = (cast(TextIO, stream) for stream in (_Output(sys.stdout), _Told(sys.stderr)))
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
    """A standard stream that ends no work.

    It shows ? for what its encoding lacks, and is silent once nobody reads it.
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
            null = os.open(os.devnull, os.O_WRONLY)  # for what is buffered, and all to come
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: the terminal was closed
                error.filename = self._stream.name
                raise


class _Told(_Output):
    """stderr: what cannot be said there ends no work either."""

    @contextmanager
    def _unread(self) -> Iterator[None]:
        with suppress(OSError), super()._unread():
            yield


def reword(text: str, words: Mapping[str, str]) -> str:
    """A message of library code with other words in the place of options: {"--lr": "lr"}."""
    return re.sub(r"(?<![\w/.-])--?[a-z][a-z-]*", lambda m: words.get(m[0], m[0]), text)


@contextmanager
def in_words(words: Mapping[str, str]) -> Iterator[None]:
    """Rewords the UserErrors of library code for a command that has other options."""
    try:
        yield
    except UserError as error:
        raise UserError(reword(str(error), words)) from error


def note(line: str) -> None:
    """Tells the user something in one line on stderr, however narrow the terminal."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    console.print(f"note: {line}", style="yellow")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """A command as one types it."""
    return shlex.join(["python", "-m", module, *arguments])


@contextmanager
def resumable(how: str) -> Iterator[None]:
    """Says how to go on with work that Ctrl-C ended; Interrupted then."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        print(f"interrupted; {how}", file=sys.stderr)
        raise Interrupted from None


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives whether Ctrl-C was hit, so that a step is finished and saved; twice interrupts it."""
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


def choose_device(name: str | None) -> torch.device:
    """The device to train on; UserError where it is not to be had."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (
        not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UserError(f"--device {name} is not on this machine; use --device cpu")
    return device


def check_file(out: Path) -> None:
    """UserError where --out is no file that could be written."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")
    if out.exists() and not out.is_file():  # a device or a pipe, which may be read without end
        raise UserError(f"--out {out} is no ordinary file; name another")


def check_folder(out: Path, name: str = "--out") -> None:
    """UserError where --out is no folder of many runs and none that could be made."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{name} {out} is not a folder; use another {name}")
    if (out / CONFIG).is_file():
        raise UserError(f"{name} {out} is the folder of one run; use another {name}")
