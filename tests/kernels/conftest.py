"""Every op's tests run over its implementations: here, in Triton's interpreter, on CUDA.

A test takes `device` and names `impl`; Triton needs either CUDA or TRITON_INTERPRET=1, which must
be set before Triton is imported, so tests/test_interpreter.py starts a process of its own.
"""

import os

import pytest
import torch
from torch import Tensor

from ssd_kernels import _dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_only(*values: object) -> object:
    """A parameter that runs where Triton can: in the interpreter or on CUDA."""
    usable = INTERPRETED or torch.cuda.is_available()
    reason = "Triton needs CUDA or TRITON_INTERPRET=1"
    return pytest.param(*values, marks=pytest.mark.skipif(not usable, reason=reason))


NUMBA = ["numba"] if _dispatch.NUMBA and not (INTERPRETED or torch.cuda.is_available()) else []


def same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit; on CUDA, where a library's product depends on the alignment, up to rounding."""
    exact = {} if got.is_cuda else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(got, expected, **exact)
