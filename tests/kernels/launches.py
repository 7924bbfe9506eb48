"""What the launchers launch: a grid of calls to all ops, recorded without a GPU.

The tensors are on the meta device, so any shape is free. Triton itself specialises the arguments,
for a GPU that gpus.present names. Its hook before a compilation takes the launch down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import gpus
import torch

from benchmarks import cases
from ssd_kernels import _dispatch, _tuning
from tests.kernels.cases import BF16, FP16, FP32, FP64, gradients
from tests.kernels.ops import OPS, modules

SHORT: dict[Any, str] = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}


class Call(NamedTuple):
    """One call of an op on meta tensors."""

    op: str
    dtype: torch.dtype
    given: dict[str, Any]

    def __str__(self) -> str:
        words = [_word(name, value) for name, value in self.given.items()]
        return " ".join([self.op, SHORT[self.dtype], *words])


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name}={SHORT.get(value, value)}"


class Launch(NamedTuple):
    """What Triton compiles before a launch; equal launches are one."""

    call: str  # the first that led to it
    kernel: Any
    warps: int
    specialization: str  # as JITFunction.preload takes it

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def constants(self) -> dict[str, Any]:
        """What Triton compiles in: constexprs, and sizes of 1."""
        data = json.loads(self.specialization)
        names = (self.kernel.arg_names[position] for (position,) in data["constant_keys"])
        return dict(zip(names, data["constant_vals"], strict=True))

    def aligned(self) -> set[str]:
        """The arguments that are known to be divisible by 16."""
        data = json.loads(self.specialization)
        attributes = zip(data["attrs_keys"], data["attrs_vals"], strict=True)
        return {
            self.kernel.arg_names[position]
            for (position,), given in attributes
            if ["tt.divisibility", 16] in given
        }


class Recording(NamedTuple):
    launches: list[Launch]
    rows: set[tuple[str, int]]  # (op, row of its table) that some call took


@lru_cache
def grid(family: str) -> Recording:
    """What all calls of GRID lead to on this family."""
    return record(family, GRID)


def record(family: str, calls: Sequence[Call]) -> Recording:
    """Every distinct launch of these calls on this family, and what it took from _tuning."""
    seen: dict[tuple[str, str], Launch] = {}
    rows: set[tuple[str, int]] = set()
    with _family(family, rows):
        for call in calls:
            with _hooked(seen, str(call)):
                _run(call)
    return Recording(list(seen.values()), rows)


def _run(call: Call) -> None:
    given = dict(call.given)
    backward = given.pop("backward", False)
    draw, run = OPS[call.op].without_data(call.dtype, given)
    results = run(None)
    if backward:
        gradients(results, draw.leaves)


def kernels() -> set[str]:
    """The names of all kernels that the packages have."""
    return {name for module in modules() for name in vars(module) if name.endswith("_kernel")}


@contextmanager
def _hooked(seen: dict[tuple[str, str], Launch], call: str) -> Iterator[None]:
    """Adds every launch that is new, and keeps Triton from compiling and launching it."""

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launch = Launch(call, fn.jit_function, compile["num_warps"], compile["specialization_data"])
        seen.setdefault((launch.name, launch.specialization), launch)
        return True

    with patch.object(*_hook_place(), hook):
        yield


@contextmanager
def named(family: str, names: list[str]) -> Iterator[None]:
    """Adds the name of every kernel that is launched, in order; nothing is compiled."""

    def hook(*, fn: Any, **_: Any) -> bool:
        names.append(str(fn.jit_function.fn.__name__))
        return True

    with _family(family, set()), patch.object(*_hook_place(), hook):
        yield


def _hook_place() -> tuple[Any, str]:
    try:
        from triton import knobs
    except ImportError:  # before Triton 3.4
        from triton.runtime.jit import JITFunction

        return JITFunction, "cache_hook"
    return knobs.runtime, "jit_cache_hook"


@contextmanager
def _family(family: str, rows: set[tuple[str, int]]) -> Iterator[None]:
    """Ops take meta tensors for tensors on a GPU of this family."""
    look_up = _tuning.config

    def config(op: str, device: torch.device, **shape: int) -> _tuning.Config:
        chosen = look_up(op, device, **shape)
        table = [row for _, row in _tuning.rows(op, family)]
        rows.add((op, next(number for number, row in enumerate(table) if row is chosen)))
        return chosen

    hip = "6.4" if gpus.GPUS[family].backend == "hip" else None
    with ExitStack() as stack:
        for patched in (
            patch.object(_tuning, "config", config),
            patch.object(_tuning, "_family", lambda _: family),
            patch.object(_tuning, "multiprocessors", lambda _: gpus.GPUS[family].multiprocessors),
            patch.object(torch.version, "hip", hip),
            patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
            patch.object(_dispatch, "symbolic", lambda _: False),
            patch.dict(os.environ, {_dispatch.ENVIRONMENT: "triton"}),
        ):
            stack.enter_context(patched)
        stack.enter_context(gpus.present(family))
        yield


def _benchmarked(shape: cases.Shape) -> Call:
    """The call that a line of the benchmarks' table times."""
    backward = {"backward": True} if shape.mode == "full" else {}
    return Call(shape.op, shape.dtype, shape.sizes | backward)


GRID = [
    *map(_benchmarked, cases.CUDA),
    *(Call(name, *given) for name, op in OPS.items() for given in op.compiled),
]
