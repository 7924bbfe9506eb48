"""Take the gradient of a layer's output back through the gate of its neurons, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ssd.ops import reference
from ssd_kernels import _dispatch, _op, _tuning
from ssd_kernels._triton import jit, tl

_tuning.TABLE["gate_gradient"] = {"default": (({}, {"BLOCK": 1024, "num_warps": 4}),)}


def gate_gradient(
    gradient: Tensor,
    gate: Tensor,
    slopes: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    gated: bool = True,
    impl: str | None = None,
) -> None:
    """gradient = gradient + slope where the gate is open, 0 elsewhere, in place.

    Args:
        gradient: [S B, R] floating, updated in place; may be a transposed view.
        gate: [S B, R] bool, or floating: open where it is above 0 or NaN, as in the gradient of
            relu. A CPU is fastest where gate and gradient have the same strides.
        slopes: [S B, n], added to the gradients of the n neurons of S subnetworks.
        positions: [S R] int64, where each neuron stands in its subnetwork, n for none; goes with
            slopes.
        gated: False: slopes are added after the gate, whether it is open or not.
        impl: "triton", "numba", "torch" or "reference"; by default the fastest for the device.
    """
    served = gate.dtype in (torch.bool, torch.float32) and gradient.dtype == torch.float32
    looped = gate.dtype == torch.float32 and gradient.T.is_contiguous() and gate.T.is_contiguous()
    looped = looped and (positions is None or len(positions) == gradient.shape[1])
    serve = _dispatch.choose("gate_gradient", impl, gradient, served=served, looped=looped)
    with torch.no_grad():
        serve(gradient, gate, slopes, positions, gated)


def _torch(
    gradient: Tensor, gate: Tensor, slopes: Tensor | None, positions: Tensor | None, gated: bool
) -> None:
    if not gradient.is_cpu:
        reference.gate_gradient(gradient, gate, slopes, positions, gated)
        return
    if gated:
        _add_slopes(gradient, slopes, positions)
    if gate.dtype == torch.bool:  # which a CPU converts slowly
        gate = gate.view(torch.uint8)
    gate = gate.to(gradient.dtype)
    torch.ops.aten.threshold_backward.grad_input(gradient, gate, 0.0, grad_input=gradient)
    if not gated:
        _add_slopes(gradient, slopes, positions)


def _numba(
    gradient: Tensor, gate: Tensor, slopes: Tensor | None, positions: Tensor | None, gated: bool
) -> None:
    from ssd.ops import _loops

    added = _loops.array(slopes, len(gradient))
    places = positions if positions is not None else torch.empty(0, dtype=torch.int64, device="cpu")
    _loops.gate(gradient.T.numpy(), gate.T.numpy(), added, places.contiguous().numpy(), gated)


def _add_slopes(gradient: Tensor, slopes: Tensor | None, positions: Tensor | None) -> None:
    if slopes is None or positions is None or gradient.numel() == 0:
        return
    learners = len(positions) // gradient.shape[1]
    for own, values, places in zip(
        gradient.chunk(learners), slopes.chunk(learners), positions.chunk(learners), strict=True
    ):
        chosen = (places < slopes.shape[1]).nonzero().squeeze(1)
        own.index_add_(1, chosen, values.index_select(1, places[chosen]))


@jit(do_not_specialize=["neurons", "batch"])
def _gate_kernel(
    gradient,  # [S B, R]
    gate,  # [S B, R] fp32 or uint8
    slopes,  # [S B, N]
    positions,  # [S R]
    neurons,  # R
    batch,  # B
    gradient_row,
    gradient_column,
    gate_row,
    gate_column,
    N: tl.constexpr,
    SLOPES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < neurons
    at = gradient + row * gradient_row + column * gradient_column
    value = tl.load(at, mask=inside, other=0.0)
    closed = tl.load(gate + row * gate_row + column * gate_column, mask=inside, other=0) <= 0
    slope = tl.zeros([BLOCK], tl.float32)
    if SLOPES:
        own = positions + row // batch * neurons
        place = tl.load(own + column, mask=inside, other=N)
        slope = tl.load(slopes + row * N + place, mask=place < N, other=0.0)
    value = tl.where(closed, 0.0, value + slope if GATED else value)
    tl.store(at, value if GATED else value + slope, mask=inside)


@_op.operator("ssd::gate_gradient", lambda *_: None, mutates=("gradient",))
def _triton(
    gradient: Tensor, gate: Tensor, slopes: Tensor | None, positions: Tensor | None, gated: bool
) -> None:
    rows, neurons = gradient.shape
    if gradient.numel() == 0:
        return
    learners = 1 if positions is None else len(positions) // neurons
    chosen = _tuning.config("gate_gradient", gradient.device)
    with torch.cuda.device_of(gradient):
        _gate_kernel[(rows, -(-neurons // chosen["BLOCK"]))](
            gradient,
            gate.view(torch.uint8) if gate.dtype == torch.bool else gate,
            gradient if slopes is None else slopes.contiguous(),
            gradient if positions is None else positions.contiguous(),
            neurons,
            rows // learners,
            *gradient.stride(),
            *gate.stride(),
            N=0 if slopes is None else slopes.shape[1],
            SLOPES=slopes is not None,
            GATED=gated or slopes is None,
            **chosen,
        )


_dispatch.register(
    "gate_gradient", reference=reference.gate_gradient, torch=_torch, numba=_numba, triton=_triton
)
