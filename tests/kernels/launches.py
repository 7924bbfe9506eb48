"""What the launchers launch: a grid of calls to the public ops, recorded without a GPU.

The tensors are on the meta device, so any shape is free. Triton itself specialises the arguments,
for a GPU that gpus.present names. Its hook before a compilation takes the launch down.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple
from unittest.mock import patch

import gpus
import torch
from torch import Tensor

from benchmarks import cases
from ssd_kernels import _dispatch, _segments, _tuning
from tests.kernels import ops as ours

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHORT: dict[Any, str] = {FP64: "fp64", FP32: "fp32", BF16: "bf16", FP16: "fp16"}


class Call(NamedTuple):
    """One call of an op of this module."""

    op: Callable[..., None]
    dtype: torch.dtype
    given: dict[str, Any]

    def __str__(self) -> str:
        words = [_word(name, value) for name, value in self.given.items()]
        return " ".join([self.op.__name__, SHORT[self.dtype], *words])


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
                call.op(call.dtype, **call.given)
    return Recording(list(seen.values()), rows)


def kernels() -> set[str]:
    """The names of all kernels that the packages have."""
    return {name for module in ours.modules() for name in vars(module) if name.endswith("_kernel")}


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


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return _new(*shape, dtype=dtype).requires_grad_()


def _code(dtype: torch.dtype, B: int, k: int) -> tuple[Tensor, Tensor]:
    return _leaf(B, k, dtype=dtype), _new(B, k, dtype=torch.int64)


def _counts(neurons: int, wanted: bool) -> Tensor | None:
    return _new(neurons, dtype=torch.int64) if wanted else None


def topk(
    dtype: torch.dtype, *, B: int, R: int, k: int, boost: bool = False, mask: bool = False
) -> None:
    ours.topk(
        _new(B, R, dtype=dtype),
        k,
        boost=_new(R, dtype=dtype) if boost else None,
        mask=_new(R, dtype=torch.bool) if mask else None,
    )


def linear_topk(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    S: int = 1,
    bias: bool = True,
    counts: bool = False,
    backward: bool = False,
    **options: Any,
) -> None:
    output = ours.linear_topk(
        _leaf(S * B, d, dtype=dtype),
        _leaf(S * R, d, dtype=dtype),
        k,
        _leaf(S * R, dtype=dtype) if bias else None,
        counts=_counts(S * R, counts),
        blocks=S,
        **options,
    )
    if backward:
        loss = output.values.sum()
        (loss if output.threshold is None else loss + output.threshold.sum()).backward()


def linear_inhibit(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    S: int = 1,
    bias: bool = True,
    gaba: bool = True,
    counts: bool = False,
    grad: bool = True,
    **options: Any,
) -> None:
    ours.linear_inhibit(
        _new(S * B, d, dtype=dtype),
        _new(S * R, d, dtype=dtype).requires_grad_(grad),
        k,
        _new(S * R, dtype=dtype) if gaba else None,
        _new(S * R, dtype=dtype) if bias else None,
        counts=_counts(S * R, counts),
        blocks=S,
        **options,
    )


def linear_code(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    R: int,
    k: int,
    width: int,
    S: int = 1,
    counts: bool = False,
    **options: Any,
) -> None:
    shapes = (S * B, d), (S * R, d), (S * R,)
    x, weight, gaba = (_new(*shape, dtype=dtype) for shape in shapes)
    given = {"counts": _counts(S * R, counts), "blocks": S, **options}
    ours.linear_code(x, weight, k, width, gaba, **given)


def sparse_linear(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    C: int,
    bias: bool = False,
    backward: bool = False,
    aligned: bool = True,
    frozen: bool = False,
) -> None:
    values, indices = _code(dtype, B, k)
    weight = _leaf(R, C, dtype=dtype) if aligned else _leaf(R, C + 1, dtype=dtype)[:, 1:]
    weight = weight.detach() if frozen else weight
    out = ours.sparse_linear(values, indices, weight, _leaf(C, dtype=dtype) if bias else None)
    if backward:
        out.backward(torch.empty_like(out))


def row_gradient(dtype: torch.dtype, *, B: int, R: int, k: int, d: int, sums: bool = False) -> None:
    values, indices = _code(dtype, B, k)
    inputs = _new(B, d, dtype=dtype)
    if sums:  # what a compiled graph calls
        _segments.row_gradients(values.detach(), inputs, indices, R, True, None, ())
    else:
        ours.row_gradient(values, inputs, indices, R)


def row_update(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    d: int,
    C: int = 10,
    S: int = 1,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = None,
) -> None:
    values, indices = _code(dtype, S * B, k)
    several = S > 1  # each with its rate and bound
    weights = [_new(S * R, width, dtype=dtype) for width in (d, C)]
    ours.row_update(
        weights,
        [values, torch.empty_like(values)],
        [_new(S * B, width, dtype=dtype) for width in (d, C)],
        indices,
        lr=_new(S, dtype=FP32) if several else 0.1,
        max_norm=_new(S, dtype=FP32) if several and max_norm is not None else max_norm,
        nonnegative=project,
        normalize=[project, False],
        momentum=momentum,
        buffers=[torch.empty_like(weight) for weight in weights] if momentum else None,
        blocks=S,
    )


def count_active(
    dtype: torch.dtype, *, B: int, R: int, k: int, stamp: bool = False, tensor_step: bool = False
) -> None:
    step = _new(dtype=torch.int64) if tensor_step else 7
    values, indices = _code(dtype, B, k)
    ours.count_active(values, indices, _new(R, dtype=torch.int64), _counts(R, wanted=stamp), step)


def code_gram(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    k: int,
    C: int = 0,
    labels: bool = True,
    into: torch.dtype = FP32,
) -> None:
    targets = _new(B, dtype=torch.int64) if labels else _new(B, C, dtype=dtype)
    cross = _new(R, C, dtype=into) if C else None
    ours.code_gram(*_code(dtype, B, k), _new(R, R, dtype=into), cross, targets if C else None)


def distill(
    dtype: torch.dtype,
    *,
    B: int,
    C: int,
    n: int = 0,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    """each: settings, and a weight, of each sample."""
    hidden = _new(B, n, dtype=dtype) if n else None
    ours.distill(
        _new(B, C, dtype=dtype),
        _new(B, dtype=torch.int64),
        _new(B, C, dtype=dtype) if teacher else None,
        hidden,
        hidden,
        **_settings(B, each),
        kl=kl,
        columns=_new(B, C, dtype=torch.bool) if columns else None,
    )


def dense_update(
    dtype: torch.dtype,
    *,
    R: int,
    d: int,
    C: int = 10,
    S: int = 1,
    project: bool = True,
    momentum: float = 0.0,
    max_norm: float | None = 1.0,
) -> None:
    weights = [_new(S * R, width, dtype=dtype) for width in (d, C)]
    several = S > 1  # each with its rate and bound
    ours.dense_update(
        weights,
        [torch.empty_like(weight) for weight in weights],
        lr=_new(S, dtype=FP32) if several else 0.1,
        max_norm=_new(S, dtype=FP32) if several and max_norm is not None else max_norm,
        nonnegative=project,
        normalize=[project, False],
        momentum=momentum,
        buffers=[torch.empty_like(weight) for weight in weights] if momentum else None,
        samples=_new(S, dtype=torch.int64) if several else None,
        blocks=S,
    )


def draw_batch(
    dtype: torch.dtype,
    *,
    B: int,
    d: int,
    S: int = 1,
    C: int = 10,
    n: int = 0,
    R: int = 0,
    teacher: bool = True,
) -> None:
    rows, stored = S * 6000, S * 6000
    ours.draw_batch(
        _new(stored, d, dtype=dtype),
        _new(stored, dtype=torch.int64),
        _new(S, 6000, dtype=torch.int64),
        _new(S, dtype=torch.int64),
        _new(dtype=torch.int64),
        B,
        _new(rows, C, dtype=dtype) if teacher else None,
        _new(rows, n, dtype=dtype) if n else None,
        _new(S * R, dtype=torch.int64) if R else None,
        _new(S, dtype=dtype) if R else None,
    )


def gate_gradient(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    n: int = 0,
    S: int = 1,
    gate: torch.dtype = FP32,
    gated: bool = True,
    transposed: bool = False,
) -> None:
    shape = (R, S * B) if transposed else (S * B, R)
    pair = [_new(*shape, dtype=kind) for kind in (dtype, gate)]
    ours.gate_gradient(
        *(t.T if transposed else t for t in pair),
        _new(S * B, n, dtype=dtype) if n else None,
        _new(S * R, dtype=torch.int64) if n else None,
        gated=gated,
    )


def tally(dtype: torch.dtype, *, B: int, C: int, S: int = 1, wider: bool = False) -> None:
    rows = S * B
    ours.tally(
        _new(rows, dtype=dtype),
        _new(rows, C, dtype=dtype),
        _new(rows, dtype=torch.int64),
        _new(rows, dtype=dtype),
        _new(S, dtype=FP64),
        _new(S, dtype=torch.int64),
        _new(S, dtype=torch.int64),
        _new(dtype=torch.int64),
        _new(rows, dtype=torch.bool) if wider else None,
        _new(S, dtype=torch.bool) if wider else None,
    )


def distill_code(
    dtype: torch.dtype,
    *,
    B: int,
    R: int,
    K: int,
    C: int,
    n: int = 0,
    teacher: bool = True,
    columns: bool = False,
    kl: str = "reverse",
    each: bool = False,
) -> None:
    """each: settings, and a weight, of each sample."""
    ours.distill_code(
        *_code(dtype, B, K),
        _new(R, C, dtype=dtype),
        _new(B, dtype=torch.int64),
        _new(B, C, dtype=dtype) if teacher else None,
        _new(B, n, dtype=dtype) if n else None,
        positions=_new(R, dtype=torch.int64) if n else None,
        **_settings(B, each),
        kl=kl,
        columns=_new(B, C, dtype=torch.bool) if columns else None,
    )


def _settings(B: int, each: bool) -> dict[str, Any]:
    if not each:
        return {"alpha": 0.5, "lam": 0.5, "temperature": 2.0}
    return {name: _new(B, dtype=FP32) for name in ("alpha", "lam", "temperature", "weight")}


def _benchmarked(shape: cases.Shape) -> Call:
    """The call that a line of the benchmarks' table times."""
    backward = {"backward": True} if shape.mode == "full" else {}
    return Call(globals()[shape.op], shape.dtype, shape.sizes | backward)


def _grid(op: Callable[..., None], *dtypes: torch.dtype, **given: Any) -> list[Call]:
    return [Call(op, dtype, given) for dtype in dtypes]


GRID = [
    *map(_benchmarked, cases.CUDA),
    # Every row of the tuning table, both ends of k, few long rows, one odd length.
    *_grid(topk, FP32, B=8192, R=512, k=64),
    *_grid(topk, FP32, BF16, FP16, B=8192, R=1024, k=32),
    *_grid(topk, FP32, B=8192, R=1000, k=7, boost=True, mask=True),
    *_grid(topk, FP32, B=8192, R=131072, k=256),
    *_grid(topk, FP32, BF16, B=8192, R=16384, k=32, boost=True, mask=True),
    *_grid(topk, FP32, B=16, R=131072, k=64),
    *_grid(topk, BF16, B=16, R=131072, k=256, boost=True, mask=True),
    *_grid(topk, FP32, B=5, R=50257, k=40),
    # The SDMLP and the sparse autoencoder: each path, training and not.
    *_grid(linear_topk, FP32, B=128, d=256, R=10000, k=10, bias=False, inhibition="subtract",
           counts=True),
    *_grid(linear_topk, FP32, BF16, B=1024, d=256, R=10000, k=10, threshold=True, counts=True,
           backward=True),
    *_grid(linear_topk, FP16, B=64, d=512, R=4096, k=32, backward=True),
    *_grid(linear_topk, BF16, B=64, d=512, R=4096, k=32),
    *_grid(linear_topk, FP32, B=128, d=1024, R=8192, k=10, counts=True, inhibition="subtract"),
    *_grid(linear_topk, FP32, B=8192, d=1024, R=131072, k=127),
    *_grid(linear_topk, FP32, B=8192, d=1024, R=262144, k=255),
    *_grid(linear_topk, BF16, B=8192, d=1024, R=1048576, k=32),
    *_grid(linear_topk, FP32, B=37, d=100, R=517, k=16, bias=False),
    *_grid(linear_topk, FP32, BF16, B=8192, d=1021, R=16384, k=32),  # no whole 16 bytes
    *_grid(linear_topk, FP32, S=10, B=128, d=512, R=10000, k=10, counts=True, bias=False),
    *_grid(linear_inhibit, FP32, B=128, d=256, R=10000, k=10, bias=False, counts=True,
           inhibition="mask"),
    *_grid(linear_inhibit, BF16, B=128, d=256, R=10000, k=10, gaba=False, grad=False),
    *_grid(linear_inhibit, FP32, B=128, d=64, R=200, k=200),
    *_grid(linear_inhibit, FP32, S=10, B=128, d=256, R=1000, k=10, counts=True),
    *_grid(linear_code, FP32, B=128, d=256, R=10000, k=10, width=64, counts=True),
    *_grid(linear_code, FP32, B=1024, d=256, R=10000, k=10, width=64, inhibition="mask"),
    *_grid(linear_code, FP32, S=10, B=128, d=512, R=1000, k=10, width=128, counts=True),
    *_grid(linear_code, FP32, B=1024, d=1024, R=65536, k=32, width=128),
    # Widths of every row of the tables "sparse_linear" and "segments".
    *(call for C in (10, 64, 256, 1000) for call in
      _grid(sparse_linear, FP32, BF16, B=128, R=10000, k=32, C=C, bias=True, backward=True)),
    *_grid(sparse_linear, FP16, B=8192, R=65536, k=64, C=1024, backward=True),
    *_grid(sparse_linear, FP32, B=128, R=10000, k=10, C=64, aligned=False, backward=True),
    *_grid(sparse_linear, FP32, B=128, R=10000, k=10, C=10, frozen=True, backward=True),
    *_grid(row_gradient, FP32, B=128, R=10000, k=10, d=256, sums=True),
    *(call for d in (64, 256, 1024, 4096) for call in
      _grid(row_update, FP32, BF16, B=128, R=10000, k=10, d=d)),
    *_grid(row_update, FP32, B=128, R=10000, k=10, d=256, project=False),
    *_grid(row_update, FP32, BF16, B=128, R=10000, k=10, d=256, momentum=0.9, max_norm=1.0),
    *_grid(row_update, FP32, B=128, R=10000, k=10, d=4096, momentum=0.9, max_norm=1.0),
    *_grid(row_update, FP32, S=10, B=128, R=1000, k=10, d=256, max_norm=1.0),
    *_grid(count_active, BF16, B=128, R=10000, k=10, stamp=True),
    *_grid(count_active, FP32, B=128, R=10000, k=10, stamp=True, tensor_step=True),
    *_grid(code_gram, FP32, B=1024, R=10000, k=32),
    *_grid(code_gram, BF16, B=1024, R=10000, k=32, C=10, into=FP64),
    *_grid(code_gram, FP32, B=1024, R=10000, k=300, C=10, labels=False, into=FP64),
    *_grid(distill, FP32, B=128, C=10, teacher=False),
    *_grid(distill, FP32, BF16, B=128, C=10),
    *_grid(distill, FP32, B=128, C=10, n=10, each=True),
    *_grid(distill, FP32, B=128, C=100, n=200, columns=True, kl="forward"),
    *_grid(distill, FP32, BF16, B=128, C=4096, n=4096, columns=True),
    *_grid(dense_update, FP32, R=1000, d=256, project=False, max_norm=None),
    *_grid(dense_update, FP32, R=10000, d=4096, momentum=0.9),
    *_grid(dense_update, FP32, S=10, R=10000, d=256, C=100),
    *_grid(draw_batch, FP32, B=128, d=256, teacher=False),
    *_grid(draw_batch, FP32, S=10, B=128, d=256, n=200, R=10000),
    *_grid(draw_batch, FP32, B=1024, d=3072, C=100, n=20, R=1000),
    *_grid(gate_gradient, FP32, B=128, R=10000),
    *_grid(gate_gradient, FP32, S=10, B=128, R=1000, n=20),
    *_grid(gate_gradient, FP32, B=128, R=10000, n=200, gate=torch.bool, gated=False),
    *_grid(gate_gradient, FP32, B=128, R=1000, n=20, transposed=True),
    *_grid(tally, FP32, B=128, C=10),
    *_grid(tally, FP32, S=10, B=1024, C=100, wider=True),
    # The step of the SDMLP: flat and graded, one network and ten, the first task and the next.
    *_grid(distill_code, FP32, B=128, R=10000, K=10, C=10, teacher=False),
    *_grid(distill_code, FP32, B=128, R=10000, K=10, C=10, n=10, each=True),
    *_grid(distill_code, FP32, B=1280, R=100000, K=40, C=10, n=20, columns=True, each=True),
    *_grid(distill_code, FP32, B=128, R=10000, K=40, C=10),
    *_grid(distill_code, FP32, B=128, R=10000, K=300, C=100, n=200, kl="forward"),
    *_grid(distill_code, FP32, B=128, R=10000, K=128, C=128, n=4096, each=True),
    *_grid(distill_code, FP32, B=128, R=10000, K=300, C=4096, n=4096, columns=True),
]  # fmt: skip
