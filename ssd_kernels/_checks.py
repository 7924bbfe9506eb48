"""Argument checks shared by the ops; each raises before any work is done."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INHIBITIONS = ("mask", "subtract")


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating, of one dtype and on one device."""
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


def active_range(op: str, k: int, neurons: int) -> None:
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
    """x [.., d], weight [S R, d], bias [S R], 1 <= k <= R; S networks share out the rows of x."""
    floating(op, x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [R, d]")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [.., {weight.shape[1]}] "
            f"for weight {list(weight.shape)}"
        )
    shape(op, "bias", bias, (weight.shape[0],))
    blocks(op, networks, x=x.shape[:-1].numel(), weight=weight.shape[0])
    active_range(op, k, weight.shape[0] // networks)


def blocks(op: str, networks: int, **rows: int) -> None:
    """The rows of every named tensor can be shared out among the networks."""
    for name, count in rows.items():
        if networks < 1 or count % networks:
            raise ValueError(f"{op}: blocks={networks} must divide the {count} rows of {name}")


def counter(op: str, name: str, tensor: Tensor | None, like: Tensor, neurons: int) -> None:
    """An int32 or int64 tensor [R] on the device of `like`."""
    if tensor is None:
        return
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; use torch.int64 or torch.int32")
    shape(op, name, tensor, (neurons,))
    same_device(op, "the input", like, name, tensor)


def code(op: str, values: Tensor, indices: Tensor) -> None:
    """values [.., K] and indices [.., K] int64 of one shape, on one device."""
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices have dtype {indices.dtype}; use torch.int64")
    if values.shape != indices.shape:
        raise ValueError(
            f"{op}: values have shape {list(values.shape)} but indices {list(indices.shape)}"
        )
    same_device(op, "values", values, "indices", indices)
