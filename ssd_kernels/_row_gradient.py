"""The gradient of a matrix whose rows a sparse code selects, private to the two packages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _dispatch, _segments, reference
from ssd_kernels._segments import Segments, segments


def row_gradient(
    coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int, *, impl: str | None = None
) -> Tensor:
    """Row j is the sum of coefficients[b, s] * inputs[b] over the slots (b, s) of neuron j.

    The whole weight gradient of a k-sparse layer: for an encoder the inputs are x and the
    coefficients the gradients of the values; for a decoder the gradients of the output and the
    values. Slots are summed in order: the result has the same bits every time. Nothing is checked.

    Args:
        coefficients: [B, K] floating. inputs: [B, d], the same dtype. indices: [B, K] int64.
        neurons: R.
        impl: "triton", "torch" or "reference".

    Returns:
        [R, d] in the dtype of inputs, differentiable in coefficients and inputs.
    """
    serve = _dispatch.choose("row_gradient", impl, inputs)
    if _dispatch.differentiable() and (coefficients.requires_grad or inputs.requires_grad):
        serve = reference.row_gradient
    return serve(coefficients, inputs, indices, neurons)


def row_gradients(
    coefficients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    indices: Tensor,
    neurons: int,
    networks: int = 1,
) -> list[Tensor]:
    """row_gradient of several matrices of one code, without autograd; its slots are sorted once.

    Args:
        networks: networks whose neurons and whose samples follow one another.
    """
    serve = _dispatch.choose("row_gradient", None, inputs[0])
    pairs = list(zip(coefficients, inputs, strict=True))
    if serve is not _triton or _dispatch.tracing():
        return [serve(c, i, indices, neurons) for c, i in pairs]
    order = _segments.with_offsets(_segments.sorted_slots(indices, neurons, True, networks))
    return [
        _segments.row_gradients(c, i, indices, neurons, False, None, order)[0] for c, i in pairs
    ]


def _torch(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> Tensor:
    gradient = inputs.new_zeros(neurons, inputs.shape[-1])
    group = segments(indices, coefficients != 0)
    return gradient.index_copy_(0, group.neurons, segment_sum(coefficients, inputs, group))


def segment_sum(coefficients: Tensor, inputs: Tensor, group: Segments) -> Tensor:
    """For each neuron of the group the sum of coefficient * input over its slots, [n, d]."""
    if not len(group.slots):
        return inputs.new_zeros(0, inputs.shape[-1])
    samples = group.slots // coefficients.shape[-1]
    return F.embedding_bag(
        samples,
        inputs,
        group.offsets,
        mode="sum",
        per_sample_weights=coefficients.flatten()[group.slots],
    )


def _triton(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> Tensor:
    return _segments.row_gradients(coefficients, inputs, indices, neurons, False, None, ())[0]


_dispatch.register("row_gradient", reference=reference.row_gradient, torch=_torch, triton=_triton)
