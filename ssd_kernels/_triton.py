"""Triton where it is installed: `from ssd_kernels._triton import jit, tl, triton`.

Without Triton a kernel stays a plain function that nothing calls, so every module still imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # the torch implementations serve

    class tl:  # type: ignore[no-redef]
        """What modules name outside their kernels."""

        constexpr = int

    def jit(fn: Any = None, **_: Any) -> Any:
        return fn if fn is not None else jit


__all__ = ["AotCase", "jit", "tl", "triton"]


class AotCase(NamedTuple):
    """One shipped launch, for compilation ahead of time (tests/kernels/aot.py)."""

    name: str
    kernel: Any
    # Argument -> Triton type ("*fp32", "i64"). "i32:16" says that the value is divisible by 16, as
    # Triton specialises at run time; pointers are, but for "*fp32:1". Constexprs are left out.
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]  # num_warps, num_stages
