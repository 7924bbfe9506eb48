"""The loss of a batch in one pass over its samples, compiled by numba (ssd_kernels._loops).

Both losses take the tuples of Objective.for_loops: targets (labels, target_logits, columns,
target_hidden, weight) and settings (alpha, lam, temperature, hidden_weight, whether the KL is
forward, whether the hidden term is the sum of squares).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssd_kernels._loops import loop


def array(tensor: Tensor | None, rows: int, dtype: torch.dtype = torch.float32) -> Any:
    """The tensor as a loop reads it; [B, 0] for None."""
    if tensor is None:
        return torch.empty(rows, 0, dtype=dtype, device="cpu").numpy()
    return tensor.detach().contiguous().numpy()


@loop
def _softmax(row: Any, chosen: Any, temperature: float, logs: Any, shares: Any) -> None:
    """T log softmax(row / T) and softmax(row / T) over the chosen columns."""
    most = -np.inf
    for column in range(len(row)):
        if chosen[column]:
            most = max(most, np.float64(row[column])) if row[column] == row[column] else np.nan
    total = 0.0
    for column in range(len(row)):
        logs[column] = np.float64(row[column]) - most
        shares[column] = np.exp(logs[column] / temperature) if chosen[column] else 0.0
        total += shares[column]
    shift = temperature * np.log(total)
    for column in range(len(row)):
        logs[column] -= shift
        shares[column] /= total


@loop
def _divergence(
    pair: Any, chosen: Any, settings: Any, scale: float, scratch: Any, gradient: Any
) -> float:
    """T^2 KL of a row; adds scale times its gradient."""
    student, teacher = pair
    _, _, temperature, _, forward, _ = settings
    log_p, p, log_q, q = scratch
    _softmax(student, chosen, temperature, log_p, p)
    _softmax(teacher, chosen, temperature, log_q, q)
    loss = 0.0
    for column in range(len(student)):
        weight = q[column] if forward else p[column]
        if weight != 0:  # 0 (log 0 - log 0) is 0
            difference = log_p[column] - log_q[column]
            loss += weight * (-difference if forward else difference)
    for column in range(len(student)):
        if forward:
            slope = temperature * (p[column] - q[column])
        else:
            slope = p[column] * (log_p[column] - log_q[column] - loss) if p[column] != 0 else 0.0
        gradient[column] += np.float32(scale * slope)
    return temperature * loss


@loop
def _squares(pair: Any, scale: float, gradient: Any) -> float:
    """The sum of squared differences of a row; adds scale times its gradient."""
    student, teacher = pair
    loss = 0.0
    for column in range(len(student)):
        difference = np.float64(student[column]) - np.float64(teacher[column])
        loss += difference * difference
        gradient[column] += np.float32(2 * scale * difference)
    return loss


@loop
def _sample(
    b: int, students: Any, targets: Any, settings: Any, workspace: Any, gradients: Any
) -> float:
    """The loss of sample b; writes its gradients. A target that is not given has length 0."""
    (logits, hidden), (grad_logits, grad_hidden) = students, gradients
    labels, target_logits, columns, target_hidden, weights = targets
    label, weight = labels[b], weights[b]
    alpha, lam, _, hidden_weight, _, squares = settings
    every, scratch = workspace
    taught = target_logits.shape[1] > 0
    share = alpha if taught else 1.0
    _softmax(logits, every, 1.0, scratch[0], scratch[1])
    loss = -share * scratch[0, label]
    for column in range(len(logits)):
        grad_logits[column] = np.float32(weight * share * scratch[1, column])
    grad_logits[label] -= np.float32(weight * share)
    if taught:
        pair, chosen = (logits, target_logits[b]), columns[b] if columns.shape[1] > 0 else every
        part = (1 - alpha) * (1 - lam)
        loss += part * _divergence(pair, chosen, settings, weight * part, scratch, grad_logits)
    if target_hidden.shape[1] > 0:
        pair, part = (hidden, target_hidden[b]), (1 - alpha) * lam * hidden_weight
        grad_hidden[:] = 0
        if squares:
            loss += part * _squares(pair, weight * part, grad_hidden)
        else:
            loss += part * _divergence(pair, every, settings, weight * part, scratch, grad_hidden)
    return loss


@loop
def distill(logits: Any, hidden: Any, targets: Any, settings: Any, outputs: Any) -> None:
    """distill for rows of logits and hidden; a tensor that is not given is [B, 0]."""
    loss, grad_logits, grad_hidden = outputs
    most = max(logits.shape[1], hidden.shape[1])
    workspace = np.ones(most, np.bool_), np.empty((4, most))
    for b in range(len(logits)):
        students, gradients = (logits[b], hidden[b]), (grad_logits[b], grad_hidden[b])
        loss[b] = _sample(b, students, targets, settings, workspace, gradients)


@loop
def distill_code(
    code: Any, decoder: Any, positions: Any, targets: Any, settings: Any, outputs: Any
) -> bool:
    """distill_code: decode, loss and gradients; a tensor that is not given is [B, 0].

    Positions are read only with target_hidden. Returns False, before any work, if a label or an
    index is out of range.
    """
    values, indices = code
    logits, loss, grad_logits, grad_values = outputs
    labels, _, _, target_hidden, _ = targets
    for b in range(len(values)):
        if not 0 <= labels[b] < logits.shape[1]:
            return False
        for s in range(values.shape[1]):
            if not 0 <= indices[b, s] < len(decoder):
                return False
    size = target_hidden.shape[1]
    most = max(logits.shape[1], size)
    workspace = np.ones(most, np.bool_), np.empty((4, most))
    hidden = np.empty(size, values.dtype)
    grad_hidden = np.empty(size, values.dtype)
    for b in range(len(values)):
        row = logits[b]
        row[:] = 0
        hidden[:] = 0
        for s in range(values.shape[1]):
            value, neuron = values[b, s], indices[b, s]
            if value == 0:
                continue
            for column in range(len(row)):
                row[column] += value * decoder[neuron, column]
            if size > 0 and 0 <= positions[neuron] < size:
                hidden[positions[neuron]] = value
        students, gradients = (row, hidden), (grad_logits[b], grad_hidden)
        loss[b] = _sample(b, students, targets, settings, workspace, gradients)
        for s in range(values.shape[1]):
            neuron = indices[b, s]
            slope = np.float32(0)
            if not values[b, s] <= 0:
                for column in range(len(row)):
                    slope += grad_logits[b, column] * decoder[neuron, column]
                if size > 0 and 0 <= positions[neuron] < size:
                    slope += grad_hidden[positions[neuron]]
            grad_values[b, s] = slope
    return True


@loop
def gate(gradient: Any, gates: Any, slopes: Any, positions: Any, gated: bool) -> None:
    """gate_gradient for [R, B]; without slopes [B, n] positions have length 0."""
    units = slopes.shape[1]
    for j in range(len(gradient)):
        row, own = gradient[j], gates[j]
        place = positions[j] if len(positions) > 0 else units
        if place < units and gated:
            for b in range(len(row)):
                row[b] += slopes[b, place]
        for b in range(len(row)):
            row[b] = np.float32(0) if own[b] <= 0 else row[b]
        if place < units and not gated:
            for b in range(len(row)):
                row[b] += slopes[b, place]
