"""Every op, public or private, and the cases that the shared tests run of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from tests.kernels.cases import Op

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ssd_kernels", "ssd")
# Launches are named by the first call that leads to them, and drawn cases by their number: what
# comes first stays first. Other files of cases follow.
FIRST = [
    *["topk", "linear_topk", "linear_inhibit", "linear_active", "linear_code", "sparse_linear"],
    *["row_gradient", "row_update", "count_active", "code_gram", "distill", "dense_update"],
    *["draw_batch", "gate_gradient", "tally", "distill_code"],
]


def ops() -> dict[str, Op]:
    files = {file.stem for file in (Path(__file__).parent / "cases").glob("[a-z]*.py")}
    names = [*FIRST, *sorted(files - set(FIRST))]
    return {name: importlib.import_module(f"tests.kernels.cases.{name}").OP for name in names}


OPS = ops()


def cases(field: str) -> dict[str, tuple[Op, Any]]:
    """What the ops have in this field of Op, by op and case, and the op."""
    return {
        f"{name} {case}".strip(): (op, given)
        for name, op in OPS.items()
        for case, given in getattr(op, field).items()
    }


def modules() -> list[Any]:
    """Those of the packages that define or launch kernels."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for file in files
        if re.search(r"@jit|_kernel\[", file.read_text(encoding="utf-8"))
    ]
