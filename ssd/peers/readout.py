"""Sparse code and analytic readout: a fixed k-sparse layer and a decoder in closed form.

The decoder is the solution for all data seen so far. It needs only the code's Gram matrix, its
sums over classes and the class counts, to which each task adds (ssd.ops.code_gram). So nothing is
forgotten or replayed, and the order of the tasks matters only for what the encoder takes from the
first one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssd.errors import Diverged, UserError
from ssd.metrics import finite
from ssd.models import SDMLP
from ssd.ops.code_gram import code_gram
from ssd_kernels import TopKOutput, linear_topk, sparse_linear
from ssd_kernels.reference import power_of_two, project

# Samples whose scores are held at a time.
CHUNK = 2048
# A wider Gram matrix is kept in float32: 10,000 neurons take 400 MB.
WIDE = 4096


def gram_dtype(neurons: int) -> torch.dtype:
    """The dtype of a Gram matrix [R, R]; its solution is always float64."""
    return torch.float32 if neurons > WIDE else torch.float64


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """(G + r m I)^-1 X, m the mean diagonal entry of G.

    Args:
        gram: G [R, R].
        cross: X [R, C].
        ridge: r, above 0.

    Returns:
        [R, C] float64.

    Raises:
        Diverged: the matrix is singular up to rounding, or not finite.
    """
    return _solve(gram.double(), cross.double(), ridge)


def discriminant(
    gram: Tensor, cross: Tensor, counts: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with one covariance S within classes, equal priors.

    With class means M = X / n: weight = S'^-1 M, bias = -1/2 diag(M^T weight), where
    S' = (1 - s) S + s (tr S / R) I (Hayes & Kanan 2020; scikit-learn's shrinkage).

    Args:
        gram: [R, R], sum of h h^T.
        cross: X [R, C], sums of h over each class.
        counts: n [C].
        shrinkage: s, above 0 and at most 1.

    Returns:
        weight [R, C] and bias [C], float64.

    Raises:
        Diverged: S' is singular up to rounding, or not finite.
    """
    sums, number = cross.double(), counts.double()
    means = sums / number.clamp(min=1)
    covariance = torch.addmm(gram.double(), means, sums.T, alpha=-1).div_(number.sum())
    weight = _solve(covariance, means, shrinkage, 1 - shrinkage)
    return weight, -(means * weight).sum(0) / 2


def _solve(matrix: Tensor, right: Tensor, ridge: float, share: float = 1.0) -> Tensor:
    """(share M + ridge m I)^-1 right, m the mean diagonal entry of M."""
    mean = matrix.diagonal().mean()
    shifted = share * matrix
    shifted.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    solution = torch.cholesky_solve(right, factor)
    if failed or not finite(solution):
        raise Diverged(
            f"a readout has no solution at strength {ridge:g}: the matrix of {len(matrix)} units "
            f"with mean square {mean.item():g} is singular; use a larger one, or features that vary"
        )
    return solution


def only_seen(scores: Tensor, counts: Tensor) -> Tensor:
    """Scores [N, C] with -inf for the classes that have no samples in counts [C]."""
    return scores.masked_fill(counts == 0, -torch.inf)


def local_addresses(neurons: int, side: int, generator: torch.Generator, width: float) -> Tensor:
    """Gaussian noise under a Gaussian window around a random pixel of a square image.

    Args:
        neurons: R.
        side: of the image, in pixels.
        generator: source of windows and noise.
        width: standard deviation of the window, in pixels.

    Returns:
        [R, side^2] float32.
    """
    centres = torch.rand(neurons, 2, 1, generator=generator, device="cpu") * (side - 1)
    distance = (torch.arange(side, device="cpu") - centres).square()
    window = torch.exp(-distance / (2 * width**2))
    noise = torch.randn(neurons, side, side, generator=generator, device="cpu")
    return (noise * window[:, 0, :, None] * window[:, 1, None, :]).flatten(1)


class RandomCode:
    """Top-K code of fixed random addresses: the k largest scores less the (k+1)-th.

    The input x >= 0 is raised to `power`, centred by its mean over the first task and scaled to
    unit L2 norm.

    Args:
        addresses: [A, d] float32.
        k: 1..A.
        power: of the input; 1 takes inputs of any sign.
        beside: appends the centred input itself as d neurons that are always active; R = A + d.
    """

    def __init__(self, addresses: Tensor, k: int, power: float = 1.0, beside: bool = False) -> None:
        self.addresses, self.k, self.power, self.beside = addresses, k, power, beside
        self.mean: Tensor | None = None
        self._unit = 1.0

    @property
    def neurons(self) -> int:
        count, features = self.addresses.shape
        return count + features * self.beside

    def _raised(self, x: Tensor) -> Tensor:
        x = x / self._unit
        return x.float() if self.power == 1 else x.float().clamp(min=0).pow(self.power)

    def begin(self, x: Tensor) -> None:
        """Takes the mean of the first task's data x [N, d]; later tasks do not change it."""
        if self.mean is None:
            if x.dtype == torch.float64 or self.power > 1:  # else nothing leaves float32's range
                self._unit = power_of_two(x.abs().amax()).item()
            self.mean = self._raised(x).double().mean(0).float()

    def __call__(self, x: Tensor) -> TopKOutput:
        """x [N, d] -> values and indices [N, k], or [N, k + d] with the input beside the code."""
        assert self.mean is not None
        centred = project(self._raised(x) - self.mean, nonnegative=False, normalize=True)
        code = linear_topk(centred, self.addresses, self.k, inhibition="subtract")
        if not self.beside:
            return code
        count, features = self.addresses.shape
        # Unit mean square, as the scores have: one penalty is to suit both.
        values = torch.cat([code.values, features**0.5 * centred], dim=1)
        inputs = torch.arange(count, count + features, device=x.device).expand(len(x), -1)
        return TopKOutput(values, torch.cat([code.indices, inputs], dim=1))


class LearnedCode:
    """The hidden layer of a trained SDMLP, with full inhibition of all neurons.

    Args:
        model: the network.
        k: active neurons, 1..R; None: the network's own.
    """

    def __init__(self, model: SDMLP, k: int | None = None) -> None:
        self.model, self.k = model, model.encoder.k if k is None else k

    @property
    def neurons(self) -> int:
        return self.model.encoder.neurons

    @torch.no_grad()
    def __call__(self, x: Tensor) -> TopKOutput:
        """x [N, d] -> values and indices [N, k]."""
        layer = self.model.encoder
        address = self.model.address(x).to(layer.weight.dtype)
        return linear_topk(address, layer.weight, self.k, inhibition=layer.inhibition)


Encoder = RandomCode | LearnedCode


class CodeReadout:
    """A sparse code and a closed-form decoder, as a learner of ssd.peers.

    Args:
        encoder: RandomCode or LearnedCode.
        classes: C.
        readout: "lda" (linear discriminant analysis) or "ridge" (on one-hot labels).
        strength: shrinkage of LDA, or ridge in units of the Gram matrix's mean diagonal entry.
        device: of the data.

    Raises:
        UserError: an unknown readout.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        readout: str = "lda",
        strength: float = 1e-3,
        device: torch.device | str = "cpu",
    ) -> None:
        if readout not in ("lda", "ridge"):
            raise UserError(f"readout {readout!r} is unknown; use lda or ridge")
        self.encoder, self.readout, self.strength = encoder, readout, strength
        neurons, dtype = encoder.neurons, gram_dtype(encoder.neurons)
        self.gram = torch.zeros(neurons, neurons, dtype=dtype, device=device)
        self.cross = torch.zeros(neurons, classes, dtype=dtype, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        if isinstance(self.encoder, RandomCode):
            self.encoder.begin(x)
        for part, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            values, indices, *_ = self.encoder(part)
            code_gram(values, indices, self.gram, self.cross, labels)
        self.counts += y.bincount(minlength=len(self.counts))

    def decoder(self) -> tuple[Tensor, Tensor]:
        """Weight [R, C] and bias [C], float32, of the tasks so far."""
        if self.readout == "lda":
            weight, bias = discriminant(self.gram, self.cross, self.counts, self.strength)
        else:
            weight = ridge_solution(self.gram, self.cross, self.strength)
            bias = torch.zeros_like(weight[0])
        # Scaled to the range of float32; the largest score stays the largest.
        scale = weight.abs().max().clamp(min=1e-300)
        return (weight / scale).float(), (bias / scale).float()

    @property
    def fixed(self) -> bool:
        """Whether the code of an input stays what it is after the first task."""
        return isinstance(self.encoder, RandomCode)

    def encode(self, x: Tensor) -> list[TopKOutput]:
        """Codes of x [N, d], part by part."""
        return [self.encoder(part) for part in x.split(CHUNK)]

    def read(self, codes: Sequence[TopKOutput]) -> Tensor:
        """Scores [N, C] of what encode returned."""
        weight, bias = self.decoder()
        scores = [sparse_linear(code.values, code.indices, weight, bias) for code in codes]
        return only_seen(torch.cat(scores), self.counts)

    def predict(self, x: Tensor) -> Tensor:
        return self.read(self.encode(x))
