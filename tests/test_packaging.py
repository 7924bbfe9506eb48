"""The wheel holds both packages and nothing else, and its commands run away from the sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssd
import ssd_kernels
from ssd.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGES = ("ssd", "ssd_kernels")
# Ignored files: what an earlier build left would come into the wheel.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "data", "dist", "results", "runs", "site"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "sources", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, folder, folder / "sources"], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, folder, wheel], check=True)
    return folder


def run(installed: Path, folder: Path, *command: str) -> str:
    """What the command prints; it finds the installed packages alone, from an empty folder."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    info = f"ssd_kernels-{ssd_kernels.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.startswith(info)}
    sources = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix in (".py", ".html") or file.name == "py.typed"
    }
    assert packed == sources
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_one_version(installed: Path, tmp_path: Path) -> None:
    assert ssd.__version__ == ssd_kernels.__version__
    assert run(installed, tmp_path, str(installed / "bin/ssd"), "--version").strip() == (
        ssd_kernels.__version__
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help(installed: Path, tmp_path: Path, command: str) -> None:
    shown = run(installed, tmp_path, str(installed / "bin/ssd"), command, "--help")
    assert f"ssd.{command}" in shown


def test_training(installed: Path, tmp_path: Path) -> None:
    tiny = "--dataset mnist-5k --neurons 50 -k 5 --epochs 1 --device cpu --out run --quiet"
    run(installed, tmp_path, sys.executable, "-m", "ssd.train", *tiny.split())
    assert (tmp_path / "run/summary.json").is_file()
