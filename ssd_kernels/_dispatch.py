"""Which implementation serves a call: one place, one environment switch.

Every op names its implementations in a table {name: function}. `reference` is always there and is
the specification; `torch` is the fast path in plain PyTorch; `triton` serves CUDA tensors of at
most 32 bits. SSD_KERNELS_IMPL names the implementation for every op that has it; `impl=` on the
call wins over it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

ENVIRONMENT = "SSD_KERNELS_IMPL"
TRITON = find_spec("triton") is not None
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What serves in place of "triton" while torch.compile traces; filled by _library.
COMPILED: dict[str, Callable[..., Any]] = {}


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(
    op: str, implementations: Mapping[str, Callable[..., Any]], impl: str | None, tensor: Tensor
) -> Callable[..., Any]:
    """The implementation of `op` for inputs like `tensor`; ValueError for an unknown name."""
    if impl is None:
        forced = os.environ.get(ENVIRONMENT)
        impl = _default(implementations, tensor)
        if forced is not None and forced in implementations:
            impl = forced
    if impl not in implementations:
        known = ", ".join(sorted(implementations))
        raise ValueError(f"{op}: impl={impl!r} is not one of {known}")
    if impl == "triton" and torch.compiler.is_compiling():
        # Without an operator of its own, what torch.compile can trace serves.
        return COMPILED.get(op, implementations["reference"])
    return implementations[impl]


def _default(implementations: Mapping[str, Callable[..., Any]], tensor: Tensor) -> str:
    if "triton" in implementations and tensor.is_cuda and tensor.dtype in TRITON_DTYPES:
        return "triton"
    return "torch" if "torch" in implementations else "reference"


def autocast(tensor: Tensor, *others: Tensor | None) -> list[Any]:
    """The floating inputs as torch.autocast would hand them to a matrix product."""
    kind = tensor.device.type
    tensors = [tensor, *others]
    if not torch.is_autocast_enabled(kind) or tensor.dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [None if t is None else t.to(dtype) for t in tensors]
