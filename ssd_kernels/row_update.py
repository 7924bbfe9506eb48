"""Projected SGD on the rows that a sparse code touches, at a cost independent of R."""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _op, _segments, _tuning, reference
from ssd_kernels._row_gradient import segment_sum
from ssd_kernels._row_step import clip_scale, step_row
from ssd_kernels._segments import segments
from ssd_kernels._triton import jit, tl

_tuning.TABLE["row_update"] = {
    "default": (
        ({"width": 64}, {"BLOCK": 64, "num_warps": 1}),
        ({"width": 256}, {"BLOCK": 256, "num_warps": 2}),
        ({"width": 1024}, {"BLOCK": 1024, "num_warps": 4}),
        ({}, {"BLOCK": 2048, "num_warps": 8}),
    )
}


class Step(NamedTuple):
    """The options of row_update."""

    lr: float | Tensor
    max_norm: float | Tensor | None
    nonnegative: bool
    normalize: Sequence[bool] | None
    momentum: float
    buffers: Sequence[Tensor] | None
    networks: int


def row_update(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    *,
    lr: float | Tensor,
    max_norm: float | Tensor | None = None,
    nonnegative: bool = False,
    normalize: Sequence[bool] | None = None,
    momentum: float = 0.0,
    buffers: Sequence[Tensor] | None = None,
    networks: int = 1,
    impl: str | None = None,
) -> Tensor:
    """One step of clipped, projected SGD on several matrices that share the neurons of one code.

    Row j of the gradient of weights[i] is the sum of `coefficients[i][b, s] * inputs[i][b]` over
    the slots (b, s) of neuron j. That is the whole gradient of a k-sparse layer: for an encoder the
    inputs are x and the coefficients the gradients of the values; for a decoder the inputs are the
    gradients of the output and the coefficients the values. A row is touched if one of its slots
    has a non-zero coefficient for any of the weights; every other row keeps its bits. For plain SGD
    that equals the dense step up to the rounding of renormalising rows that did not move.

    Args:
        weights: matrices [R, d_i], updated in place.
        coefficients: [B, K] for each matrix.
        inputs: [B, d_i] for each matrix.
        indices: [B, K] int64, neurons of the slots.
        lr: learning rate, or one for each network [networks].
        max_norm: bound of the global L2 norm of the gradients, as in clip_grad_norm_, or one for
            each network [networks]; None: no clip.
        nonnegative: clamp touched rows at 0 after the step (SDMLP).
        normalize: for each matrix, whether touched rows are then scaled to unit L2 norm; an
            all-zero row stays zero.
        momentum: of heavy-ball SGD; goes with buffers. Lazy: an untouched row keeps its buffer and
            does not move.
        buffers: shaped like weights, updated in place.
        networks: number S of networks whose rows follow one another, R / S each, and whose samples
            do, B / S each; each gradient is clipped by itself.
        impl: "triton", "numba", "torch" or "reference"; by default the fastest for the device.

    Returns:
        The global gradient norm before clipping: 0-d, or [networks] if there are several.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit, before any work.
    """
    _check(weights, coefficients, inputs, indices, normalize, momentum, buffers)
    _check_networks(weights, lr, max_norm, indices, networks)
    in_place = [*weights, *(buffers or ())]
    served = indices.numel() > 0 and all(
        t.dtype in _dispatch.TRITON_DTYPES and t.shape[1] > 0 and t.stride(1) == 1 for t in in_place
    )
    looped = networks == 1 and buffers is None and all(w.is_contiguous() for w in weights)
    looped = looped and all(t.dtype == torch.float32 for t in (*weights, *coefficients, *inputs))
    serve = _dispatch.choose("row_update", impl, weights[0], served=served, looped=looped)
    step = Step(lr, max_norm, nonnegative, normalize, momentum, buffers, networks)
    with torch.no_grad():
        return serve(weights, coefficients, inputs, indices, step)


def _reference(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    step: Step,
) -> Tensor:
    return reference.row_update(weights, coefficients, inputs, indices, **step._asdict())


def _torch(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    step: Step,
) -> Tensor:
    lr, max_norm, nonnegative, normalize, momentum, buffers, networks = step
    touched = reduce(torch.logical_or, [c != 0 for c in coefficients])
    group = segments(indices, touched)
    gradients = [segment_sum(c, i, group) for c, i in zip(coefficients, inputs, strict=True)]
    block = group.neurons // (weights[0].shape[0] // networks)
    norm = _network_norms(gradients, torch.bincount(block, minlength=networks))
    scale = reference.clip_scale(norm, max_norm)[block].unsqueeze(1)
    rate = lr[block].unsqueeze(1) if isinstance(lr, Tensor) else lr
    for number, (weight, direction) in enumerate(zip(weights, gradients, strict=True)):
        factor = -rate * scale
        if buffers is not None:
            direction.mul_(scale).add_(momentum * buffers[number].index_select(0, group.neurons))
            buffers[number].index_copy_(0, group.neurons, direction)
            factor = torch.full_like(scale, -1.0) * rate
        rows = weight.index_select(0, group.neurons).addcmul_(direction, factor)
        project_(rows, nonnegative, normalize is not None and normalize[number])
        weight.index_copy_(0, group.neurons, rows)
    return _norms(norm, weights)


def _numba(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    step: Step,
) -> Tensor:
    from ssd_kernels import _loops

    factors = [c.contiguous().numpy() for c in coefficients]
    vectors = [i.contiguous().numpy() for i in inputs]
    flat = indices.contiguous().view(-1).numpy()
    touched = reduce(np.logical_or, [f != 0 for f in factors]).ravel()
    slots, heads = _loops.sorted_slots(flat, touched, len(weights[0]))
    gradients = [np.empty((len(heads) - 1, w.shape[1]), np.float32) for w in weights]
    squares = 0.0
    for factor, vector, gradient in zip(factors, vectors, gradients, strict=True):
        squares += _loops.row_sums(slots, heads, factor, vector, gradient)
    norm = weights[0].new_tensor(math.sqrt(squares))
    rate = float(step.lr) * float(reference.clip_scale(norm, step.max_norm))
    rows = flat[slots[heads[:-1]]]
    torch.autograd.graph.increment_version(weights)
    for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        scaled = step.normalize is not None and step.normalize[number]
        matrix = weight.detach().numpy()
        _loops.move_rows(matrix, rows, gradient, rate, step.nonnegative, scaled)
    return norm


def _network_norms(gradients: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """L2 norms [networks] of rows [n, d_i]; sizes: how many of the rows each network has."""
    wide = reference.accumulation_dtype(gradients[0].dtype)
    lengths = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=wide) for g in gradients])
    # Summed in order within a network, so that its norm does not depend on the others.
    squares = lengths.square().sum(0)
    norm = torch.segment_reduce(squares, "sum", lengths=sizes, initial=0.0).sqrt()
    if _sound(*norm.aminmax()):
        return norm
    lengths = torch.stack([reference.length(g.to(wide)).squeeze(1) for g in gradients])
    longest = torch.segment_reduce(lengths.amax(0), "max", lengths=sizes, initial=0.0)
    unit = reference.power_of_two(longest)
    squares = (lengths / unit.repeat_interleave(sizes)).square().sum(0)
    return torch.segment_reduce(squares, "sum", lengths=sizes, initial=0.0).sqrt() * unit


def project_(weight: Tensor, nonnegative: bool, normalize: bool) -> Tensor:
    """reference.project, in place."""
    if nonnegative:
        weight.clamp_(min=0)
    if normalize:
        length = row_lengths(weight)
        weight.div_(torch.where(length > 0, length, 1.0))
    return weight


def row_lengths(rows: Tensor) -> Tensor:
    """L2 norm [n, 1] of rows [n, d], in the dtype of sums, whatever their scale.

    A plain norm where the host can check that it is sound, else reference.length.
    """
    wide = reference.accumulation_dtype(rows.dtype)
    if rows.is_cuda and wide == torch.float32:
        # Squares of float32 are in the range of float64, so the host need not look.
        return torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64).to(wide)
    rows = rows.to(wide)
    if rows.is_cuda or _dispatch.symbolic(rows):
        return reference.length(rows)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if len(rows) > 0 and not _sound(*length.aminmax()):
        odd = ~((length > _least(wide)) & (length < torch.inf)).squeeze(1)
        length[odd] = reference.length(rows[odd])
    return length


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of all tensors together, 0-d, whatever their scale."""
    first = tensors[0]
    if first.is_cuda and first.dtype != torch.float64:
        wide = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
        return torch.stack(wide).norm().to(first.dtype)
    if not (first.is_cuda or _dispatch.symbolic(first)):
        norm = torch.stack([torch.linalg.vector_norm(t) for t in tensors]).norm()
        if _sound(norm, norm):
            return norm
    lengths = [reference.length(t.reshape(1, -1)) for t in tensors]
    return reference.length(torch.cat(lengths, dim=1)).squeeze()


def _sound(least: Tensor, most: Tensor) -> bool:
    """Whether plain norms between these are right; the host reads them."""
    return least.item() > _least(least.dtype) and most.item() < float("inf")


@cache
def _least(dtype: torch.dtype) -> float:
    """Above this a norm loses nothing to squares that are too small for the dtype."""
    return torch.finfo(dtype).tiny ** 0.5 / torch.finfo(dtype).eps


@jit(do_not_specialize=["blocks", "block_rows"])
def _apply_kernel(
    neurons,  # [programs], sorted; not read if BY_NEURON
    touched,  # [SHARING, programs] uint8: by a coefficient of each of the matrices
    gradient,  # [programs, D] fp32
    weight,  # [R, D]
    buffer,  # [R, D]
    squares,  # [blocks] fp64: of all gradients
    norm,  # [blocks]
    lr,  # a number, or [blocks] if RATES
    max_norm,  # a number, or [blocks] if BOUNDS
    momentum,
    blocks,
    block_rows,
    weight_stride,
    buffer_stride,
    BY_NEURON: tl.constexpr,
    SHARING: tl.constexpr,
    RATES: tl.constexpr,
    BOUNDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        each = tl.arange(0, BLOCKS)
        total = tl.load(squares + each, mask=each < blocks, other=0.0)
        tl.store(norm + each, tl.sqrt(total).to(tl.float32), mask=each < blocks)
    active = 0
    for number in range(SHARING):
        at = touched + tl.num_programs(0).to(tl.int64) * number + program
        active += tl.load(at).to(tl.int32)
    if active > 0:
        neuron = program if BY_NEURON else tl.load(neurons + program).to(tl.int64)
        block = neuron // block_rows
        rate = tl.load(lr + block).to(tl.float32) if RATES else lr
        scale = 1.0
        if CLIP:
            bound = tl.load(max_norm + block).to(tl.float32) if BOUNDS else max_norm
            scale = clip_scale(tl.load(squares + block), bound)
        own = gradient + program * WIDTH
        step_row(
            weight + neuron * weight_stride,
            buffer + neuron * buffer_stride,
            own,
            own,
            scale,
            rate,
            momentum,
            WIDTH,
            CLAMP,
            NORMALIZE,
            MOMENTUM,
            BLOCK,
        )


def _triton(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    step: Step,
) -> Tensor:
    lr, max_norm, nonnegative, normalize, momentum, buffers, networks = step
    device = indices.device
    if _dispatch.tracing():  # a number that changes from step to step would be compiled in
        lr = _per_network(lr, networks, device)
        max_norm = None if max_norm is None else _per_network(max_norm, networks, device)
    return _launch(
        list(weights),
        [c.detach() for c in coefficients],
        [i.detach() for i in inputs],
        indices,
        lr if isinstance(lr, Tensor) else None,
        0.0 if isinstance(lr, Tensor) else float(lr),
        max_norm if isinstance(max_norm, Tensor) else None,
        None if isinstance(max_norm, Tensor) else max_norm,
        nonnegative,
        [False] * len(weights) if normalize is None else list(normalize),
        momentum,
        list(buffers or ()),
        networks,
    )


def _per_network(value: float | Tensor, networks: int, device: torch.device) -> Tensor:
    """One float32 value for each network."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    return torch.full((networks,), float(value), device=device)


def _norms_like(weights: Sequence[Tensor], *others: Any) -> Tensor:
    return _norms(weights[0].new_empty(others[-1]), weights)


def _norms(norm: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The norms [networks] as row_update returns them."""
    norm = norm.to(reduce(torch.promote_types, (w.dtype for w in weights)))
    return norm if len(norm) > 1 else norm[0]


@_op.operator("ssd_kernels::row_update", _norms_like, mutates=("weights", "buffers"))
def _launch(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    rates: Tensor | None,
    rate: float,
    bounds: Tensor | None,
    bound: float | None,
    nonnegative: bool,
    normalize: Sequence[bool],
    momentum: float,
    buffers: Sequence[Tensor],
    networks: int,
) -> Tensor:
    """rates, bounds: [networks], or None where one number serves; no bound: no clip."""
    neurons = weights[0].shape[0]
    by_neuron = neurons <= indices.numel()
    order = _segments.sorted_slots(indices, neurons, by_neuron, networks)
    gradients, touched, squares = _gradients(order, coefficients, inputs, neurons, networks)
    dtype = reduce(torch.promote_types, (w.dtype for w in weights))
    norm = torch.empty(networks, dtype=dtype, device=indices.device)
    with torch.cuda.device_of(indices):
        for number, weight in enumerate(weights):
            width = weight.shape[1]
            chosen = _tuning.config("row_update", weight.device, width=width)
            buffer = buffers[number] if buffers else weight
            _apply_kernel[(order.programs,)](
                order.neurons,
                touched,
                gradients[number],
                weight,
                buffer,
                squares,
                norm,
                rate if rates is None else rates.contiguous(),
                (bound or 0.0) if bounds is None else bounds.contiguous(),
                float(momentum),
                networks,
                neurons // networks,
                weight.stride(0),
                buffer.stride(0),
                BY_NEURON=order.offsets is not None,
                SHARING=len(weights),
                RATES=rates is not None,
                BOUNDS=bounds is not None,
                BLOCKS=1 << (networks - 1).bit_length(),
                WIDTH=width,
                CLIP=bounds is not None or bound is not None,
                CLAMP=nonnegative,
                NORMALIZE=bool(normalize[number]),
                MOMENTUM=bool(buffers),
                **chosen,
            )
    return norm if networks > 1 else norm[0]


def _gradients(
    order: _segments.Order,
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    neurons: int,
    networks: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients [programs, D] fp32, which rows were touched, and the squares [networks] of all."""
    programs, device = order.programs, order.slots.device
    tiles = [_segments.tiles(i.shape[1], device) for i in inputs]
    # With a program per neuron the rows of a network follow one another; else a program finds the
    # network of its neuron.
    told = 1 if order.offsets is not None else networks
    squares = torch.empty(sum(tiles), told, programs, dtype=torch.float64, device=device)
    touched = torch.empty(len(inputs), programs, dtype=torch.uint8, device=device)
    gradients = []
    for number, (coefficient, vectors) in enumerate(zip(coefficients, inputs, strict=True)):
        first = sum(tiles[:number])
        gradient = torch.empty(programs, vectors.shape[1], dtype=torch.float32, device=device)
        _segments.walk(
            order,
            coefficient.shape[1],
            _segments.unit_stride(vectors),
            coefficients=coefficient.contiguous(),
            gradient=gradient,
            squares=squares[first : first + tiles[number]],
            touched=touched[number],
            block_rows=neurons // told,
        )
        gradients.append(gradient)
    return gradients, touched, squares.view(sum(tiles), networks, -1).sum((0, 2))


def _check_networks(
    weights: Sequence[Tensor],
    lr: float | Tensor,
    max_norm: float | Tensor | None,
    indices: Tensor,
    networks: int,
) -> None:
    neurons = weights[0].shape[0]
    _checks.divides("row_update", networks, weights=neurons, indices=len(indices))
    if networks > 1 and indices.is_cpu and indices.numel() and not _dispatch.symbolic(indices):
        least, most = indices.view(networks, -1).aminmax(dim=1)
        for network, low, high in zip(range(networks), least.tolist(), most.tolist(), strict=True):
            first, last = network * neurons // networks, (network + 1) * neurons // networks - 1
            wrong = low if low < first else high
            if not first <= wrong <= last:
                raise ValueError(
                    f"row_update: indices of network {network} hold {wrong}; they must lie in "
                    f"{first}..{last}"
                )
    for name, value in (("lr", lr), ("max_norm", max_norm)):
        if isinstance(value, Tensor):
            _checks.shape("row_update", name, value, (networks,))
            _checks.same_device("row_update", "weights", weights[0], name, value)
        elif value is not None and value != math.inf:
            _checks.number("row_update", name, value)


def _check(
    weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    normalize: Sequence[bool] | None,
    momentum: float,
    buffers: Sequence[Tensor] | None,
) -> None:
    op = "row_update"
    _checks.in_place(op, "weights")
    if not weights:
        raise ValueError(f"{op}: weights is empty; give at least one matrix [R, d]")
    for name, given in (
        ("coefficients", coefficients),
        ("inputs", inputs),
        ("normalize", normalize),
        ("buffers", buffers),
    ):
        if given is not None and len(given) != len(weights):
            raise ValueError(f"{op}: {len(given)} {name} for {len(weights)} weights")
    _checks.number(op, "momentum", momentum)
    if (momentum != 0.0) != (buffers is not None):
        raise ValueError(f"{op}: momentum={momentum} and buffers must be given together")
    if indices.dim() != 2:
        raise ValueError(f"{op}: indices have shape {list(indices.shape)}, expected [B, K]")
    neurons = weights[0].shape[0] if weights[0].dim() else 0
    for number, weight in enumerate(weights):
        coefficient, vector = coefficients[number], inputs[number]
        buffer = None if buffers is None else buffers[number]
        _checks.floating(op, weight=weight, coefficients=coefficient, inputs=vector, buffers=buffer)
        if weight.dim() != 2 or weight.shape[0] != neurons:
            raise ValueError(
                f"{op}: weights[{number}] has shape {list(weight.shape)}, expected [{neurons}, d]"
            )
        if number == 0:
            _checks.code(op, coefficient, indices, neurons)
        _checks.shape(op, f"coefficients[{number}]", coefficient, tuple(indices.shape))
        _checks.shape(op, f"inputs[{number}]", vector, (len(indices), weight.shape[1]))
        _checks.shape(op, f"buffers[{number}]", buffer, tuple(weight.shape))


_dispatch.register("row_update", reference=_reference, torch=_torch, numba=_numba, triton=_triton)
