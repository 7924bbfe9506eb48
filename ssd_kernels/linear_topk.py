"""relu(x W^T + b) and its exact top-k in one op, with gradients rebuilt from the k-sparse code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _encoder, _segments, reference
from ssd_kernels._encoder import Code
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.count_active import count_active
from ssd_kernels.reference import TopKOutput
from ssd_kernels.sparse_linear import gather_triton, sparse_linear
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
    networks: int = 1,
    impl: str | None = None,
) -> TopKOutput:
    """The k largest entries of relu(x weight^T + bias), chosen exactly; ties to the lower index.

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; scores accumulate in at least fp32.
        weight: [R, d] in the dtype of x.
        k: neurons that stay active, 1..R.
        bias: [R] in the dtype of x, or None.
        inhibition: "mask" keeps a on the top-k; "subtract" gives relu(a - I) there, with I the
            (k+1)-th largest activation, 0 for k = R (SDMLP, Bricken et al. 2023). The subtraction
            passes no gradient to I.
        threshold: also return I, as an output with a gradient.
        preactivations: also return x weight^T + bias [.., R], differentiable. Allocates it.
        counts: [R] int64 or int32, updated in place: += samples in which the neuron is active.
            Activation checkpointing runs the forward twice and so counts twice: there, call
            count_active on the result instead.
        networks: number S of networks whose rows follow one another. x then holds as many samples
            of each, weight is [S R, d], bias and counts are [S R]. The samples of a network see
            its R neurons alone, and so does k; no other network changes its result.
        impl: "triton", "torch" or "reference"; by default the fastest for the device. Beyond
            k = 255, and for fp64, "torch" takes the place of "triton"; every one is exact.

    Returns:
        TopKOutput: values [.., k] >= 0 in the dtype of x, descending; indices [.., k] int64 of the
        k largest pre-activations (an entry <= 0 is inactive: value 0, no gradient, not counted),
        numbered through the neurons of all networks, as sparse_linear takes them;
        threshold [..] and preactivations [.., R] where asked for, else None.

    Raises:
        TypeError, ValueError: a dtype, shape, device, k or networks that does not fit, before
            any work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_topk", x, weight, bias, k, networks)
    _checks.inhibition("linear_topk", inhibition)
    _checks.counter("linear_topk", "counts", counts, x, weight.shape[0])
    serve = _dispatch.choose("linear_topk", impl, x, served=k < MAX_K)
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
            networks=networks,
        )


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        inhibition: str,
        counts: Tensor | None,
        networks: int,
        kernels: bool,
        threshold: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        code = (_triton_code if kernels else _torch_code)(
            x, weight, bias, k, inhibition, counts, networks
        )
        # Kept are only those gates and parts of the threshold that matter; a GPU is not waited for.
        gates = code.passes
        if x.is_cpu and not kernels and gates.all():
            gates = gates.new_empty(0)
        ctx.has_cut = threshold and k < len(weight) // networks
        ctx.save_for_backward(
            x, weight, code.indices, gates, *((code.after, code.cut_passes) if ctx.has_cut else ())
        )
        ctx.kernels = kernels
        ctx.mark_non_differentiable(code.indices)
        ctx.set_materialize_grads(False)
        return code.values, code.indices, code.cut

    @staticmethod
    def backward(
        ctx: Any, grad_values: Tensor | None, _: None, grad_cut: Tensor | None
    ) -> tuple[Any, ...]:
        x, weight, indices, gates, *of_cut = ctx.saved_tensors
        passes = gates if len(gates) else torch.ones_like(indices, dtype=torch.bool)
        parts = []  # slopes, neurons, whether the gradient passes
        if grad_values is not None:
            parts.append((grad_values, indices, passes))
        if grad_cut is not None and ctx.has_cut:
            after, cut_passes = of_cut
            parts.append((grad_cut[:, None], after[:, None], cut_passes[:, None]))
        if not parts:
            return (None,) * 9
        slopes, ranked, passes = parts[0]
        if len(parts) > 1:
            slopes, ranked, passes = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
        batched = _dispatch.symbolic(slopes) and not _dispatch.tracing()
        plain = not ctx.kernels or _dispatch.differentiable() or batched
        gradients = _plain_gradients if plain else _triton_gradients
        return *gradients(slopes, ranked, passes, x, weight, ctx.needs_input_grad), *[None] * 6


def _plain_gradients(
    slopes: Tensor,
    ranked: Tensor,
    passes: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, weight and bias, by public ops: they can be differentiated in turn."""
    slopes = torch.where(passes, slopes, 0.0)
    grads: list[Tensor | None] = [None] * 3
    if needed[0]:
        grads[0] = sparse_linear(slopes, ranked, weight)
    if needed[1]:
        grads[1] = row_gradient(slopes, x, ranked, len(weight))
    if needed[2]:
        ones = slopes.new_ones(len(x), 1)
        grads[2] = row_gradient(slopes, ones, ranked, len(weight)).squeeze(1)
    return grads


def _triton_gradients(
    slopes: Tensor,
    ranked: Tensor,
    passes: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The same in one gather and one walk over the slots in the order of neurons."""
    slopes, gates = slopes.contiguous(), passes.contiguous().view(torch.uint8)
    grads: list[Tensor | None] = [None] * 3
    if needed[0]:
        grads[0] = gather_triton(slopes, ranked, weight, gates=gates)
    if needed[1] or needed[2]:
        inputs = x if needed[1] else x[:, :0]
        order = _segments.shared_order(ranked, len(weight))
        rows, sums = _segments.row_gradients(
            slopes, inputs, ranked, len(weight), needed[2], gates, order
        )
        grads[1:] = rows if needed[1] else None, sums if needed[2] else None
    return grads


def _torch_code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    inhibition: str,
    counts: Tensor | None,
    networks: int,
) -> Code:
    scores = _scores(x, weight, bias, networks)
    ranked = select(scores, min(k + 1, scores.shape[1]))
    tops = scores.gather(1, ranked).relu()
    ranked = reference.numbered_through(ranked, scores.shape[1], networks)
    values, indices = tops[:, :k].contiguous(), ranked[:, :k].contiguous()
    # With k = R there is no (k+1)-th neuron, so nothing is inhibited.
    cut, after = tops.new_zeros(len(x)), indices.new_zeros(len(x))
    if ranked.shape[1] > k:
        cut, after = tops[:, k], ranked[:, k].contiguous()
    if inhibition == "subtract":
        values = (values - cut[:, None]).relu()
    values = values.to(x.dtype)
    if counts is not None:
        count_active(values, indices, counts)
    cut = cut.to(x.dtype)
    return Code(values, indices, cut, after, ~(values <= 0), ~(cut <= 0))


def _triton_code(*given: Any) -> Code:
    values, indices, cut, kept = _encoder.code(*given)
    return Code(values, indices, cut, *_encoder.unpacked(kept, *values.shape))


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, networks: int) -> Tensor:
    """reference.scores_of x [B, d]; on a CPU as the transpose of [R, B], a faster product."""
    if not x.is_cpu:
        return reference.scores_of(x, weight, bias, networks)
    wide = reference.accumulation_dtype(x.dtype)
    shifts = [None] * networks if bias is None else bias.to(wide).unsqueeze(1).chunk(networks)
    own = zip(x.to(wide).chunk(networks), weight.to(wide).chunk(networks), shifts, strict=True)
    scores = [w @ a.T if shift is None else torch.addmm(shift, w, a.T) for a, w, shift in own]
    return (scores[0] if networks == 1 else torch.cat(scores, dim=1)).T


def _ranked_triton(scores: Tensor, k: int) -> Tensor:
    """reference.select by topk's kernel."""
    return topk(scores.detach(), k, impl="triton").indices


def _serve(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    kernels: bool,
    inhibition: str,
    threshold: bool,
    preactivations: bool,
    counts: Tensor | None,
    networks: int,
) -> TopKOutput:
    if preactivations:
        options: dict[str, Any] = {"inhibition": inhibition, "threshold": threshold}
        options |= {"counts": counts, "networks": networks, "preactivations": True}
        ranking = _ranked_triton if kernels else select
        return reference.linear_topk(x, weight, k, bias, ranking=ranking, **options)
    batch = x.shape[:-1]
    given = _dispatch.flattened(x), weight, bias, k, inhibition, counts, networks
    leaves = (t for t in given[:3] if t is not None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        values, indices, cut = _LinearTopK.apply(*given, kernels, threshold)
    else:
        values, indices, cut, *_ = (_triton_code if kernels else _torch_code)(*given)
    return TopKOutput(
        _dispatch.unflattened(values, (*batch, k)),
        indices.view(*batch, k),
        _dispatch.unflattened(cut, batch) if threshold else None,
    )


_dispatch.register(
    "linear_topk",
    reference=reference.linear_topk,
    torch=partial(_serve, kernels=False),
    triton=partial(_serve, kernels=True),
)
