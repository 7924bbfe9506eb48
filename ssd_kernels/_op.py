"""One life for a launcher: itself in eager mode, a torch.library operator while tracing.

So one autograd.Function an op serves both: torch.compile and torch.export trace into it as far as
the operators, of which they know the shapes of what comes out. An eager call crosses no operator's
boundary, which costs more than a small kernel.
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
    """Decorates a launcher of kernels, without autograd, whose annotations make a schema.

    Args:
        name: of the operator, "namespace::name".
        like: takes the launcher's arguments; gives empty tensors of the shapes that it returns.
        mutates: arguments that the launcher writes into. What it returns is always new.
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
