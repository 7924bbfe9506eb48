"""The penalty of a ridge regression, chosen from second moments alone.

H [N, R] holds the hidden layer of N samples, Y [N, C] their one-hot labels. Moments are the Gram
matrix H^T H [R, R] and the class sums H^T Y [R, C], so no sample is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor


def candidates(gram: Tensor) -> Tensor:
    """10^-8, 10^-7, .., 10^8, as in the public code of RanPAC, but for those lost in rounding.

    Args:
        gram: [R, R], to which the penalty will be added.

    Returns:
        [P] float64.
    """
    # A Cholesky factor of a singular matrix exists from about a third of this on.
    least = torch.finfo(gram.dtype).eps * gram.diagonal().double().sum()
    powers = 10.0 ** torch.arange(-8, 9, dtype=torch.float64, device=gram.device)
    return powers[powers >= least]


def held_out_choice(
    tried: Tensor, gram: Tensor, cross: Tensor, held_gram: Tensor, held_cross: Tensor
) -> float:
    """The penalty r with the least |Y' - H' W|^2 on held-out H', Y', for W = (G + r I)^-1 X.

    Args:
        tried: penalties [P] float64, above 0.
        gram: G [R, R] of the data that W is fitted to.
        cross: X [R, C] of the same.
        held_gram: [R, R] of the held-out data.
        held_cross: [R, C] of the same.
    """
    values, vectors = _eigen(gram)
    learned = cross.ne(0).any(0)  # W is 0 for all other classes
    rotated, held_rotated = (vectors.T @ sums[:, learned].double() for sums in (cross, held_cross))
    held = vectors.T @ held_gram.double() @ vectors
    errors = []
    for penalty in tried:
        weight = rotated / (values + penalty).unsqueeze(1)
        # |Y'|^2 is the same for every penalty.
        errors.append((weight * (held @ weight - 2 * held_rotated)).sum())
    return tried[torch.stack(errors).argmin()].item()


def cross_validated_choice(tried: Tensor, gram: Tensor, cross: Tensor, samples: int) -> float:
    """The penalty with the least generalised cross-validation score (Golub, Heath & Wahba 1979).

    The score is (|Y - A Y|^2 / N) / (1 - tr A / N)^2 with A = H (H^T H + r I)^-1 H^T.

    Args:
        tried: penalties r [P] float64, above 0.
        gram: H^T H [R, R].
        cross: H^T Y [R, C].
        samples: N.
    """
    values, vectors = _eigen(gram)
    spanned = values > len(gram) * torch.finfo(gram.dtype).eps * values.max()
    values, vectors = values[spanned], vectors[:, spanned]
    # |u^T Y|^2 for each left singular vector u of H. A leaves out all that H does not span.
    explained = (vectors.T @ cross.double()).square().sum(1) / values
    free = max(samples - len(values), 0)
    left = (samples - explained.sum()).clamp(min=0) if free else 0.0
    kept = tried.unsqueeze(1) / (values + tried.unsqueeze(1))
    residual = left + (kept.square() * explained).sum(1)
    return tried[(residual / (free + kept.sum(1)).square()).argmin()].item()


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram.double())
    return values.clamp(min=0), vectors
