"""Every op by its name, public or private, for what tests them all."""

import importlib
import re
from pathlib import Path
from typing import Any

from ssd.ops.batch import draw_batch, tally
from ssd.ops.code_gram import code_gram
from ssd.ops.dense_update import dense_update
from ssd.ops.distill import distill
from ssd.ops.distill_code import distill_code
from ssd.ops.gate_gradient import gate_gradient
from ssd_kernels import (
    count_active,
    linear_inhibit,
    linear_topk,
    row_update,
    sparse_linear,
    topk,
)
from ssd_kernels._graded_code import linear_active, linear_code
from ssd_kernels._row_gradient import row_gradient

__all__ = [
    "code_gram",
    "count_active",
    "dense_update",
    "distill",
    "distill_code",
    "draw_batch",
    "gate_gradient",
    "linear_active",
    "linear_code",
    "linear_inhibit",
    "linear_topk",
    "modules",
    "row_gradient",
    "row_update",
    "sparse_linear",
    "tally",
    "topk",
]
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ssd_kernels", "ssd")


def modules() -> list[Any]:
    """Those of the packages that define or launch kernels."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for file in files
        if re.search(r"@jit|_kernel\[", file.read_text(encoding="utf-8"))
    ]
