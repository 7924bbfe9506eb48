"""Sparse code and analytic readout: a k-sparse layer that stays as it is, and a closed-form decoder.

The decoder is the solution for all the data seen so far and needs of it only the code's Gram
matrix, its sums over classes and the class counts, to which each task adds (ssd_kernels.code_gram).
So nothing is forgotten, nothing is replayed, and the order of the tasks does not matter but for
what the encoder takes from the first one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.errors import UserError
from ssd.sdmlp import SDMLP
from ssd_kernels import TopKOutput, code_gram, linear_topk, sparse_linear

# Samples whose scores are held at a time.
CHUNK = 2048

Encoder = Callable[[Tensor], TopKOutput]


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + r m I)^-1 X in float64, m the mean diagonal entry of G.

    gram G [R, R], cross X [R, C], ridge r > 0 -> [R, C].
    """
    return _solve(gram.double(), cross.double(), ridge)


def discriminant(
    gram: Tensor, cross: Tensor, counts: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with one covariance S within classes, equal priors.

    With class means M = X / n: weight = S'^-1 M, bias = -1/2 diag(M^T weight), where
    S' = (1 - s) S + s (tr S / R) I (Hayes & Kanan 2020; scikit-learn's shrinkage).

    Args:
        gram: [R, R], sum of h h^T. cross: [R, C], sums of h over each class. counts: n [C].
        shrinkage: s, above 0 and at most 1.

    Returns:
        weight [R, C] and bias [C], float64.
    """
    sums, number = cross.double(), counts.double()
    means = sums / number.clamp(min=1)
    covariance = torch.addmm(gram.double(), means, sums.T, alpha=-1).div_(number.sum())
    # The ridge of _solve is relative to S, not to S'.
    weight = _solve(covariance, means, shrinkage / (1 - shrinkage)) / (1 - shrinkage)
    return weight, -(means * weight).sum(0) / 2


def _solve(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    shift = ridge * matrix.diagonal().mean()
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return torch.cholesky_solve(right, torch.linalg.cholesky(shifted))


def only_seen(scores: Tensor, counts: Tensor) -> Tensor:
    """Scores [N, C] with -inf for the classes that have no samples in counts [C]."""
    return scores.masked_fill(counts == 0, -torch.inf)


def gaussian_addresses(neurons: int, features: int, generator: torch.Generator) -> Tensor:
    """Independent Gaussian directions, [R, d]."""
    return torch.randn(neurons, features, generator=generator)


def local_addresses(
    neurons: int, side: int, generator: torch.Generator, width: float = 3.0
) -> Tensor:
    """Gaussian noise under a Gaussian window around a random pixel of a square image, [R, side^2].

    width: standard deviation of the window in pixels.
    """
    centres = torch.rand(neurons, 2, 1, generator=generator) * (side - 1)
    distance = (torch.arange(side) - centres).square()
    window = torch.exp(-distance / (2 * width**2))
    noise = torch.randn(neurons, side, side, generator=generator)
    return (noise * window[:, 0, :, None] * window[:, 1, None, :]).flatten(1)


class RandomCode:
    """Top-K code of random addresses: the k largest scores less the (k+1)-th.

    The input is centred by the mean of the first task and scaled to unit L2 norm.

    Args:
        addresses: [R, d] float32. k: 1..R.

    begin takes the first task's x [N, d]; a call maps x [N, d] to the code, [N, k] twice.
    """

    def __init__(self, addresses: Tensor, k: int, power: float = 1.0) -> None:
        self.addresses, self.k = addresses, k
        self.mean: Tensor | None = None

    def begin(self, x: Tensor) -> None:
        self.mean = x.double().mean(0).float()

    def __call__(self, x: Tensor) -> TopKOutput:
        assert self.mean is not None
        centred = F.normalize(x.float() - self.mean, dim=1)
        return linear_topk(centred, self.addresses, self.k, inhibition="subtract")
