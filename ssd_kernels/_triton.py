"""Triton where it is installed: `from ssd_kernels._triton import jit, tl, triton`.

Without Triton a kernel stays a plain function that nothing calls, so every module still imports.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit: Any = triton.jit
except ImportError:  # the torch implementations serve

    class tl:  # type: ignore[no-redef]
        """The one name that modules use outside their kernels."""

        constexpr = int

    def jit(fn: Any = None, **_: Any) -> Any:
        return fn if fn is not None else jit


__all__ = ["jit", "tl", "triton"]
