"""setup.py names what the two packages import, and no more; the kernels alone need less."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS_NEED = {"torch", "triton", "numpy"}
NOT_FOR_USERS = {"test", "libraries", "docs", "dev"}
PROGRAM = """
import pkgutil, sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # as if they were not installed
import ssd_kernels, torch
for module in pkgutil.walk_packages(ssd_kernels.__path__, "ssd_kernels."):
    if module.name != "ssd_kernels._loops":  # imported where numba is installed
        __import__(module.name)
x, w = torch.randn(3, 8), torch.randn(20, 8, requires_grad=True)
code = ssd_kernels.linear_topk(x, w, k=4)
ssd_kernels.sparse_linear(code.values, code.indices, torch.randn(20, 2)).sum().backward()
print(code.indices.shape, w.grad.shape)
"""


def module(requirement: str) -> str:
    """What a requirement is imported as."""
    return re.split(r"[^\w-]", requirement)[0].replace("-", "_")


@cache
def requirements() -> dict[str, set[str]]:
    """Extra -> modules that it installs; "" for those that every installation has."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    given = setup.call_args.kwargs
    extras = {"": given["install_requires"], **given["extras_require"]}
    return {extra: set(map(module, names)) for extra, names in extras.items()}


def foreign(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all modules that an import or a call of _installed names."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "_installed":
            assert isinstance(node.args[0], ast.Constant)
            names = [node.args[0].value]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names | {"ssd", "ssd_kernels"}:
                yield top


def imports(package: str) -> dict[str, set[str]]:
    """Foreign module -> the files that import it, at their top or inside a function."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        for name in foreign(ast.parse(file.read_text(encoding="utf-8"))):
            found.setdefault(name, set()).add(file.relative_to(ROOT).as_posix())
    return found


def test_imports_are_seen() -> None:
    program = (
        "import os, numpy.linalg\nfrom ssd import step\n"
        'def f():\n  from rich.text import Text\n  _installed("timm", 1)'
    )
    assert set(foreign(ast.parse(program))) == {"numpy", "rich", "timm"}
    assert "torch" in imports("ssd_kernels")
    assert module("tomli>=2; python_version < '3.11'") == "tomli"


@pytest.mark.parametrize("package", ["ssd", "ssd_kernels"])
def test_every_import_is_required(package: str) -> None:
    offered = set().union(*(names for e, names in requirements().items() if e not in NOT_FOR_USERS))
    # tomli is in the standard library of Python 3.11 as tomllib.
    known = offered | {"tomllib"}
    assert {name: files for name, files in imports(package).items() if name not in known} == {}


def test_every_requirement_is_imported() -> None:
    used = imports("ssd").keys() | imports("ssd_kernels").keys()
    for extra, names in requirements().items():
        if extra not in NOT_FOR_USERS:
            assert names <= used, f"install_requires or extra {extra!r}"


@pytest.mark.parametrize("without", [set(), {"triton"}])
def test_kernels_alone(without: set[str]) -> None:
    hidden = set().union(*requirements().values()) - KERNELS_NEED | without
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sorted(hidden)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([3, 4]) torch.Size([20, 8])"
