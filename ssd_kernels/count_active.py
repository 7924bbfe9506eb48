"""How often each neuron was active, and when last: exact integers."""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _op, _tuning, reference
from ssd_kernels._triton import jit, tl

_tuning.TABLE["count_active"] = {"default": (({}, {"BLOCK": 512, "num_warps": 4}),)}


def count_active(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    last_active: Tensor | None = None,
    step: int | Tensor = 0,
    *,
    impl: str | None = None,
) -> None:
    """counts[j] += number of samples in which neuron j is active (its value is > 0).

    Args:
        values: [.., K] floating; indices: [.., K] int64, distinct within a sample.
        counts: [R] int64 or int32, updated in place.
        last_active: [R] int64 or int32 or None, set in place to `step` where a neuron is active.
        step: the present step, an int or a 0-d integer tensor on the device of values.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    neurons = counts.shape[0] if counts.dim() else 0
    _checks.counter("count_active", "counts", counts, values, neurons)
    _checks.counter("count_active", "last_active", last_active, values, neurons)
    _checks.code("count_active", values, indices, neurons)
    if isinstance(step, Tensor):
        _checks.same_device("count_active", "values", values, "step", step)
        if step.dim() or step.is_floating_point() or step.is_complex() or step.dtype == torch.bool:
            raise TypeError(
                f"count_active: step has dtype {step.dtype} and shape {list(step.shape)}, "
                "expected a 0-d integer"
            )
    else:
        _checks.whole("count_active", "step", step, -math.inf)
    serve = _dispatch.choose("count_active", impl, values)
    serve(values, indices, counts, last_active, step)


def _torch(
    values: Tensor, indices: Tensor, counts: Tensor, last_active: Tensor | None, step: int | Tensor
) -> None:
    """At a cost independent of R."""
    active = values > 0
    counts.index_add_(0, indices.flatten(), active.flatten().to(counts.dtype))
    if last_active is not None:
        stamp = torch.as_tensor(step, dtype=last_active.dtype, device=last_active.device)
        last_active.index_put_((indices[active],), stamp)


@jit(do_not_specialize=["step", "slots"])
def _count_kernel(
    values,  # [slots]
    indices,  # [slots] int64
    counts,  # [R]
    last_active,  # [R]
    step,  # an integer, or a pointer to one
    slots,
    counts_stride,
    last_stride,
    STAMP: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + slot, mask=slot < slots, other=0.0)
    active = value > 0
    neuron = tl.load(indices + slot, mask=active, other=0)
    # Integer additions commute: the counts are the same whatever the order.
    one = tl.full([BLOCK], 1, counts.dtype.element_ty)
    tl.atomic_add(counts + neuron * counts_stride, one, mask=active, sem="relaxed")
    if STAMP:
        now = tl.load(step) if STEP_ON_DEVICE else step
        # A neuron may be active in many samples: whoever comes last writes the same.
        tl.store(last_active + neuron * last_stride, now, mask=active)


def _triton(
    values: Tensor, indices: Tensor, counts: Tensor, last_active: Tensor | None, step: int | Tensor
) -> None:
    number, on_device = (0, step) if isinstance(step, Tensor) else (step, None)
    _launch(values.detach(), indices, counts, last_active, number, on_device)


@_op.operator("ssd_kernels::count_active", lambda *_: None, mutates=("counts", "last_active"))
def _launch(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    last_active: Tensor | None,
    step: int,
    step_on_device: Tensor | None,
) -> None:
    slots = values.numel()
    if slots == 0:
        return
    chosen = _tuning.config("count_active", values.device)
    with torch.cuda.device_of(values):
        _count_kernel[(-(-slots // chosen["BLOCK"]),)](
            values.contiguous(),
            indices.contiguous(),
            counts,
            counts if last_active is None else last_active,
            step if step_on_device is None else step_on_device,
            slots,
            counts.stride(0),
            1 if last_active is None else last_active.stride(0),
            STAMP=last_active is not None,
            STEP_ON_DEVICE=step_on_device is not None,
            **chosen,
        )


_dispatch.register("count_active", reference=reference.count_active, torch=_torch, triton=_triton)
