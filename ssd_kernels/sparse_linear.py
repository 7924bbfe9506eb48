"""A k-sparse code times a matrix: the decoder of a k-sparse layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _checks, _dispatch, reference


def sparse_linear(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """out[b] = sum over slots s of values[b, s] * weight[indices[b, s]], plus bias.

    Args:
        values: [.., K] floating; indices: [.., K] int64 in 0..R-1.
        weight: [R, C], as in torch.nn.EmbeddingBag: row j is what neuron j writes.
        bias: [C] or None.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        [.., C] in the dtype of weight, differentiable in values, weight and bias.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    values, weight, bias = _dispatch.autocast(values, weight, bias)
    _checks.floating("sparse_linear", values=values, weight=weight, bias=bias)
    _checks.code("sparse_linear", values, indices)
    if weight.dim() != 2:
        raise ValueError(f"sparse_linear: weight has shape {list(weight.shape)}, expected [R, C]")
    _checks.shape("sparse_linear", "bias", bias, (weight.shape[1],))
    serve = _dispatch.choose("sparse_linear", IMPLEMENTATIONS, impl, values)
    with torch.autocast(values.device.type, enabled=False):
        return serve(values, indices, weight, bias)


def _torch(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    slots = values.shape[-1]
    if values.numel() == 0:
        return reference.sparse_linear(values, indices, weight, bias)
    out = F.embedding_bag(
        indices.reshape(-1, slots),
        weight,
        mode="sum",
        per_sample_weights=values.reshape(-1, slots),
    ).view(*values.shape[:-1], weight.shape[1])
    return out if bias is None else out + bias


IMPLEMENTATIONS = {"reference": reference.sparse_linear, "torch": _torch}
