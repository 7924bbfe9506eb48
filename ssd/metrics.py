"""Measures of continual learning and of a layer's activity.

A[t, i] is the accuracy on task i after training task t, both from 0; there are T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor

from ssd.errors import Diverged
from ssd_kernels.reference import project

USED = 1e-3  # the least activation frequency of a used neuron
ROUNDING = 1e-12  # differences of accuracies below it are none
SMOOTHING = 1e-6  # added to each neuron's share of the activations in kl_divergence


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; reads the device."""
    if tensor.numel() == 0:
        return True
    # One pass that writes nothing, unlike isfinite().all().
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def predicted(scores: Tensor) -> Tensor:
    """The class with the largest score in each row [N, C]; a class not yet seen may have -inf.

    Raises:
        Diverged: a score is NaN or infinity, which argmax would call the largest.
    """
    bad = int((~(scores < math.inf)).any(1).sum())
    if bad:
        raise Diverged(f"{bad} of {len(scores)} samples have scores that are not finite")
    return scores.argmax(1)


def mean_accuracy(accuracy: Tensor) -> float:
    """Mean over tasks of the last row of the accuracy matrix [T, T]; tasks weigh the same."""
    return accuracy[-1].mean().item()


def backward_transfer(accuracy: Tensor) -> float:
    """BWT = mean over i < T-1 of A[T-1, i] - A[i, i] (Lopez-Paz & Ranzato 2017); 0 for one task."""
    if len(accuracy) == 1:
        return 0.0
    return (accuracy[-1] - accuracy.diagonal())[:-1].mean().item()


def forgetting(accuracy: Tensor) -> float:
    """Mean over i < T-1 of the best earlier A[t, i] less A[T-1, i] (Chaudhry et al. 2018)."""
    if len(accuracy) == 1:
        return 0.0
    return (accuracy[:-1].amax(0) - accuracy[-1])[:-1].mean().item()


def estimate(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error s / sqrt(n); None for the error of a single value."""
    return mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(differences: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of paired differences, its standard error, and p of a two-sided t test of mean 0.

    Args:
        differences: one per pair; error and p of a single one are None.
    """
    center, error = estimate(differences)
    if error is None:
        return center, None, None
    if error < ROUNDING:  # the test divides by it; its limit is 0 or 1
        return center, error, float(abs(center) < ROUNDING)
    from scipy.stats import ttest_1samp  # takes half a second, and few commands test

    return center, error, float(ttest_1samp(differences, 0.0).pvalue)


def activation_entropy(frequency: Tensor) -> Tensor:
    """Binary entropy of each neuron's activation frequency p, in bits, any shape.

    H = -p log2 p - (1 - p) log2(1 - p) (SSD, step 1): low for a stable, task-specific neuron.
    """
    p = frequency.double()
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)


def dead_fraction(frequency: Tensor) -> float:
    """Share of the neurons of frequency [R] that are never active."""
    return (frequency == 0).double().mean().item()


def used_fraction(frequency: Tensor) -> float:
    """Share of the neurons of frequency [R] that are active for at least USED of the inputs."""
    return (frequency >= USED).double().mean().item()


def effective_rank(code: Tensor) -> float:
    """How many directions a code [N, R] spreads over: exp of the entropy of its spectrum.

    exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j, with s the singular values of the code, not
    centred (Roy & Vetterli, EUSIPCO 2007). It is m for m equally frequent orthogonal codes, 0 for
    zeros, NaN for a code that is not finite. Computed in fp64 on the CPU.
    """
    code = code.detach().double().cpu()
    if not code.isfinite().all():
        return math.nan
    code = code[:, code.any(0)]
    # LAPACK is several times faster on a tall matrix than on a wide one.
    values = torch.linalg.svdvals(code if len(code) >= code.shape[1] else code.T)
    if not values.any():
        return 0.0
    p = values / values.sum()
    return torch.special.xlogy(p, p).sum().neg().exp().item()


def jaccard(neurons: Tensor, others: Tensor) -> float:
    """|A & B| / |A | B| for two sets of neurons, [n] and [m] indices; 1 for two empty sets.

    Two random sets of n out of R neurons have about n / (2 R - n).
    """
    union = torch.cat([neurons, others]).unique()
    if len(union) == 0:
        return 1.0
    return int((torch.isin(union, neurons) & torch.isin(union, others)).sum()) / len(union)


def kl_divergence(frequency: Tensor, other: Tensor) -> float:
    """KL(P || Q) = sum_j P_j log2(P_j / Q_j) in bits, of two activation frequencies [R].

    Each is scaled to sum 1, then smoothed: P_j = (p_j + SMOOTHING) / (1 + R SMOOTHING). Otherwise
    a neuron that is active in only one task makes the divergence infinite. P is uniform if no
    neuron is active, and the value for disjoint sets of neurons depends on SMOOTHING.
    """
    p, q = _distribution(frequency), _distribution(other)
    return (p * (p / q).log2()).sum().item()


def address_cosine(addresses: Tensor, others: Tensor) -> float:
    """Cosine of the mean addresses of two sets of neurons, [n, d] and [m, d]; 0 if one is zero.

    Addresses are not negative, so unrelated ones have a cosine well above 0.
    """
    return _cosine(addresses.double().mean(0), others.double().mean(0)).item()


def shared_address_cosine(
    neurons: Tensor, addresses: Tensor, other_neurons: Tensor, other_addresses: Tensor
) -> Tensor:
    """Cosine between the two addresses of each neuron that two sets share, [|A & B|].

    Args:
        neurons: [n], ascending.
        addresses: [n, d], their addresses at one time.
        other_neurons: [m], ascending.
        other_addresses: [m, d], their addresses at another time.

    Returns:
        In ascending order of the neurons; 1 for a neuron whose address has kept its direction.
    """
    here, there = torch.isin(neurons, other_neurons), torch.isin(other_neurons, neurons)
    return _cosine(addresses[here].double(), other_addresses[there].double())


def _distribution(frequency: Tensor) -> Tensor:
    p = frequency.double()
    p = p / p.sum().clamp(min=torch.finfo(p.dtype).tiny) + SMOOTHING
    return p / p.sum()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (project(a, False, True) * project(b, False, True)).sum(-1)
