"""Each example runs as its docstring says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd.storage.provenance import installed

ROOT = Path(__file__).parents[1]
# File -> the package that it needs beside this project, and a line that it prints.
EXAMPLES = {
    "train_sae": ("", "loaded again: the same FVU"),
    "sparsify_drop_in": ("eai-sparsify", "the gradients are equal"),
    "saelens_drop_in": ("sae-lens", "the gradients are equal"),
}


def run(name: str, folder: Path, **environment: str) -> str:
    """What the example prints, in an empty folder."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_listed() -> None:
    elsewhere = {"avalanche_ssd", "ddp_sae"}  # test_examples_avalanche, tests/kernels/test_parallel
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert found == set(EXAMPLES) | elsewhere


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    package, line = EXAMPLES[name]
    if package and not installed(package):
        pytest.skip(f"{package} is not installed")
    assert line in run(name, tmp_path)


def test_training_without_features(tmp_path: Path) -> None:
    said = run("train_sae", tmp_path, SSD_DATA=str(tmp_path))
    assert "hidden layer of a network of digits" in said
    fvu = float(said.split("held out: FVU ")[1].split(",")[0])
    assert 0 < fvu < 0.2
    assert (tmp_path / "sae/cfg.json").is_file()
