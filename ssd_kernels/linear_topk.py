"""relu(x W^T + b) and its exact top-k in one op, with gradients rebuilt from the k-sparse code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _linear_slabs, reference
from ssd_kernels.count_active import count_active
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_gradient import row_gradient
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import MAX_K, select, topk


def linear_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    inhibition: str = "mask",
    threshold: bool = False,
    preactivations: bool = False,
    counts: Tensor | None = None,
    blocks: int = 1,
    impl: str | None = None,
) -> TopKOutput:
    """The k largest entries of relu(x weight^T + bias), chosen exactly; ties to the lower index.

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; scores accumulate in at least fp32.
        weight: [R, d]; bias: [R] or None; the dtype of x.
        k: neurons that stay active, 1..R.
        inhibition: "mask" keeps a on the top-k; "subtract" gives relu(a - I) there, with I the
            (k+1)-th largest activation, which carries no gradient (SDMLP, Bricken et al. 2023).
        threshold: also return I as a differentiable output.
        preactivations: also return x weight^T + bias [.., R], differentiable. Allocates it.
        counts: [R] int64 or int32, updated in place: += samples in which the neuron is active.
            Activation checkpointing runs the forward twice and so counts twice: there, call
            count_active on the result instead.
        blocks: number S of networks whose rows follow one another. x then holds as many samples of
            each, weight is [S R, d], bias and counts are [S R]; the samples of a network see its R
            neurons alone, and so does k. The result of a network does not depend on the others.
        impl: "triton" (picks "fused" or "chunked"), "fused", "chunked", "rescore", "torch" or
            "reference"; by default the fastest for the device. A forced path that cannot serve
            these shapes gives way to what "triton" would pick; every path is exact.

    Returns:
        TopKOutput: values [.., k] >= 0 in the dtype of x, descending; indices [.., k] int64 of the
        k largest pre-activations (an entry <= 0 is inactive: value 0, no gradient, not counted),
        with blocks numbered through the neurons of all networks, as sparse_linear takes them;
        threshold [..] and preactivations [.., R] where asked for, else None.

    Raises:
        TypeError, ValueError: a dtype, shape, device, k or blocks that does not fit, before any
            work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_topk", x, weight, bias, k, blocks)
    _checks.inhibition("linear_topk", inhibition)
    _checks.counter("linear_topk", "counts", counts, x, weight.shape[0])
    serve = _dispatch.choose("linear_topk", IMPLEMENTATIONS, impl, x)
    with _dispatch.as_given(x):
        return serve(
            x,
            weight,
            k,
            bias,
            inhibition=inhibition,
            threshold=threshold,
            preactivations=preactivations,
            counts=counts,
            blocks=blocks,
        )


class _LinearTopK(torch.autograd.Function):
    """Shared by every implementation: `path` names the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        inhibition: str,
        counts: Tensor | None,
        path: str,
        blocks: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        forward = _torch_code if path == "torch" else _linear_slabs.code
        values, indices, cut, after = forward(x, weight, bias, k, inhibition, counts, path, blocks)
        # What is not a number passes a gradient, so that it is seen.
        ctx.save_for_backward(x, weight, indices, after, ~(values <= 0), ~(cut <= 0))
        ctx.has_cut = k < len(weight) // blocks
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return values, indices, cut

    @staticmethod
    def backward(
        ctx: Any, grad_values: Tensor | None, _: None, grad_cut: Tensor | None
    ) -> tuple[Any, ...]:
        x, weight, indices, after, active, cut_active = ctx.saved_tensors
        slots, neurons = [], []
        if grad_values is not None:
            slots.append(torch.where(active, grad_values, 0.0))
            neurons.append(indices)
        if grad_cut is not None and ctx.has_cut:
            slots.append(torch.where(cut_active, grad_cut, 0.0)[:, None])
            neurons.append(after[:, None])
        grads: list[Any] = [None] * 8
        if not slots:
            return tuple(grads)
        coefficients, ranked = torch.cat(slots, dim=1), torch.cat(neurons, dim=1)
        if ctx.needs_input_grad[0]:
            grads[0] = sparse_linear(coefficients, ranked, weight)
        if ctx.needs_input_grad[1]:
            grads[1] = row_gradient(coefficients, x, ranked, len(weight))
        if ctx.needs_input_grad[2]:
            ones = coefficients.new_ones(len(x), 1)
            grads[2] = row_gradient(coefficients, ones, ranked, len(weight)).squeeze(1)
        return tuple(grads)


def _torch_code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    inhibition: str,
    counts: Tensor | None,
    path: str,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices [B, k], the (k+1)-th activation [B] and its index [B] (k = R: 0 and any)."""
    scores = _scores(x, weight, bias, blocks)
    ranked = select(scores, min(k + 1, scores.shape[1]))
    tops = scores.gather(1, ranked).relu()
    ranked = reference.numbered_through(ranked, scores.shape[1], blocks)
    values, indices = tops[:, :k], ranked[:, :k].contiguous()
    # With k = R there is no (k+1)-th neuron and nothing is inhibited.
    cut, after = tops.new_zeros(len(x)), indices.new_zeros(len(x))
    if ranked.shape[1] > k:
        cut, after = tops[:, k], ranked[:, k].contiguous()
    if inhibition == "subtract":
        values = (values - cut[:, None]).relu()
    values = values.to(x.dtype)
    if counts is not None:
        count_active(values, indices, counts)
    return values, indices, cut.to(x.dtype), after


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: int) -> Tensor:
    """reference.scores_of x [B, d]; on a CPU the transpose of [R, B], the faster product."""
    if not x.is_cpu:
        return reference.scores_of(x, weight, bias, blocks)
    wide = reference.accumulation_dtype(x.dtype)
    shifts = [None] * blocks if bias is None else bias.to(wide).unsqueeze(1).chunk(blocks)
    own = zip(x.to(wide).chunk(blocks), weight.to(wide).chunk(blocks), shifts, strict=True)
    each = [w @ a.T if shift is None else torch.addmm(shift, w, a.T) for a, w, shift in own]
    return (each[0] if blocks == 1 else torch.cat(each, dim=1)).T


def ranked_triton(scores: Tensor, k: int) -> Tensor:
    """reference.select by topk's kernel."""
    return topk(scores.detach(), k, impl="triton").indices


def _serve(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    path: str,
    inhibition: str,
    threshold: bool,
    preactivations: bool,
    counts: Tensor | None,
    blocks: int,
) -> TopKOutput:
    if preactivations:
        return reference.linear_topk(
            x,
            weight,
            k,
            bias,
            inhibition=inhibition,
            threshold=threshold,
            preactivations=preactivations,
            counts=counts,
            blocks=blocks,
            ranking=select if path == "torch" else ranked_triton,
        )
    batch = x.shape[:-1]
    values, indices, cut = _LinearTopK.apply(
        _dispatch.flattened(x), weight, bias, k, inhibition, counts, path, blocks
    )
    return TopKOutput(
        _dispatch.unflattened(values, (*batch, k)),
        indices.view(*batch, k),
        _dispatch.unflattened(cut, batch) if threshold else None,
    )


def heuristic(x: Tensor, k: int) -> str:
    """The implementation for x [.., d]; every one is exact.

    Measured on one H100, benchmarks/results/nvidia-h100-80gb-hbm3: "fused" is the fastest for fp32,
    and for 16 bits at d = 1,024; at d = 4,096 the library's GEMM saves a third of the time (nothing
    between the two was measured).
    "rescore" (d = 1,024, R = 65,536: 209 ms, "fused" 20) finds too many candidates.
    """
    if k >= MAX_K or x.dtype not in _dispatch.TRITON_DTYPES:
        return "torch"
    sixteen = x.dtype != torch.float32 and _linear_slabs.MIXED_MM
    return "chunked" if sixteen and x.shape[-1] >= 2048 else "fused"


def _triton(
    x: Tensor, weight: Tensor, k: int, bias: Tensor | None = None, *, blocks: int, **options: Any
) -> TopKOutput:
    path = heuristic(x, k)
    return _serve(x, weight, k, bias, path=path, blocks=blocks, **options)


def _forced(path: str) -> Callable[..., TopKOutput]:
    def serve(
        x: Tensor,
        weight: Tensor,
        k: int,
        bias: Tensor | None = None,
        *,
        blocks: int,
        **options: Any,
    ) -> TopKOutput:
        # What the kernels cannot serve takes the heuristic's choice.
        neurons = weight.shape[0] // blocks
        possible = path == "torch" or _linear_slabs.possible(path, x, neurons, k)
        chosen = path if possible else heuristic(x, k)
        return _serve(x, weight, k, bias, path=chosen, blocks=blocks, **options)

    return serve


IMPLEMENTATIONS: dict[str, Callable[..., TopKOutput]] = {
    "reference": reference.linear_topk,
    "torch": _forced("torch"),
}
if _dispatch.TRITON:
    IMPLEMENTATIONS["triton"] = _triton
    IMPLEMENTATIONS |= {path: _forced(path) for path in _linear_slabs.PATHS}
