"""Neuron -> slots of a sparse code, in a stable order: what every backward and update walks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Slots grouped by neuron: those of neurons[i] are slots[offsets[i] : offsets[i + 1]]."""

    neurons: Tensor  # [n] ascending, distinct
    offsets: Tensor  # [n], the first is 0
    slots: Tensor  # [m] positions in the flattened code, ascending within a neuron


def segments(indices: Tensor, kept: Tensor) -> Segments:
    """Groups the slots [B, K] of a code where `kept` is True by their neuron."""
    positions = kept.flatten().nonzero().squeeze(1)
    ordered, order = indices.flatten()[positions].sort(stable=True)
    neurons, lengths = torch.unique_consecutive(ordered, return_counts=True)
    return Segments(neurons, lengths.cumsum(0) - lengths, positions[order])
