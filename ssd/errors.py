"""What ends a command without a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """What was wrong, with the value, and what to do about it: shown as one line."""


class Diverged(UserError):
    """Training, or a solution in closed form, gave what is not finite.

    Args:
        reason: as of UserError. number: of the run, where several are trained side by side.
    """

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number

    def __reduce__(self) -> tuple[type[Diverged], tuple[str, int]]:
        return type(self), (str(self), self.number)  # a worker's reaches the command as a pickle


class Interrupted(Exception):
    """The work was asked to stop and has left what it goes on from."""


# Runs of one command: all are listed before the first is trained.
MOST_RUNS = 10_000


def require_memory(needed: int, what: str, device: torch.device) -> None:
    """UserError where a device has less memory than is certainly needed.

    Args:
        needed: bytes, a lower bound. what: needs them, in the message.
    """
    if needed > _memory(device):
        least = f"{needed / 2**30:,.1f} GiB or more"
        raise UserError(f"{what} does not fit into the memory of {device} ({least}); use fewer")


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what an allocation fails with, which on a CPU has no class of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator" in str(error)
    )


@contextmanager
def fitting(what: str, device: torch.device) -> Iterator[None]:
    """UserError where an allocation fails for want of memory; `what` wanted it, in the message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{what} does not fit into the memory of {device}; use fewer") from error


def _memory(device: torch.device) -> float:
    """Bytes that a device has in all; infinite where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return float("inf")
