"""The notebooks run from top to bottom, in a process of their own, and say what they show.

No Jupyter is needed: code cells run in order in one namespace, and the last expression of each is
shown as Jupyter would, by its HTML where it has one.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# What a notebook must have found, in its own names.
FINDINGS = {
    "continual_learning": """
assert results["ssd+ewc"].mean_accuracy > results["sdmlp"].mean_accuracy + 0.1
assert results["ssd+ewc"].forgetting < results["sdmlp"].forgetting - 0.1
assert own["ssd+ewc"].mean_accuracy > own["sdmlp"].mean_accuracy
assert own["ssd+ewc"].config.neurons == 300
""",
    "autoencoder": """
assert curve[0][1] > 0.6 and out.fvu < 0.35, (curve[0], out.fvu)
assert curve[0][2] > 60 and l0(out.values) <= 16
assert len(curve) == 300 and sae.dead.float().mean() < 0.2
""",
}
PROGRAM = """
import ast, sys, json
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(sys.stdin)):
    parts = ast.parse(cell)
    shown = None
    if isinstance(parts.body[-1], ast.Expr) and not cell.endswith(";"):
        shown = ast.Expression(parts.body.pop().value)
    exec(compile(parts, f"cell {number}", "exec"), names)
    if shown is not None:
        value = eval(compile(shown, f"cell {number}", "eval"), names)
        print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
"""


@cache
def cells(name: str) -> list[dict[str, Any]]:
    found = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert found["nbformat"] == 4
    return found["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(FINDINGS)


@pytest.mark.parametrize("name", FINDINGS)
def test_notebook_runs(name: str, tmp_path: Path) -> None:
    code = [source(cell) for cell in cells(name) if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([*code, FINDINGS[name]]),
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "MPLBACKEND": "agg"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("name", FINDINGS)
def test_notebook_is_kept_without_outputs(name: str) -> None:
    """Its cells are short, too, and have the identifiers that the format asks for."""
    assert len({cell["id"] for cell in cells(name)}) == len(cells(name))
    for cell in cells(name):
        assert len(source(cell).splitlines()) <= 18
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
