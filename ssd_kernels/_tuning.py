"""Shipped launch configurations: plain data and one lookup, no autotuning at run time.

A row is (upper bounds on the shape, configuration). The first row whose bounds all hold serves, so
rows go from small to large and the last has no bounds. A GPU without rows of its own takes
"default": tiles that fit the shared memory and registers of every supported architecture. Those
of topk, segments and sparse_linear are the fastest of an H100; others were never tuned. PROGRAMS is
the most that are launched per multiprocessor.
"""

from __future__ import annotations

from functools import lru_cache

import torch

Config = dict[str, int]
Rows = tuple[tuple[Config, Config], ...]

PLAIN = {"DESCRIPTORS": 0, "PERSISTENT": 0, "TOGETHER": 64, "num_stages": 3}
SMALL = {**PLAIN, "BM": 64, "BN": 64, "BK": 64, "num_warps": 4}
DESCRIBED = {"DESCRIPTORS": 1, "PERSISTENT": 1, "TOGETHER": 8, "num_stages": 3}

# Whoever has kernels of their own adds an entry.
TABLE: dict[str, dict[str, Rows]] = {
    "topk": {
        "default": (
            ({"neurons": 512, "k": 64}, {"TILE": 512, "PROGRAMS": 64, "num_warps": 1}),
            ({"neurons": 4096, "k": 64}, {"TILE": 1024, "PROGRAMS": 32, "num_warps": 1}),
            ({"k": 64}, {"TILE": 512, "PROGRAMS": 32, "num_warps": 1}),
            ({}, {"TILE": 2048, "PROGRAMS": 32, "num_warps": 4}),
        ),
    },
    # Tiles of the product that keeps group keys. Tensor descriptors make the large one (one H100:
    # 3.4 ms in place of 4.3); PERSISTENT programs walk over tiles and overlap them.
    "linear_topk": {
        "default": (
            ({"batch": 128}, SMALL),
            ({"graded": 0}, {**PLAIN, "BM": 128, "BN": 128, "BK": 32, "num_warps": 8}),
            ({}, {**SMALL}),
        ),
        **{
            family: (
                ({"batch": 128}, SMALL),
                (
                    {"graded": 0, "aligned": 0},
                    {**PLAIN, "BM": 128, "BN": 128, "BK": 32, "num_warps": 8},
                ),
                ({"graded": 0}, {**DESCRIBED, "BM": 128, "BN": width, "BK": 64, "num_warps": 8}),
                ({}, {**SMALL}),
            )
            # 256 columns spill on sm100, and larger tiles wherever a product has three keys.
            for family, width in (("sm90", 256), ("sm100", 128))
        },
    },
    "linear_inhibit": {"default": (({}, {"BM": 16, "BN": 256, "num_warps": 4}),)},
    "count_active": {"default": (({}, {"BLOCK": 512, "num_warps": 4}),)},
    "rank_slots": {"default": (({}, {"BLOCK": 16, "RIVALS": 256, "num_warps": 4}),)},
    "offsets": {"default": (({}, {"BLOCK": 128, "num_warps": 4}),)},
    "segments": {
        "default": (
            ({"width": 16}, {"SLOTS": 8, "BLOCK": 16, "num_warps": 1}),
            ({"width": 64}, {"SLOTS": 4, "BLOCK": 64, "num_warps": 1}),
            ({"width": 256}, {"SLOTS": 4, "BLOCK": 256, "num_warps": 2}),
            ({"width": 1024}, {"SLOTS": 2, "BLOCK": 1024, "num_warps": 2}),
            ({}, {"SLOTS": 2, "BLOCK": 2048, "num_warps": 4}),
        ),
    },
    "sparse_linear": {
        "default": (
            ({"outputs": 16}, {"SLOTS": 16, "BLOCK": 16, "num_warps": 1}),
            ({"outputs": 64}, {"SLOTS": 16, "BLOCK": 64, "num_warps": 2}),
            # A slice of weight 256 columns wide stays in L2 while every sample reads it. One warp
            # holds whole rows of the slice, so slots are summed without a barrier.
            ({}, {"SLOTS": 16, "BLOCK": 256, "num_warps": 1}),
        ),
        # 16 slots spill here.
        "sm100": (
            ({"outputs": 16}, {"SLOTS": 16, "BLOCK": 16, "num_warps": 1}),
            ({"outputs": 64}, {"SLOTS": 16, "BLOCK": 64, "num_warps": 2}),
            ({}, {"SLOTS": 8, "BLOCK": 256, "num_warps": 1}),
        ),
    },
    "row_update": {
        "default": (
            ({"width": 64}, {"BLOCK": 64, "num_warps": 1}),
            ({"width": 256}, {"BLOCK": 256, "num_warps": 2}),
            ({"width": 1024}, {"BLOCK": 1024, "num_warps": 4}),
            ({}, {"BLOCK": 2048, "num_warps": 8}),
        ),
    },
}


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
        return 2  # Triton's interpreter: enough to share rows out
    return torch.cuda.get_device_properties(device).multi_processor_count
