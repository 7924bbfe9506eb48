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


def installed(package: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The version of Python and of each package that numbers depend on."""
    packages = ("ssd-kernels", "torch", "triton", "torchvision", "numpy")
    found = {package: installed(package) or "not installed" for package in packages}
    return {"python": platform.python_version(), **found}


def versions_of(summaries: Iterable[Mapping[str, Any]]) -> str:
    """The versions in the summaries of runs, as text."""
    found = {", ".join(f"{n} {v}" for n, v in s["versions"].items()) for s in summaries}
    return "; ".join(sorted(found))


def commit(file: Path | None = None) -> str:
    """The commit of the checkout that holds a file, with "-dirty" if more than results changed.

    Args:
        file: by default this module; where that is in no checkout, $GIT_COMMIT may name the commit.

    Returns:
        "unknown" outside a checkout.
    """
    place = file or Path(__file__)
    try:
        # An installed copy may lie inside the checkout of another project.
        _git("ls-files", "--error-unmatch", place.name, folder=place.parent)
        status = ("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)results")
        changed = _git(*status, folder=place.parent)
        return _git("rev-parse", "HEAD", folder=place.parent) + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown" if file else os.environ.get("GIT_COMMIT", "unknown")


def _git(*arguments: str, folder: Path) -> str:
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
    ).stdout.strip()


def doubts(commits: Collection[str]) -> str:
    """Why no single commit repeats runs of these commits; empty if one does."""
    count = len(set(commits))
    found = [f"of {count} commits"] if count > 1 else []
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("with uncommitted changes")
    if "unknown" in commits:
        found.append("of an unknown commit")
    return f"runs {', '.join(found)}" if found else ""


def device_name(device: torch.device) -> str:
    """The type of a device with the name of its hardware."""
    if device.type == "cpu":
        return f"cpu ({platform.machine()})"
    here = torch.cuda.is_available()
    return f"cuda ({torch.cuda.get_device_name(device) if here else 'of another machine'})"


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
