"""One process a folder or an output file; the lock ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ssd.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in a locked folder
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks
_held: set[Path] = set()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes from it; within this process it may be nested.

    Raises:
        UserError: another process has it. OSError: it cannot be made or written to.
    """
    with _made(folder), _locked(folder / LOCK, folder):
        yield


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """As folder_lock, for a file that is to be written; makes the folder that it lies in."""
    file = path.resolve() if path.is_symlink() else path  # a link goes on to name the file
    with _made(file.parent), _locked(file.with_name(f".{file.name}{LOCK}"), path):
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; those into which nothing came are removed again."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # said of a file in the folder's place
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    try:
        yield
    finally:
        for each in new:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def _locked(path: Path, what: Path) -> Iterator[None]:
    path = path.resolve()
    if path in _held or fcntl is None:
        yield
        return
    descriptor = _acquire(path, what)
    _held.add(path)
    try:
        yield
    finally:
        _held.remove(path)
        with suppress(OSError):
            path.unlink()  # while it is held: who opened it meanwhile finds it gone
        os.close(descriptor)


def _acquire(path: Path, what: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            error.filename = str(what)  # the user knows nothing of its lock
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.pread(descriptor, 20, 0).decode("ascii", "replace")
            os.close(descriptor)
            raise UserError(
                f"{what} is in use by another process{f' ({number})' if number else ''}; "
                "let it end or use another"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            print(f"note: no locks on the file system of {path}; run one process", file=sys.stderr)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        os.close(descriptor)  # its last holder removed it
