"""The specification: every op of ssd_kernels in plain PyTorch, for any device and dtype.

Shapes: B batch, d input, R neurons, k active, K slots of a sparse code, C outputs.
A sparse code is a pair (values [B, K], indices [B, K]): slot s of sample b says that neuron
indices[b, s] has activation values[b, s]. A slot whose value is 0 is inactive: it passes no
gradient and is not counted.

Where an op takes `networks`, the rows of S networks follow one another: x [S B, d] holds B
samples of each and weight [S R, d] the neurons of each, the samples of a network see its neurons
alone, and indices count through the neurons of all, 0..S R - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TopKOutput(NamedTuple):
    """What the selecting ops return; fields the caller did not ask for are None."""

    values: Tensor  # [B, k]
    indices: Tensor  # [B, k] int64
    threshold: Tensor | None = None  # [B]
    preactivations: Tensor | None = None  # [B, R]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of this input dtype are computed and compared."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def select(keys: Tensor, k: int) -> Tensor:
    """Indices of the k largest keys of each row: descending, ties to the lower index, NaN largest.

    keys [B, R] -> [B, k] int64.
    """
    # Adding zero turns -0.0 into 0.0, so that the two tie on every device.
    order = torch.sort(keys.detach() + 0.0, dim=-1, descending=True, stable=True).indices
    return order[..., :k]


def topk(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    """Row-wise top-k of scores * boost among the neurons that mask allows; passes on scores."""
    keys = scores.detach().to(accumulation_dtype(scores.dtype))
    if boost is not None:
        keys = keys * boost.to(keys.dtype)
    if mask is None:
        indices = select(keys, k)
        return TopKOutput(scores.gather(-1, indices), indices)
    # A disallowed neuron ranks below every allowed one, -inf included, and disallowed neurons tie:
    # order by key, then stably by permission.
    order = select(keys.masked_fill(~mask, -torch.inf), keys.shape[-1])
    allowed_first = torch.sort((~mask)[order].to(torch.int8), dim=-1, stable=True).indices
    indices = order.gather(-1, allowed_first)[..., :k]
    values = scores.gather(-1, indices)
    return TopKOutput(torch.where(mask[indices], values, torch.zeros_like(values)), indices)


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
    ranking: Callable[[Tensor, int], Tensor] = select,
) -> TopKOutput:
    """relu(x weight^T + bias), then its k largest entries a row; `ranking` may replace select."""
    scores = scores_of(x, weight, bias, networks)
    ranked = ranking(scores, min(k + 1, scores.shape[-1]))
    indices = ranked[..., :k]
    cut = _cut(scores, ranked, k)
    values = scores.gather(-1, indices)
    if inhibition == "subtract":
        values = positive_part(values) - cut.detach().unsqueeze(-1)
    values = positive_part(values.to(x.dtype))
    indices = numbered_through(indices, scores.shape[-1], networks)
    if counts is not None:
        count_active(values, indices, counts)
    return TopKOutput(
        values,
        indices,
        positive_part(cut.to(x.dtype)) if threshold else None,
        # The gradient of gather reads scores; users may write into what an op returns.
        scores.to(x.dtype, copy=True) if preactivations else None,
    )


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
) -> Tensor:
    """a = relu(x weight^T + bias), inhibited by gaba times its (k+1)-th largest entry; dense."""
    scores = by_network(scores_of(x, weight, bias, networks), networks)
    a = positive_part(scores)
    cut = _cut(scores, select(scores, min(k + 1, scores.shape[-1])), k).detach().unsqueeze(-1)
    surplus = a - (cut if gaba is None else gaba.to(a.dtype).reshape(networks, 1, -1) * cut)
    if inhibition == "mask":
        # NaN stays, so that it is seen.
        hidden = torch.where((surplus > 0) | a.isnan(), a, torch.zeros_like(a))
    else:
        hidden = surplus
    hidden = positive_part(hidden.reshape(*x.shape[:-1], a.shape[-1]).to(x.dtype))
    if counts is not None:
        counts += by_network(hidden > 0, networks).sum(1).flatten()
    return hidden


def sparse_linear(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The code (values, indices) times weight [R, C]: row j is what neuron j writes."""
    accumulate = accumulation_dtype(weight.dtype)
    rows = F.embedding(indices, weight).to(accumulate)  # which refuses a negative index
    out = (values.to(accumulate).unsqueeze(-1) * rows).sum(-2)
    if bias is not None:
        out = out + bias.to(accumulate)
    return out.to(weight.dtype)


def count_active(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    last_active: Tensor | None = None,
    step: int | Tensor = 0,
) -> None:
    """counts[j] += samples in which j is active; last_active[j] = step where there is one."""
    active = values.detach() > 0
    hits = torch.zeros_like(counts).index_add_(
        0, indices.flatten(), active.flatten().to(counts.dtype)
    )
    counts += hits
    if last_active is not None:
        stamp = torch.as_tensor(step, dtype=last_active.dtype, device=last_active.device)
        last_active.copy_(torch.where(hits > 0, stamp, last_active))


def row_gradient(coefficients: Tensor, inputs: Tensor, indices: Tensor, neurons: int) -> Tensor:
    """Gradient [R, d] whose row j is the sum of coefficients[b, s] * inputs[b] over slots of j."""
    slots = coefficients.unsqueeze(-1)
    # A slot of coefficient 0 passes nothing of an infinite input either.
    products = torch.where(slots != 0, slots * inputs.unsqueeze(-2), 0.0)
    gradient = products.new_zeros(neurons, inputs.shape[-1])
    rows = products.reshape(indices.numel(), inputs.shape[-1])
    return gradient.index_add_(0, indices.flatten(), rows)


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
) -> Tensor:
    """One projected SGD step on the rows that the code touches; the others keep their bits."""
    neurons = weights[0].shape[0]
    hits = torch.zeros(neurons, dtype=torch.int64, device=indices.device)
    for coefficient in coefficients:
        hits.index_add_(0, indices.flatten(), (coefficient != 0).flatten().to(hits.dtype))
    touched = hits > 0
    dtype = reduce(torch.promote_types, (w.dtype for w in weights))
    wide = accumulation_dtype(dtype)
    gradients = [
        row_gradient(c.to(wide), i.to(wide), indices, neurons)
        for c, i in zip(coefficients, inputs, strict=True)
    ]
    return sgd_step(
        weights,
        gradients,
        touched,
        lr=lr,
        max_norm=max_norm,
        nonnegative=nonnegative,
        normalize=normalize,
        momentum=momentum,
        buffers=buffers,
        networks=networks,
    )


def sgd_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moves: Tensor,
    *,
    lr: float | Tensor,
    max_norm: float | Tensor | None,
    nonnegative: bool,
    normalize: Sequence[bool] | None,
    momentum: float,
    buffers: Sequence[Tensor] | None,
    networks: int,
) -> Tensor:
    """One clipped, projected step on the rows that move [R]; the others keep their bits.

    Gradients are in the dtype of sums. Returns the norms before clipping, as row_update does.
    """
    norm = length(torch.cat([g.reshape(networks, -1) for g in gradients], dim=1)).squeeze(1)
    block = torch.arange(len(moves), device=norm.device) // (len(moves) // networks)
    scale = clip_scale(norm, max_norm)[block].unsqueeze(1)
    rate = lr[block].unsqueeze(1) if isinstance(lr, Tensor) else lr
    for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        direction = gradient * scale
        if buffers is not None:
            buffer = buffers[number]
            direction = torch.where(
                moves[:, None], momentum * buffer.to(gradient.dtype) + direction, buffer
            )
            buffer.copy_(direction)
        row_norm = normalize is not None and normalize[number]
        updated = project(weight.to(gradient.dtype) - rate * direction, nonnegative, row_norm)
        weight.copy_(torch.where(moves[:, None], updated, weight))
    dtype = reduce(torch.promote_types, (w.dtype for w in weights))
    return (norm if networks > 1 else norm[0]).to(dtype)


def clip_scale(norm: Tensor, max_norm: float | Tensor | None) -> Tensor:
    """The factor that clips a gradient of this global norm, whatever its scale.

    That of torch.nn.utils.clip_grad_norm_, whose 1e-6 counts here in units of max_norm.
    """
    if max_norm is None:
        return torch.ones_like(norm)
    limits = torch.finfo(norm.dtype)
    bound: float | Tensor
    if isinstance(max_norm, Tensor):
        bound = max_norm.to(norm.dtype).clamp(max=limits.max)
    else:
        bound = min(max_norm, limits.max)
    return (bound / (norm + 1e-6 * bound).clamp(min=limits.tiny)).clamp(max=1.0)


def power_of_two(peak: Tensor) -> Tensor:
    """The largest power of two that is not above peak; 1 where peak is 0 or not finite.

    Division by it is exact, except for numbers that vanish beside peak.
    """
    wide = peak.detach().to(accumulation_dtype(peak.dtype))
    unit = wide / (2 * torch.frexp(wide).mantissa)
    return torch.where((wide > 0) & wide.isfinite(), unit, 1.0).to(peak.dtype)


def length(rows: Tensor) -> Tensor:
    """L2 norm [.., 1] of rows [.., d], whose squares stay in the range of the dtype."""
    if rows.shape[-1] == 0:
        return rows.new_zeros(*rows.shape[:-1], 1)
    unit = power_of_two(rows.abs().amax(dim=-1, keepdim=True))
    return (rows / unit).norm(dim=-1, keepdim=True) * unit


def project(weight: Tensor, nonnegative: bool, normalize: bool) -> Tensor:
    """Clamp at 0, then unit L2 rows, whatever their scale; an all-zero row stays zero."""
    if nonnegative:
        weight = weight.clamp(min=0)
    if normalize and weight.shape[-1] > 0:
        weight = weight / power_of_two(weight.abs().amax(dim=-1, keepdim=True))
        size = weight.norm(dim=-1, keepdim=True)
        weight = weight / torch.where(size > 0, size, torch.ones_like(size))
    return weight


def scores_of(x: Tensor, weight: Tensor, bias: Tensor | None, networks: int = 1) -> Tensor:
    """x weight^T + bias [.., R]; a product for each network, as if it were alone."""
    if networks > 1:
        samples, neurons = by_network(x, networks), by_network(weight, networks)
        shifts = [None] * networks if bias is None else bias.reshape(networks, -1)
        scores = [scores_of(*own) for own in zip(samples, neurons, shifts, strict=True)]
        return torch.stack(scores).view(*x.shape[:-1], neurons.shape[1])
    accumulate = accumulation_dtype(x.dtype)
    return F.linear(
        x.to(accumulate), weight.to(accumulate), None if bias is None else bias.to(accumulate)
    )


def by_network(rows: Tensor, networks: int) -> Tensor:
    """[.., d] -> [S, rows of one network, d]."""
    width = rows.shape[-1]
    count = -1 if width else math.prod(rows.shape[:-1]) // networks
    return rows.reshape(networks, count, width)


def numbered_through(indices: Tensor, neurons: int, networks: int) -> Tensor:
    """Indices [.., k] within each network -> indices through the neurons of all networks."""
    if networks == 1:
        return indices
    first = neurons * torch.arange(networks, device=indices.device)
    return (by_network(indices, networks) + first.view(-1, 1, 1)).view(indices.shape)


def _cut(scores: Tensor, ranked: Tensor, k: int) -> Tensor:
    """The (k+1)-th largest entry of relu(scores); 0 where k is all of them."""
    if ranked.shape[-1] == k:
        return scores.new_zeros(scores.shape[:-1])
    return positive_part(scores.gather(-1, ranked[..., k:]).squeeze(-1))


def positive_part(x: Tensor) -> Tensor:
    """relu(x), whose gradient does not read the result: users may write into what an op returns."""
    return F.threshold(x, 0.0, 0.0)
