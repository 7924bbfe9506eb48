"""Where numbers come from: commit, versions, machine, device."""

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
    """The version of Python and of each package that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("ssd-kernels", "torch", "triton", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def versions_of(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The versions in the summaries of runs, as text."""
    found = {", ".join(f"{n} {v}" for n, v in s["versions"].items()) for s in summaries}
    return "; ".join(sorted(found))


def commit() -> str:
    """The commit of this checkout, "-dirty" if more than results changed; "unknown" if none."""
    try:
        # An installed copy may lie inside the checkout of another project.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
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
    """Why no single commit repeats runs of these commits; empty if one does."""
    several = len(set(commits))
    found = [f"of {several} commits"] if several > 1 else []
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("with uncommitted changes")
    if "unknown" in commits:
        found.append("of an unknown commit")
    return f"runs {', '.join(found)}" if found else ""


def device_name(device: torch.device) -> str:
    """The type of a device with the name of its hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def machine() -> str:
    """The processor and the number of its threads."""
    return f"{processor()}, {os.cpu_count()} threads"


def processor() -> str:
    """The name of the processor, or its architecture where the system has no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
