"""What an installation takes, as CSV: packages, MB on disk and seconds of each step.

    python scripts/install_weight.py COMMIT ... > benchmarks/results/cpu/install.csv

PyTorch and torchvision go into a fresh virtual environment. The project at each commit is then
installed there, whole and with --no-deps, and what that brought is removed again. All of this is
done twice and the second time counts. Seconds include the downloads that pip's cache does not save.
"""

import csv
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from argparse import ArgumentParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = ("torch", "torchvision")
COLUMNS = ("commit", "pip install", "packages", "MB", "seconds", "names")


class Environment:
    """A virtual environment in an empty folder."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.folder = folder

    def pip(self, *arguments: str) -> str:
        command = [str(self.folder / "bin/python"), "-I", "-m", "pip", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def packages(self) -> dict[str, str]:
        """Name -> version."""
        listed = json.loads(self.pip("list", "--format", "json"))
        return {package["name"]: package["version"] for package in listed}

    def megabytes(self) -> float:
        files = (file for file in self.folder.rglob("*") if file.is_file())
        return sum(file.lstat().st_size for file in files) / 1e6

    def install(self, *what: str) -> dict[str, object]:
        """Installs it; the columns that say what that took."""
        packages, megabytes = self.packages(), self.megabytes()
        start = time.perf_counter()
        self.pip("install", "--quiet", *what)
        seconds = time.perf_counter() - start
        new = {n: version for n, version in self.packages().items() if n not in packages}
        return {
            "packages": len(new),
            "MB": f"{self.megabytes() - megabytes:.1f}",
            "seconds": f"{seconds:.1f}",
            "names": " ".join(f"{name}=={version}" for name, version in new.items()),
        }

    def keep(self, names: set[str]) -> None:
        """Removes all other packages."""
        self.pip("uninstall", "--quiet", "--yes", *(self.packages().keys() - names))


def sources(commit: str, folder: Path) -> str:
    """The files of a commit, in a new folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    target = tempfile.mkdtemp(dir=folder)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(target, filter="data")
    return target


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    commits = parser.parse_args().commits
    rows = []
    with tempfile.TemporaryDirectory() as name:
        environment = Environment(Path(name, "environment"))
        print("installing PyTorch", file=sys.stderr)
        took = environment.install(*BASE)
        rows.append({"commit": "", "pip install": " ".join(BASE), **took})
        base = set(environment.packages())
        for counts in (False, True):
            for commit in commits:
                for options in ((), ("--no-deps",)):
                    print("installing", commit, *options, file=sys.stderr)
                    took = environment.install(*options, sources(commit, Path(name)))
                    environment.keep(base)
                    if counts:
                        step = " ".join([*options, "."])
                        rows.append({"commit": commit, "pip install": step, **took})
    table = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
