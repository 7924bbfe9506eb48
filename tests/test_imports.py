"""Which of our modules imports which: one direction, nothing for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ssd_kernels", "ssd")
COMMANDS = {f"ssd.{name}" for name in ("__main__", "train", "sweep", "compare")} | {
    f"ssd.{name}.__main__" for name in ("embed", "peers", "reproduce")
}
# Modules of ssd, and folders of them; a module imports from the lines above its own.
LAYERS = """
errors
storage executors
data metrics ops
activations models
losses
distillation regularizers
config
structure
learner
step
cuda_graph
trainer
callbacks
storage.run_folder storage.dataset_file
runs
progress
study tables figures cli
page api
embed peers
reproduce
"""


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(f): f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))}


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Modules among `known` that are named by an import anywhere in the tree."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from a import b` loads a.b where that is a module, else what a itself holds.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = name if name in known else name.rpartition(".")[0]
            if found in known:
                yield found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> what it imports of ours, at its top or inside a function."""
    known = set(modules())
    return {
        name: set(imported(ast.parse(file.read_text(encoding="utf-8")), known))
        for name, file in modules().items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the one before it, and the first the last; [] if none do."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def type_checking(tree: ast.AST) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield node


def test_imports_are_seen() -> None:
    assert {"ssd.learner", "ssd_kernels", "ssd_kernels._graded_code"} <= imports()["ssd.step"]
    inside = "def f():\n  from ssd import step\n  import ssd.runs\n  import os, ssd_other"
    known = {"ssd", "ssd.step", "ssd.runs"}
    assert set(imported(ast.parse(inside), known)) == {"ssd.step", "ssd.runs"}


def test_circles_are_found() -> None:
    found = circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert found[0] == found[-1]
    assert set(found) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle(package: str) -> None:
    # A package's own module is loaded before any of the others, whoever asks.
    graph = {
        name: {other for other in found if other.startswith(f"{package}.")}
        for name, found in imports().items()
        if name.startswith(f"{package}.")
    }
    assert circle(graph) == []


def layer(module: str) -> int:
    """The line of LAYERS that names a module of ssd, or else its folder; commands come last."""
    if module in COMMANDS:
        return len(LAYERS.splitlines())
    lines = {
        name: number for number, line in enumerate(LAYERS.splitlines()) for name in line.split()
    }
    if module == "ssd":
        return 0
    name = module.removeprefix("ssd.")
    return lines[name] if name in lines else lines[name.partition(".")[0]]


@pytest.mark.parametrize("module", [name for name in modules() if name.partition(".")[0] == "ssd"])
def test_ssd_imports_from_lower_layers(module: str) -> None:
    def allowed(other: str) -> bool:
        folder = module.rpartition(".")[0]
        beside = (
            folder != "ssd" and other.startswith(f"{folder}.") and layer(other) == layer(module)
        )
        return beside or layer(other) < layer(module)

    ours = {other for other in imports()[module] if other.partition(".")[0] == "ssd"}
    assert {other for other in ours if not allowed(other)} == set()


def test_the_kernels_know_nothing_of_ssd() -> None:
    found = {
        name: others
        for name, all_of in imports().items()
        if name.partition(".")[0] == "ssd_kernels"
        and (others := {o for o in all_of if o.partition(".")[0] == "ssd"})
    }
    assert found == {}


def test_nothing_is_imported_for_type_checkers_alone() -> None:
    known = set(modules())
    found = {
        name: names
        for name, file in modules().items()
        for node in type_checking(ast.parse(file.read_text(encoding="utf-8")))
        if (names := set(imported(node, known)))
    }
    assert found == {}
