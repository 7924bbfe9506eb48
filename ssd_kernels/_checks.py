"""Argument checks shared by the ops; each raises before any work is done."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import cast

import torch
from torch import Tensor

from ssd_kernels import _dispatch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INHIBITIONS = ("mask", "subtract")
# 1: check indices on a GPU too, which waits for the device.
ENVIRONMENT = "SSD_KERNELS_CHECK_INDICES"


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors have one floating dtype and one device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    (first_name, first), *_ = given.items()
    for name, tensor in given.items():
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; use a floating dtype")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; "
                "convert one of them"
            )
        same_device(op, first_name, first, name, tensor)


def same_device(op: str, first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device} but {first_name} is on {first.device}; "
            "move one of them"
        )


def whole(op: str, name: str, value: object, least: float = 0) -> None:
    """An integer of at least `least`, not a bool."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name}={value!r} must be an integer")
    if value < least:
        raise ValueError(f"{op}: {name}={value} must be at least {least}")


def number(op: str, name: str, value: object, positive: bool = False) -> None:
    """A finite number of at least 0, or above 0 if `positive`; not a bool."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name}={value!r} must be a number")
    value = cast(float, value)
    if not (0 < value < math.inf if positive else 0 <= value < math.inf):
        raise ValueError(
            f"{op}: {name}={value} must be finite and {'above' if positive else 'at least'} 0"
        )


def active_range(op: str, k: int, neurons: int) -> None:
    whole(op, "k", k, -math.inf)
    if not 1 <= k <= neurons:
        raise ValueError(f"{op}: k={k} must lie in 1..{neurons}, the number of neurons")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected {list(expected)}")


def inhibition(op: str, name: str) -> None:
    if name not in INHIBITIONS:
        raise ValueError(f"{op}: inhibition={name!r} is not one of {', '.join(INHIBITIONS)}")


def linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, networks: int = 1
) -> None:
    """x [.., d], weight [S R, d], bias [S R], 1 <= k <= R; S networks divide the rows of x."""
    floating(op, x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [R, d]")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [.., {weight.shape[1]}] "
            f"for weight {list(weight.shape)}"
        )
    shape(op, "bias", bias, (weight.shape[0],))
    divides(op, networks, x=math.prod(x.shape[:-1]), weight=weight.shape[0])
    active_range(op, k, weight.shape[0] // networks)


def divides(op: str, networks: int, **rows: int) -> None:
    """The number of networks divides the number of rows of every named tensor."""
    whole(op, "networks", networks, -math.inf)
    for name, count in rows.items():
        if networks != 1 and (networks < 1 or count % networks):
            raise ValueError(f"{op}: networks={networks} must divide the {count} rows of {name}")


def response(
    op: str, gaba: Tensor | None, like: Tensor, neurons: int, positive: bool = False
) -> None:
    """gaba [R] floating on the device of `like`; `positive`: every entry in (0, 1], on a CPU."""
    if gaba is None:
        return
    if gaba.dtype not in FLOATING:
        raise TypeError(f"{op}: gaba has dtype {gaba.dtype}; use a floating dtype")
    shape(op, "gaba", gaba, (neurons,))
    same_device(op, "x", like, "gaba", gaba)
    if positive and gaba.is_cpu and not _dispatch.symbolic(gaba):
        low, high = (float(bound) for bound in gaba.aminmax())
        if not 0 < low <= high <= 1:
            raise ValueError(f"{op}: gaba runs from {low:g} to {high:g}, expected in (0, 1]")


def counter(op: str, name: str, tensor: Tensor | None, like: Tensor, neurons: int) -> None:
    """An int32 or int64 tensor [R] on the device of `like`."""
    if tensor is None:
        return
    in_place(op, name)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; use torch.int64 or torch.int32")
    shape(op, name, tensor, (neurons,))
    same_device(op, "the input", like, name, tensor)


def code(op: str, values: Tensor, indices: Tensor, neurons: int) -> None:
    """values [.., K] and indices [.., K] int64 in 0..R-1 of one shape, on one device."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices have dtype {indices.dtype}; use torch.int64")
    if values.shape != indices.shape:
        raise ValueError(
            f"{op}: values have shape {list(values.shape)} but indices {list(indices.shape)}"
        )
    if not indices.dim():
        raise ValueError(f"{op}: indices have shape [], expected [.., K]")
    same_device(op, "values", values, "indices", indices)
    in_range(op, "indices", indices, neurons)


def in_range(op: str, name: str, numbers: Tensor, limit: int) -> None:
    """Every number lies in 0..limit-1; checked on a CPU, and elsewhere if ENVIRONMENT is 1."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(numbers):
            numbers = torch._C._functorch.get_unwrapped(numbers)
    if _dispatch.valueless(numbers) or not numbers.numel():
        return
    if not numbers.is_cpu and (
        os.environ.get(ENVIRONMENT) != "1" or torch.cuda.is_current_stream_capturing()
    ):
        return
    low, high = (int(bound) for bound in numbers.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} run from {low} to {high}, expected 0..{limit - 1}")


def in_place(op: str, what: str) -> None:
    """A torch.func transform sees results, not changes to tensors outside the function."""
    if not torch.compiler.is_compiling() and _dispatch.transformed():
        raise RuntimeError(
            f"{op}: cannot update {what} in place inside a torch.func transform; do it outside"
        )
