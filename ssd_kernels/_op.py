"""Launchers of kernels: plain functions in eager mode, torch.library operators while tracing.

So one autograd.Function per op serves both. torch.compile and torch.export trace into it and stop
at the operators, whose output shapes they know. An eager call skips the operator's dispatch, which
takes longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from ssd_kernels import _dispatch

P = ParamSpec("P")
T = TypeVar("T")


def operator(
    name: str, like: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a launcher without autograd; its annotations become the operator's schema.

    Args:
        name: "namespace::name" of the operator.
        like: takes the launcher's arguments and returns empty tensors like its results.
        mutates: arguments that the launcher writes into; it returns new tensors only.
    """

    def decorate(launch: Callable[P, T]) -> Callable[P, T]:
        traced = torch.library.custom_op(name, launch, mutates_args=mutates)
        traced.register_fake(like)

        @wraps(launch)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if _dispatch.tracing():
                return traced(*args, **kwargs)
            return launch(*args, **kwargs)

        return call

    return decorate
