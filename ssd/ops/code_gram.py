"""Accumulate the second moments of a sparse code, which a closed-form readout needs."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd.ops import reference
from ssd_kernels import _checks, _dispatch, _op, _tuning
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels._segments import sorted_slots
from ssd_kernels._triton import jit, tl

ACCUMULATORS = (torch.float32, torch.float64)
CHUNK = 2**22  # numbers that the torch path holds at a time, besides gram and cross
# Scattering a product costs as much as this many multiply-adds of a dense product, so the torch
# path takes the dense one from k = R / 20 on. Measured on one core of an AMD EPYC, us a sample,
# scattered | dense: R = 1,000, k = 10: 4 | 42; k = 50: 29 | 47; k = 200: 397 | 23; R = 10,000,
# k = 100: 247 | 3,800; k = 1,000: 17,600 | 6,700.
SCATTER_COST = 400
_tuning.TABLE["code_gram"] = {
    "default": (
        ({"slots": 32}, {"BLOCK": 32, "num_warps": 1}),
        ({"slots": 128}, {"BLOCK": 128, "num_warps": 4}),
        ({}, {"BLOCK": 256, "num_warps": 8}),
    ),
}


def code_gram(
    values: Tensor,
    indices: Tensor,
    gram: Tensor,
    cross: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    impl: str | None = None,
) -> None:
    """gram += H^T H and cross += H^T Y, in place, for the dense form H [B, R] of a code.

    This takes K^2 operations a sample instead of R^2. Samples are added in order, so the result has
    the same bits every time.

    Args:
        values: [B, K] floating.
        indices: [B, K] int64, distinct within a sample but for slots of value 0.
        gram: [R, R] float32 or float64, contiguous.
        cross: [R, C], contiguous, in the dtype of gram; goes with targets.
        targets: Y [B, C] floating, or labels [B] int64 in 0..C-1, whose one-hot rows are Y.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    _check(values, indices, gram, cross, targets)
    serve = _dispatch.choose("code_gram", impl, values)
    with torch.no_grad():
        serve(values, indices, gram, cross, targets)


def _check(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    op = "code_gram"
    _checks.floating(op, values=values)
    _checks.in_place(op, "gram")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"{op}: gram has shape {list(gram.shape)}, expected [R, R]")
    if (cross is None) != (targets is None):
        raise ValueError(f"{op}: cross and targets must be given together")
    _accumulator("gram", gram, values)
    _checks.code(op, values, indices, gram.shape[0])
    if indices.dim() != 2:
        raise ValueError(f"{op}: indices have shape {list(indices.shape)}, expected [B, K]")
    if cross is None or targets is None:
        return
    if cross.dim() != 2 or cross.shape[0] != gram.shape[0]:
        raise ValueError(
            f"{op}: cross has shape {list(cross.shape)}, expected [{gram.shape[0]}, C]"
        )
    if cross.dtype != gram.dtype:
        raise TypeError(f"{op}: cross has dtype {cross.dtype} but gram has {gram.dtype}")
    _accumulator("cross", cross, values)
    _checks.same_device(op, "values", values, "targets", targets)
    if targets.dim() == 1 and not targets.is_floating_point():
        if targets.dtype != torch.int64:
            raise TypeError(f"{op}: labels have dtype {targets.dtype}; use torch.int64")
        _checks.shape(op, "targets", targets, (len(values),))
        _checks.in_range(op, "labels", targets, cross.shape[1])
        return
    _checks.floating(op, targets=targets)
    _checks.shape(op, "targets", targets, (len(values), cross.shape[1]))


def _accumulator(name: str, tensor: Tensor, values: Tensor) -> None:
    if tensor.dtype not in ACCUMULATORS:
        raise TypeError(
            f"code_gram: {name} has dtype {tensor.dtype}; use torch.float32 or torch.float64"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"code_gram: {name} with strides {tensor.stride()} is not contiguous")
    _checks.same_device("code_gram", "values", values, name, tensor)


def _torch(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    neurons, (batch, slots) = gram.shape[0], values.shape
    values = values.detach().to(gram.dtype)
    dense = SCATTER_COST * slots * slots > neurons * neurons
    size = max(1, CHUNK // max(1, neurons if dense else slots * slots))
    for start in range(0, batch, size):
        v, i = values[start : start + size], indices[start : start + size]
        if dense:
            hidden = v.new_zeros(len(v), neurons).scatter_add_(1, i, v)
            gram.addmm_(hidden.T, hidden)
        else:
            cells = i.unsqueeze(2) * neurons + i.unsqueeze(1)
            products = v.unsqueeze(2) * v.unsqueeze(1)
            gram.view(-1).index_add_(0, cells.flatten(), products.flatten())
    if cross is None or targets is None:
        return
    if targets.dim() == 1:
        cells = indices * cross.shape[1] + targets.unsqueeze(1)
        cross.view(-1).index_add_(0, cells.flatten(), values.flatten())
    else:
        cross += row_gradient(values, targets.detach().to(cross.dtype), indices, neurons)


@jit(do_not_specialize=["count"])
def _gram_kernel(
    neurons,  # [count], sorted
    slots,  # [count]
    values,  # [B, K]
    indices,  # [B, K] int64
    gram,  # [R, R]
    cross,  # [R, C]
    targets,  # [B] int64 if LABELS, else [B, C]
    count,
    width,
    outputs,
    K: tl.constexpr,
    CROSS: tl.constexpr,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first position of each neuron adds the neuron's samples to its row, one at a time."""
    position = tl.program_id(0)
    neuron = tl.load(neurons + position).to(tl.int64)
    previous = tl.load(neurons + position - 1, mask=position > 0, other=-1)
    if neuron != previous:
        row = gram + neuron * width
        cross_row = cross + neuron * outputs
        cursor = position.to(tl.int64)
        walking = True
        while walking:
            slot = tl.load(slots + cursor)
            value = tl.load(values + slot).to(gram.dtype.element_ty)
            # A slot of value 0 may name a neuron that the sample names elsewhere: two threads
            # must not write one entry.
            if value != 0:
                sample = slot // K
                for start in range(0, K, BLOCK):
                    here = start + tl.arange(0, BLOCK)
                    other = tl.load(values + sample * K + here, mask=here < K, other=0.0)
                    other = other.to(gram.dtype.element_ty)
                    active = other != 0
                    column = tl.load(indices + sample * K + here, mask=active, other=0)
                    entry = tl.load(row + column, mask=active, other=0.0)
                    tl.store(row + column, entry + value * other, mask=active)
                if CROSS:
                    if LABELS:
                        entry = cross_row + tl.load(targets + sample)
                        tl.store(entry, tl.load(entry) + value)
                    else:
                        for start in range(0, outputs, BLOCK):
                            column = start + tl.arange(0, BLOCK)
                            inside = column < outputs
                            target = tl.load(targets + sample * outputs + column, mask=inside)
                            entry = tl.load(cross_row + column, mask=inside)
                            entry += value * target.to(gram.dtype.element_ty)
                            tl.store(cross_row + column, entry, mask=inside)
                # The next sample reads what other threads have written.
                tl.debug_barrier()
            cursor += 1
            following = tl.load(neurons + cursor, mask=cursor < count, other=-1)
            walking = following == neuron


@_op.operator("ssd::code_gram", lambda *_: None, mutates=("gram", "cross"))
def _triton(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    if not values.numel():
        return
    neurons, slots, _ = sorted_slots(indices, len(gram), by_neuron=False)
    chosen = _tuning.config("code_gram", values.device, slots=values.shape[1])
    with torch.cuda.device_of(values):
        _gram_kernel[(len(slots),)](
            neurons,
            slots,
            values.detach().contiguous(),
            indices.contiguous(),
            gram,
            gram if cross is None else cross,
            indices if targets is None else targets.detach().contiguous(),
            len(slots),
            gram.shape[0],
            1 if cross is None else cross.shape[1],
            K=values.shape[1],
            CROSS=cross is not None,
            LABELS=targets is not None and targets.dim() == 1,
            **chosen,
        )


_dispatch.register("code_gram", reference=reference.code_gram, torch=_torch, triton=_triton)
