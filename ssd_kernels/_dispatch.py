"""Which implementation serves a call: one place, one environment switch.

Every op registers its implementations by name. `reference` is always there and is the
specification; `torch` is the fast path in plain PyTorch; `triton` serves CUDA tensors of at most 32
bits, `numba`, where it is installed, float32 on a CPU. SSD_KERNELS_IMPL names the implementation
for every op that has it; `impl=` on the call wins over it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

ENVIRONMENT = "SSD_KERNELS_IMPL"
TRITON, NUMBA = (find_spec(name) is not None for name in ("triton", "numba"))
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Modes in which torch operators on real tensors give tensors without data.
TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
VMAP = torch._C._dispatch_key_parse("VmapMode")  # of torch.autograd.grad(is_grads_batched=True)
# Asked at import: torch.compile of torch 2.6 cannot trace the question.
AUTOCASTS = [
    kind for kind in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(kind)
]
TABLES: dict[str, dict[str, Callable[..., Any]]] = {}  # op -> its implementations
PLAIN = ("reference", "torch")  # which launch no kernel of their own


def interpreted() -> bool:
    """Whether Triton runs its kernels on CPU tensors, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jacrev, ..) is running."""
    return torch._C._are_functorch_transforms_active()


def tracing() -> bool:
    """Whether torch.compile or torch.export is running."""
    return torch.compiler.is_compiling()


def differentiable() -> bool:
    """Whether a backward must itself be differentiable; a compiled one never is."""
    return torch.is_grad_enabled() and not tracing()


def valueless(tensor: Tensor) -> bool:
    """Whether no values can be read: traced, batched, or a tensor without data."""
    return (
        tracing()
        or tensor.is_meta
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        or torch.jit.is_tracing()
        or torch._C._dispatch_tls_is_dispatch_key_included(VMAP)
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACERS)
        )
    )


def symbolic(tensor: Tensor) -> bool:
    """Whether a call needs operators that can be traced, batched and differentiated."""
    return valueless(tensor) or transformed() or forward_ad._current_level >= 0


def register(op: str, **implementations: Callable[..., Any]) -> None:
    """Registers the implementations of `op` whose library is installed."""
    there = {"triton": TRITON, "numba": NUMBA}
    TABLES[op] = {name: f for name, f in implementations.items() if there.get(name, True)}


def choose(
    op: str,
    impl: str | None,
    tensor: Tensor,
    traced: str = "reference",
    served: bool = True,
    looped: bool = True,
) -> Callable[..., Any]:
    """The implementation of `op` for inputs like `tensor`.

    Args:
        impl: a name, or None: what the environment names, else the default of the device.
        traced: serves the inputs that `symbolic` describes. It reads no value, and each of its
            torch operators has derivatives, a batching rule and a shape function. While torch is
            tracing the kernels serve as operators, see _op.
        served, looped: False: "torch" takes the place of Triton's kernels, or of numba's loops.

    Raises:
        ValueError: the op has no implementation of that name.
    """
    implementations = TABLES[op]
    if impl is None:
        forced = os.environ.get(ENVIRONMENT)
        impl = _default(implementations, tensor)
        if forced is not None and forced in implementations:
            impl = forced
    if impl not in implementations:
        known = ", ".join(sorted(implementations))
        raise ValueError(f"{op}: impl={impl!r} is not one of {known}")
    if impl == "triton" and not (served and tensor.dtype in TRITON_DTYPES):
        impl = "torch"
    if impl == "numba" and not (looped and tensor.is_cpu and tensor.dtype == torch.float32):
        impl = "torch"
    if tracing() and impl == "triton" and not transformed():
        return implementations[impl]
    return implementations[traced if symbolic(tensor) else impl]


def _default(implementations: Mapping[str, Callable[..., Any]], tensor: Tensor) -> str:
    if "triton" in implementations and tensor.is_cuda and tensor.dtype in TRITON_DTYPES:
        return "triton"
    if "numba" in implementations and tensor.is_cpu and tensor.dtype == torch.float32:
        return "numba"
    return "torch" if "torch" in implementations else "reference"


def autocast(tensor: Tensor, *others: Tensor | None) -> list[Any]:
    """The floating inputs as torch.autocast would hand them to a matrix product."""
    kind = tensor.device.type
    tensors = [tensor, *others]
    if (
        kind not in AUTOCASTS
        or not torch.is_autocast_enabled(kind)
        or tensor.dtype == torch.float64
    ):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [None if t is None else t.to(dtype) for t in tensors]


def as_given(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switches torch.autocast off: the inputs are in the dtype that counts."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCASTS else nullcontext()


def flattened(x: Tensor) -> Tensor:
    """[.., n] -> [rows, n], for n = 0 too."""
    width = x.shape[-1]
    return x.reshape(-1 if width else math.prod(x.shape[:-1]), width)


def unflattened(flat: Tensor, shape: Sequence[int]) -> Tensor:
    """`flat` in another shape, and no view of it: users may write into what an op returns."""
    return torch.ops.aten._unsafe_view(flat, shape)
