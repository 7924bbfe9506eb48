"""Builds a case: its inputs, the providers to compare, the gate and the floor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import coded, selecting
from benchmarks.cases import Case, Shape

BUILDERS: dict[str, Callable[[Shape, torch.device], Case]] = {
    "topk": selecting.topk,
    "linear_topk": selecting.linear_topk,
    "linear_active": selecting.linear_active,
    "linear_inhibit": selecting.linear_inhibit,
    "sparse_linear": coded.sparse_linear,
    "count_active": coded.count_active,
    "code_gram": coded.code_gram,
    "row_update": coded.row_update,
}


def build(shape: Shape, device: torch.device) -> Case:
    """The case of one line of the tables in cases.py."""
    return BUILDERS[shape.op](shape, device)
