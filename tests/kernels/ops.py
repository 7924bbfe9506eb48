"""Every op by its name, public or private, for what tests them all."""

import importlib
import re
from pathlib import Path
from typing import Any

from ssd.batch import draw_batch, tally
from ssd.code_gram import code_gram
from ssd.dense_update import dense_update
from ssd.distill import distill
from ssd.distill_code import distill_code
from ssd.gate_gradient import gate_gradient
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
    files = [file for package in PACKAGES for file in sorted((ROOT / package).glob("*.py"))]
    return [
        importlib.import_module(f"{file.parent.name}.{file.stem}")
        for file in files
        if re.search(r"@jit|_kernel\[", file.read_text(encoding="utf-8"))
    ]
