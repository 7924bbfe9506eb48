"""Selective Subnetwork Distillation: continual learning with k-sparse networks."""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any

# How long an OpenMP thread spins for work before it sleeps; by default for milliseconds, in which
# it holds a core that another busy process needs (docs/performance.md has what that costs). OpenMP
# reads it when torch is imported; what the user set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

BEGINS_AGAIN = "interrupted; the same command begins again"


def guard_imports(module: str) -> None:
    """Ends the process in one line if Ctrl-C comes while a command's imports run."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it stands
    if module.startswith("ssd.") and usual:
        signal.signal(signal.SIGINT, _end)


def _module_of_the_command_line() -> str:
    """NAME in `python -m NAME` while its imports run; else an empty string."""
    given = sys.orig_argv
    # sys.argv[0] is -m until the module itself runs.
    return given[given.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in given else ""


def end_guard() -> None:
    """From here on Ctrl-C is KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{BEGINS_AGAIN}\n".encode())
    os._exit(130)


guard_imports(_module_of_the_command_line())


# Imported when they are asked for, since they import torch: name -> its module.
LAZY = {"__version__": "ssd_kernels", "run": "ssd.api", "Result": "ssd.api"}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'ssd' has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})
