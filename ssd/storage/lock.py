"""One process per folder or output file; a lock ends with its process, even if it is killed."""

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

LOCK = ".lock"  # the file in a locked folder
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks
_held: set[Path] = set()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it against other processes; one process may lock it repeatedly.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder cannot be made or written to.
    """
    with _made(folder), _locked(folder / LOCK, folder):
        yield


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Like folder_lock, for an output file; makes the folder that will hold it."""
    file = path.resolve() if path.is_symlink() else path
    with _made(file.parent), _locked(file.with_name(f".{file.name}{LOCK}"), path):
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; at the end removes those of them that are empty."""
    new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file has the folder's name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    try:
        yield
    finally:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()


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
            path.unlink()  # before the release, so that a waiting process sees it gone
        os.close(descriptor)


def _acquire(path: Path, what: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            error.filename = str(what)  # the user did not name the lock file
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
        os.close(descriptor)  # the last holder removed the file meanwhile
