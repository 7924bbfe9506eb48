"""relu(x W^T + b) under graded inhibition, dense: the warm-up of a k-sparse layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _checks, _dispatch, _op, _tuning, reference
from ssd_kernels._encoder_kernels import _inhibit_kernel
from ssd_kernels.topk import MAX_K, select_triton

_tuning.TABLE["linear_inhibit"] = {"default": (({}, {"BM": 16, "BN": 256, "num_warps": 4}),)}

MIXED_MM = "dtype" in torch.ops.aten.mm.overloads()  # 16-bit inputs, fp32 result


def linear_inhibit(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    counts: Tensor | None = None,
    networks: int = 1,
    impl: str | None = None,
) -> Tensor:
    """h = relu(a - gaba * I) with a = relu(x weight^T + bias), I its (k+1)-th largest entry a row.

    While some gaba < 1 more than k neurons may be active, so the result is dense; with gaba = 1
    everywhere it equals linear_topk scattered into [.., R], except that "mask" drops all ties with
    I. (SDMLP, Bricken et al. 2023: the GABA switch goes from -1, excitation, to 1, inhibition.)

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64; weight: [R, d]; bias: [R] or None.
        k: neurons that full inhibition leaves active, 1..R.
        gaba: [R], each neuron's response to I, at most 1; None means 1.
        inhibition: "subtract" as above; "mask" passes a on where a > gaba * I.
        counts: [R] int64 or int32, updated in place: += samples in which h > 0; twice as many
            under activation checkpointing, which runs the forward twice.
        networks: number S of networks whose rows follow one another, see linear_topk: weight is
            [S R, d], gaba, bias and counts are [S R].
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        h [.., R] in the dtype of x, of a sample's own network; I carries no gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device, k or networks that does not fit, before
            any work.
    """
    x, weight, bias = _dispatch.autocast(x, weight, bias)
    _checks.linear("linear_inhibit", x, weight, bias, k, networks)
    _checks.response("linear_inhibit", gaba, x, weight.shape[0])
    _checks.inhibition("linear_inhibit", inhibition)
    _checks.counter("linear_inhibit", "counts", counts, x, weight.shape[0])
    # Annealing starts with k = R, where a sort is faster than any selection.
    learned = gaba is not None and gaba.requires_grad and torch.is_grad_enabled()
    served = k < MAX_K and not learned
    serve = _dispatch.choose("linear_inhibit", impl, x, served=served)
    with _dispatch.as_given(x):
        return serve(
            x, weight, k, gaba, bias, inhibition=inhibition, counts=counts, networks=networks
        )


def _torch(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    counts: Tensor | None,
    networks: int,
) -> Tensor:
    a = reference.by_network(reference.scores_of(x, weight, bias, networks), networks).relu()
    if k == a.shape[-1]:
        cut = a.new_zeros(*a.shape[:-1], 1)
    else:
        cut = torch.topk(a.detach(), k + 1).values[..., k:]
    if gaba is None:
        surplus = a - cut
    else:
        surplus = torch.addcmul(a, gaba.to(a.dtype).reshape(networks, 1, -1), cut, value=-1)
    mask = inhibition == "mask"
    hidden = torch.where((surplus > 0) | a.isnan(), a, 0.0) if mask else surplus
    if not mask or hidden.dtype != x.dtype:
        hidden = reference.positive_part(hidden.to(x.dtype))
    if counts is not None:
        counts += (hidden > 0).sum(1).flatten()
    return _dispatch.unflattened(hidden, (*x.shape[:-1], a.shape[-1]))


def _inhibit_like(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    counts: Tensor | None,
    need_passes: bool,
    networks: int,
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(x.shape[0], weight.shape[0] // networks)
    return hidden, hidden.new_empty(hidden.shape if need_passes else 0, dtype=torch.bool)


@_op.operator("ssd_kernels::linear_inhibit", _inhibit_like, mutates=("counts",))
def inhibit_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    counts: Tensor | None,
    need_passes: bool,
    networks: int,
) -> tuple[Tensor, Tensor]:
    """The dense activations [B, R] and, if needed, bool [B, R]: where the gradient passes."""
    x, weight = x.detach(), weight.detach()
    neurons = len(weight) // networks
    hidden, passes = _inhibit_like(
        x, weight, bias, k, gaba, inhibition, counts, need_passes, networks
    )
    gaba = None if gaba is None else gaba.detach().contiguous()
    chosen = _tuning.config("linear_inhibit", x.device)
    for rows, first, count, scores in _slabs(x, weight, bias, hidden, networks):
        size = len(scores) // count
        best = scores if k == neurons else select_triton(scores, k + 1)[0]
        own = slice(first * neurons, (first + count) * neurons)
        tiles = -(-neurons // chosen["BN"]) * -(-size // chosen["BM"])
        with torch.cuda.device_of(x):
            _inhibit_kernel[(tiles * count,)](
                scores,
                best,
                x if gaba is None else gaba[own],
                hidden[rows],
                passes[rows] if need_passes else passes,
                passes if counts is None else counts[own],
                size,
                neurons,
                k,
                1 if counts is None else counts.stride(0),
                CUT=k < neurons,
                GABA=gaba is not None,
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                PASSES=need_passes,
                **chosen,
            )
    return hidden, passes


def _slabs(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, networks: int
) -> Iterator[tuple[slice, int, int, Tensor]]:
    """Rows of the batch, their first network, the number of networks, and their fp32 scores.

    fp32 inputs: all rows, scored in the memory of the result. Else a few rows of one network at a
    time, in memory that is reused.
    """
    batch, neurons = len(x) // networks, len(weight) // networks
    if batch == 0:
        return
    if hidden.dtype == torch.float32:
        scores = hidden.view(networks, batch, neurons)
        factors = x.view(networks, batch, -1), weight.view(networks, neurons, -1).mT
        if networks == 1:
            torch.mm(*(factor[0] for factor in factors), out=hidden)
        else:
            torch.bmm(*factors, out=scores)
        if bias is not None:
            scores += bias.detach().view(networks, 1, neurons)
        yield slice(0, len(x)), 0, networks, hidden
        return
    height = min(batch, slab_rows(neurons))
    slab = hidden.new_empty(height, neurons, dtype=torch.float32)
    for network in range(networks):
        own = slice(network * neurons, (network + 1) * neurons)
        for start in range(network * batch, (network + 1) * batch, height):
            rows = slice(start, min(start + height, (network + 1) * batch))
            scores = slab[: rows.stop - rows.start]
            _multiply(x[rows], weight[own].T, scores)
            if bias is not None:
                scores += bias.detach()[own]
            yield rows, network, 1, scores


def _multiply(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if x.is_cuda and MIXED_MM:
        torch.mm(x, weight, out_dtype=torch.float32, out=out)
    else:  # Triton's interpreter, and torch before 2.8
        torch.mm(x.float(), weight.float(), out=out)


def slab_rows(neurons: int) -> int:
    """Rows of 16-bit inputs scored at a time, as many as fit a cache of 32 MiB."""
    return max(128, 2**23 // neurons // 64 * 64)


class _LinearInhibit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        gaba: Tensor | None,
        inhibition: str,
        counts: Tensor | None,
        networks: int,
    ) -> Tensor:
        hidden, passes = inhibit_triton(
            x, weight, bias, k, gaba, inhibition, counts, True, networks
        )
        ctx.save_for_backward(x, weight, passes)
        ctx.networks = networks
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, passes = ctx.saved_tensors
        slopes, inputs, neurons = (
            reference.by_network(t, ctx.networks)
            for t in (torch.where(passes, grad, 0.0), x, weight)
        )
        needs = ctx.needs_input_grad
        return (
            torch.bmm(slopes, neurons).view(x.shape) if needs[0] else None,
            torch.bmm(slopes.mT, inputs).view(weight.shape) if needs[1] else None,
            slopes.sum(1).flatten() if needs[2] else None,
            *[None] * 5,
        )


def _triton(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    inhibition: str,
    counts: Tensor | None,
    networks: int,
) -> Tensor:
    flat = _dispatch.flattened(x)
    given = flat, weight, bias, k, gaba, inhibition, counts
    leaves = (t for t in given[:3] if t is not None)
    hidden: Tensor
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        hidden = _LinearInhibit.apply(*given, networks)
    else:
        hidden, _ = inhibit_triton(*given, False, networks)
    return _dispatch.unflattened(hidden, (*x.shape[:-1], hidden.shape[1]))


_dispatch.register(
    "linear_inhibit", reference=reference.linear_inhibit, torch=_torch, triton=_triton
)
