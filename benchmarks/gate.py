"""The correctness gate: a provider with a wrong result is not timed.

Every check returns what is wrong, or "". Since rounding may decide near ties either way, top-k
results are compared as sets: the true scores of the chosen neurons, sorted, must reach the true k
largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 256  # samples that are checked against fp64, spread over the batch
NEURONS = 64  # rows of a weight gradient that are checked, about
# A few roundings of a library product over thousands of terms; a TF32 product is off by 2e-4.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-13}


def selection(
    scores: Tensor, values: Tensor, indices: Tensor, slack: Tensor, value_slack: Tensor
) -> str:
    """True scores [n, R] fp64 against a top-k (values, indices) [n, k] in any order.

    slack [n, 1]: how far a chosen score may lie below the true one of its rank.
    value_slack [n, 1]: how far a returned value may lie from its score, beyond slack.
    """
    k = indices.shape[-1]
    if values.shape != indices.shape or len(indices) != len(scores):
        return f"shapes {list(values.shape)} and {list(indices.shape)}"
    indices = indices.long()
    if ((indices < 0) | (indices >= scores.shape[-1])).any():
        return "an index is out of range"
    if k > 1 and (indices.sort(-1).values.diff(dim=-1) == 0).any():
        return "a neuron was chosen twice"
    chosen = scores.gather(1, indices)
    below = scores.topk(k).values - chosen.sort(-1, descending=True).values
    if not (below <= slack).all():
        return f"a chosen score lies {below.max():.3g} below the true one of its rank"
    wrong = (values.double() - chosen).abs()
    if not (wrong <= slack + value_slack).all():
        return f"a value is off by {wrong.max():.3g}"
    return ""


def topk(scores: Tensor, values: Tensor, indices: Tensor) -> str:
    """Without any tolerance, since topk computes nothing."""
    rows = sample_rows(scores)
    exact = scores[rows].double()
    none = exact.new_zeros(len(rows), 1)
    return selection(exact, values[rows], indices[rows], none, none)


def linear_topk(
    x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor, *, rounded: bool
) -> str:
    """Scores within fp32 rounding of fp64; if `rounded`, within that of the inputs' dtype.

    `rounded` admits a library that selects on scores already rounded to 16 bits. The slack of
    4 * 2^-23 * |x| * |w| is about ten times the error of fp32 accumulation and a tenth of the error
    of TF32, so that a TF32 product does not pass for fp32.
    """
    rows = sample_rows(x)
    sampled = x[rows].double()
    scores = torch.addmm(bias.double(), sampled, weight.double().T)
    length = sampled.norm(dim=1, keepdim=True) * weight.norm(dim=1, dtype=torch.float32).max()
    accumulated = 4 * 2.0**-23 * length.double()
    size = scores.amax(1, keepdim=True).abs()
    coarse = torch.finfo(x.dtype).eps * size
    slack = accumulated + coarse if rounded else accumulated
    return selection(scores.relu(), values[rows], indices[rows], slack, coarse)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scores: Tensor) -> str:
    """A plain product, without top-k."""
    rows = sample_rows(x)
    true = F.linear(x[rows].double(), weight.double(), None if bias is None else bias.double())
    return close("scores", scores[rows], true)


def linear_topk_gradients(
    inputs: Sequence[Tensor],
    values: Tensor,
    indices: Tensor,
    grad_rows: Tensor,
    gradients: Sequence[Tensor],
) -> str:
    """Gradients of sum(grad_rows * values) for the chosen neurons; grad_rows is [B, 1]."""
    x, weight, _ = (t.detach() for t in inputs)
    rows = sample_rows(x)
    coefficients = grad_rows.double() * (values > 0)
    picked = weight[indices[rows].long()].double()
    true_x = (coefficients[rows].unsqueeze(-1) * picked).sum(1)
    return (
        close("dx", gradients[0][rows], true_x)
        or weight_gradient(coefficients, indices, x, gradients[1])
        or weight_gradient(coefficients, indices, torch.ones_like(x[:, :1]), gradients[2][:, None])
    )


def weight_gradient(values: Tensor, indices: Tensor, vectors: Tensor, gradient: Tensor) -> str:
    """Some rows of H^T vectors, for the dense form H [B, R] of a code [B, k]."""
    neurons = indices.flatten()[:: max(1, indices.numel() // NEURONS)].long().unique()
    dense = torch.stack([(values * (indices == j)).sum(1) for j in neurons])
    return close("dW or db", gradient[neurons], dense @ vectors.double())


def close(name: str, got: Tensor, true: Tensor) -> str:
    """Relative error of the whole tensor in the Frobenius norm: at most TOLERANCE of its dtype.

    Integers must be equal.
    """
    if got.shape != true.shape:
        return f"{name} has shape {list(got.shape)}, expected {list(true.shape)}"
    if not got.is_floating_point():
        return "" if torch.equal(got, true) else f"{name} differs"
    error = ((got.double() - true).norm() / true.norm().clamp(min=1e-300)).item()
    allowed = TOLERANCE[got.dtype]
    return "" if error <= allowed else f"{name} has relative error {error:.2g} > {allowed:.2g}"


def sample_rows(batch: Tensor) -> Tensor:
    count = min(len(batch), ROWS)
    return torch.linspace(0, len(batch) - 1, count, device=batch.device).round().long()
