"""The folder of a run: the names of its files, and whose it is."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("ssd-kernels", "torch", "triton", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions_of(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The versions that runs were trained with, as text."""
    found = {", ".join(f"{n} {v}" for n, v in s["versions"].items()) for s in summaries}
    return "; ".join(sorted(found))


def commit() -> str:
    """The commit of the checkout, "-dirty" if more than results changed; "unknown" outside one."""
    here = Path(__file__)
    try:
        # An installed copy may lie inside the checkout of something else.
        _git("ls-files", "--error-unmatch", here.name)
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)results"
        )
        return _git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
    ).stdout.strip()


def doubts(commits: Collection[str]) -> str:
    """Why runs of these commits cannot be repeated from one; empty if they can."""
    several = len(set(commits))
    found = [f"of {several} commits"] if several > 1 else []
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("with uncommitted changes")
    if "unknown" in commits:
        found.append("of an unknown commit")
    return f"runs {', '.join(found)}" if found else ""


def device_name(device: torch.device) -> str:
    """A device with the name of its hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def machine() -> str:
    """The machine that this process runs on."""
    return f"{processor()}, {os.cpu_count()} threads"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
