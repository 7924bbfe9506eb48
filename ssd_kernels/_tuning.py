"""Shipped launch configurations: plain data and one lookup, no autotuning at run time.

A row is (upper bounds on the shape, configuration). The first row whose bounds all hold serves, so
rows go from small to large and the last has no bounds. A GPU without rows of its own takes
"default": tiles that fit the shared memory and registers of every supported architecture. Those
of topk, segments and sparse_linear are the fastest on one H100; the others were never tuned.
PROGRAMS limits the programs launched per multiprocessor.
"""

from __future__ import annotations

from functools import lru_cache

import torch

Config = dict[str, int]
Rows = tuple[tuple[Config, Config], ...]

TABLE: dict[str, dict[str, Rows]] = {}  # every file of kernels adds its own


def config(op: str, device: torch.device, **shape: int) -> Config:
    """The launch configuration of `op` for inputs of this shape on this device."""
    for bounds, chosen in rows(op, _family(device)):
        if all(shape[name] <= bound for name, bound in bounds.items()):
            return chosen
    raise LookupError(f"{op}: the last row of _tuning.TABLE must have no bounds")


def rows(op: str, family: str) -> Rows:
    """Every row that `op` ships for a GPU family."""
    return TABLE[op].get(family, TABLE[op]["default"])


@lru_cache
def _family(device: torch.device) -> str:
    if device.type != "cuda":
        return "default"  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # Triton's interpreter: enough to split rows
    return torch.cuda.get_device_properties(device).multi_processor_count
