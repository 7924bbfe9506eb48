"""Errors that end a command with one line, among them a lack of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """One line for the user: what was wrong, the value, and what to do."""


class Diverged(UserError):
    """Training or a closed-form solution gave a value that is not finite.

    Args:
        reason: the line for the user.
        number: position of the run among those trained side by side.
    """

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number

    def __reduce__(self) -> tuple[type[Diverged], tuple[str, int]]:
        return type(self), (str(self), self.number)  # workers send it as a pickle


class Interrupted(Exception):
    """The user stopped the work; a checkpoint holds what is done."""


def one_line(error: Exception) -> str:
    """The message of an exception in one line of at most 200 characters, or else its repr."""
    return " ".join(str(error).split())[:200] or repr(error)


def require_memory(needed: int, what: str, device: torch.device) -> None:
    """UserError if a device has less memory than is surely needed.

    Args:
        needed: bytes, a lower bound.
        what: the setting that the message blames.
        device: where the memory is needed.
    """
    if needed > _memory(device):
        least = f"{needed / 2**30:,.1f} GiB or more"
        raise UserError(f"{what} does not fit into the memory of {device} ({least}); use fewer")


@contextmanager
def fitting(what: str, device: torch.device) -> Iterator[None]:
    """Turns a failed allocation into a UserError that blames `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failed = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not failed and "DefaultCPUAllocator" not in str(error):  # on a CPU it has no own class
            raise
        raise UserError(f"{what} does not fit into the memory of {device}; use fewer") from error


def _memory(device: torch.device) -> float:
    """Total bytes of a device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")
