"""Measures of continual learning and of a layer's activity.

A[t, i] is the accuracy on task i after training task t, rows and columns from 0; T tasks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def activation_entropy(frequency: Tensor) -> Tensor:
    """Binary entropy of each neuron's activation frequency p, in bits, any shape.

    H = -p log2 p - (1 - p) log2(1 - p) (SSD, step 1): low for a stable, task-specific neuron.
    """
    p = frequency.double()
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)


def dead_fraction(frequency: Tensor) -> float:
    """Share of the neurons of frequency [R] that are never active."""
    return (frequency == 0).double().mean().item()
