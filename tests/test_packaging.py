"""What is published holds both packages alone; its commands run away from the sources."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
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

MISSING = [name for name in ("build", "twine") if find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason='build or twine is not installed: pip install ".[dev]"'
    ),
]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the sdist and the wheel, which is built from the sdist."""
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT, folder / "sources", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "sources"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(published: Path) -> Path:
    (built,) = published.glob("*.whl")
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


def sources() -> set[str]:
    """Files of both packages."""
    return {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    info = f"ssd_kernels-{ssd_kernels.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        packed = {name for name in names if not name.startswith(info)}
        for file in ("ssd/mnist_5k.npz", "ssd/mnist_5k.txt"):
            assert archive.read(file) == (ROOT / file).read_bytes()
    assert packed == sources()
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed
    assert {f"{info}licenses/LICENSE", f"{info}entry_points.txt"} <= names


def test_sdist_holds_what_the_wheel_is_built_from(published: Path) -> None:
    (sdist,) = published.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name for member in archive if member.isfile()]
    packed = {name.partition("/")[2] for name in names}
    generated = {name for name in packed if ".egg-info/" in name}
    beside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"}
    beside |= {"pyproject.toml", "setup.cfg", "setup.py"}
    assert packed - generated == sources() | beside


def test_index_accepts_the_metadata(published: Path) -> None:
    command = [sys.executable, "-m", "twine", "check", "--strict", *published.iterdir()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


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
