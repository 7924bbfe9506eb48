"""Loops over float32 tensors on a CPU, compiled by numba: the implementations named `numba`.

They serve the steps of small layers, where PyTorch spends its time on calls and repeated passes.
One thread runs them, since a second pool of threads would slow PyTorch's. An op imports them on its
first call, because importing numba takes longer than torch.topk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
LANES = 16  # columns that are ranked side by side: a vector register of them
# Rows with one maximum, and how many groups for each of the k are worth it.
GROUP, LEAST = 8, 2
NORMAL = np.float32(2.0**-126)  # smaller numbers may be flushed to 0


def loop(function: F) -> F:
    """numba.njit, cached on disk where a folder is writable."""
    # Sums may be reordered to fill vector registers, but have the same order every time.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


@loop
def rank(keys: Any, k: int, values: Any, indices: Any) -> None:
    """The k largest of each column of keys [R, B], NaN first, ties to the lower row: [B, k].

    k groups of rows have a maximum that is no less than the k-th largest maximum. What lies under
    it is passed by.
    """
    neurons, batch = keys.shape
    under = np.full(batch, np.nan, keys.dtype)
    groups = neurons // GROUP
    if groups >= LEAST * k:
        maxima = keys[:groups].copy()
        for j in range(groups, groups * GROUP):
            for b in range(batch):
                if keys[j, b] > maxima[j % groups, b]:
                    maxima[j % groups, b] = keys[j, b]
        insert(maxima, k, under, values, indices)
        for b in range(batch):
            least = values[b, k - 1]
            if least > -np.inf:
                under[b] = min(np.nextafter(least, np.float32(-np.inf)), least - NORMAL)
    insert(keys, k, under, values, indices)


@loop
def insert(keys: Any, k: int, under: Any, values: Any, indices: Any) -> None:
    """rank, passing by what is not above `under` [B], of which no column needs one; NaN: none."""
    neurons, batch = keys.shape
    best = np.empty((LANES, k), keys.dtype)
    who = np.empty((LANES, k), np.int64)
    held = np.empty(LANES, np.int64)
    low = np.empty(LANES, keys.dtype)
    for first in range(0, batch, LANES):
        lanes = min(LANES, batch - first)
        for lane in range(lanes):
            held[lane] = 0
            low[lane] = under[first + lane]
        for j in range(neurons):
            if lanes == LANES:
                reached = 0
                for lane in range(LANES):
                    reached |= not (keys[j, first + lane] <= low[lane])
                if not reached:
                    continue
            for lane in range(lanes):
                key, at = keys[j, first + lane], held[lane]
                if key <= low[lane] or (at == k and not _above(key, best[lane, k - 1])):
                    continue
                held[lane] = min(at + 1, k)
                at = min(at, k - 1)
                while at > 0 and _above(key, best[lane, at - 1]):
                    best[lane, at], who[lane, at] = best[lane, at - 1], who[lane, at - 1]
                    at -= 1
                best[lane, at], who[lane, at] = key, j
                if held[lane] == k:
                    low[lane] = best[lane, k - 1]
        for lane in range(lanes):
            values[first + lane] = best[lane]
            indices[first + lane] = who[lane]


@loop
def _above(a: float, b: float) -> bool:
    return a > b or (a != a and b == b)


@loop
def sorted_slots(indices: Any, touched: Any, neurons: int) -> Any:
    """Slots that are touched by neuron, then by slot; neurons and offsets of the segments."""
    count = 0
    for slot in range(len(indices)):
        count += touched[slot]
    slots = np.empty(count, np.int64)
    if neurons <= 16 * len(indices):
        starts = np.zeros(neurons + 1, np.int64)
        for slot in range(len(indices)):
            if touched[slot]:
                starts[indices[slot] + 1] += 1
        for j in range(neurons):
            starts[j + 1] += starts[j]
        for slot in range(len(indices)):
            if touched[slot]:
                slots[starts[indices[slot]]] = slot
                starts[indices[slot]] += 1
    else:
        keys = np.empty(count, np.int64)
        at = 0
        for slot in range(len(indices)):
            if touched[slot]:
                keys[at] = indices[slot] * len(indices) + slot
                at += 1
        keys.sort()
        for at in range(count):
            slots[at] = keys[at] % len(indices)
    heads = np.empty(count + 1, np.int64)
    found = 0
    for at in range(count):
        if at == 0 or indices[slots[at]] != indices[slots[at - 1]]:
            heads[found] = at
            found += 1
    heads[found] = count
    return slots, heads[: found + 1]


@loop
def row_sums(slots: Any, heads: Any, coefficients: Any, inputs: Any, sums: Any) -> float:
    """Each segment's sum of coefficient * input, in order, [n, d]; the sum of their squares."""
    width = coefficients.shape[1]
    squares = 0.0
    for row in range(len(heads) - 1):
        total = sums[row]
        total[:] = 0
        for at in range(heads[row], heads[row + 1]):
            coefficient = coefficients[slots[at] // width, slots[at] % width]
            vector = inputs[slots[at] // width]
            if coefficient != 0:
                for column in range(len(total)):
                    total[column] += coefficient * vector[column]
        for column in range(len(total)):
            squares += np.float64(total[column]) * np.float64(total[column])
    return squares


@loop
def move_rows(
    weight: Any, rows: Any, gradient: Any, step: float, nonnegative: bool, normalize: bool
) -> None:
    """weight[rows] -= step * gradient [n, d], then its constraints."""
    for number in range(len(rows)):
        row = weight[rows[number]]
        length = 0.0
        for column in range(len(row)):
            moved = row[column] - np.float32(step) * gradient[number, column]
            if nonnegative and moved < 0:
                moved = np.float32(0)
            row[column] = moved
            length += np.float64(moved) * np.float64(moved)
        if normalize and length != 0:
            length = np.sqrt(length)
            for column in range(len(row)):
                row[column] = np.float32(row[column] / length)


@loop
def inhibition(scores: Any, k: int, cut: Any) -> None:
    """The (k+1)-th largest activation [B] of scores [R, B]; k < R."""
    values = np.empty((scores.shape[1], k + 1), scores.dtype)
    rank(scores, k + 1, values, np.empty(values.shape, np.int64))
    for b in range(len(cut)):
        cut[b] = np.float32(0) if values[b, k] <= 0 else values[b, k]


@loop
def inhibit(
    scores: Any,
    cut: Any,
    gaba: Any,
    mask: bool,
    every: bool,
    excited: bool,
    values: Any,
    gate: Any,
    neurons: Any,
    counts: Any,
) -> int:
    """Rows of scores [R, B] after inhibition, those that fire or `every`; returns how many.

    gaba, gate and counts that are not wanted have length 0.
    """
    found = 0
    for j in range(len(scores)):
        response = gaba[j] if len(gaba) > 0 else np.float32(1)
        row, out = scores[j], values[found]
        hits = 0
        odd = 0
        for b in range(len(row)):
            activation = np.float32(0) if row[b] <= 0 else row[b]
            surplus = activation - response * cut[b]
            if mask:
                value = activation if surplus > 0 or activation != activation else np.float32(0)
            else:
                value = np.float32(0) if surplus <= 0 else surplus
            out[b] = value
            hits += value > 0
            odd += value != value
        if len(counts) > 0:
            counts[j] += hits
        if hits + odd > 0 or every:
            if excited:
                for b in range(len(row)):
                    gate[found, b] = np.float32(0) if row[b] <= 0 else out[b]
            neurons[found] = j
            found += 1
    return found


@loop
def _kept(best: Any, who: Any, k: int, mask: bool, values: Any, indices: Any) -> float:
    """A sample's code [k] of its k + 1 largest scores, or fewer; returns the inhibition."""
    zero = np.float32(0)
    cut = best[k] if len(best) > k else zero
    cut = zero if cut <= 0 else cut
    for s in range(k):
        activation = zero if best[s] <= 0 else best[s]
        rest = activation - cut
        if mask:
            values[s] = activation if rest > 0 or activation != activation else zero
        else:
            values[s] = zero if rest <= 0 else rest
        indices[s] = who[s]
    return cut


@loop
def code(scores: Any, k: int, mask: bool, values: Any, indices: Any) -> None:
    """The code [B, k] of scores [R, B]: the k largest, less the next one or, with mask, as is."""
    best = np.empty((scores.shape[1], min(k + 1, len(scores))), scores.dtype)
    who = np.empty(best.shape, np.int64)
    rank(scores, best.shape[1], best, who)
    for b in range(len(best)):
        _kept(best[b], who[b], k, mask, values[b], indices[b])


@loop
def _dot(a: Any, b: Any) -> float:
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@loop
def _ranked_in(best: Any, who: Any, held: int, score: float, neuron: int) -> int:
    """Puts a neuron, higher than all so far, among the best of `held`; returns how many."""
    most = len(best)
    if held == most and not _above(score, best[most - 1]):
        return held
    at = min(held, most - 1)
    while at > 0 and _above(score, best[at - 1]):
        best[at], who[at] = best[at - 1], who[at - 1]
        at -= 1
    best[at], who[at] = score, neuron
    return min(held + 1, most)


@loop
def code_of_estimates(
    estimates: Any,
    group: int,
    share: int,
    error: float,
    tiny: float,
    x: Any,
    weight: Any,
    k: int,
    mask: bool,
    values: Any,
    indices: Any,
) -> bool:
    """The code [B, k] by bfloat16 estimates of scores, the bits of numbers >= 0 [R', B].

    The (k+1)-th largest maximum of groups bounds the inhibition from below. What may reach it,
    given the relative error, is scored. False: that is more than one group in `share`.
    """
    groups, batch = len(estimates) // group, estimates.shape[1]
    maxima = np.zeros((groups, batch), np.int32)
    for g in range(groups):
        for j in range(g * group, g * group + group):
            for b in range(batch):
                maxima[g, b] = max(maxima[g, b], np.int32(estimates[j, b] & 0x7FFF))  # -0.0 is 0
    floor = np.full(batch, -1, np.int32)
    reached, who = np.empty((batch, k + 1), np.int32), np.empty((batch, k + 1), np.int64)
    insert(maxima, k + 1, floor, reached, who)
    bits = (reached[:, k].astype(np.uint32) << np.uint32(16)).copy()
    least = bits.view(np.float32)
    for b in range(batch):
        least[b] = max(least[b] * np.float32((1 - error) / (1 + error)), np.float32(tiny))
    opened = 0
    for b in range(batch):
        floor[b] = (np.int64(bits[b]) + 0xFFFF) >> 16
    for g in range(groups):
        for b in range(batch):
            opened += maxima[g, b] >= floor[b]
    if opened * share > groups * batch:
        return False
    best = np.empty((batch, k + 1), np.float32)
    held = np.zeros(batch, np.int64)
    for g in range(groups):
        any_reached = 0
        for b in range(batch):
            any_reached |= maxima[g, b] >= floor[b]
        if not any_reached:
            continue
        for b in range(batch):
            if maxima[g, b] >= floor[b]:
                for j in range(g * group, min(g * group + group, len(weight))):
                    if np.int32(estimates[j, b] & 0x7FFF) >= floor[b]:
                        score = _dot(x[b], weight[j])
                        held[b] = _ranked_in(best[b], who[b], held[b], score, j)
    for b in range(batch):
        cut = best[b, k] if held[b] > k else np.float32(0)
        if not tiny < cut < 1 / tiny:  # products underflow or overflow: the error has no bound
            held[b] = 0
            for j in range(len(weight)):
                held[b] = _ranked_in(best[b], who[b], held[b], _dot(x[b], weight[j]), j)
        _kept(best[b], who[b], k, mask, values[b], indices[b])
    return True


@loop
def round_rows(weight: Any, neurons: Any, rows: Any) -> None:
    """rows = bfloat16 of the float32 weight, bits of both, for some neurons; NaN stays one."""
    for neuron in neurons:
        for column in range(weight.shape[1]):
            bits = np.uint64(weight[neuron, column])
            rounded = (bits + np.uint64(0x7FFF) + ((bits >> 16) & 1)) >> 16
            nan = (bits & np.uint64(0x7FFFFFFF)) > np.uint64(0x7F800000)
            rows[neuron, column] = np.uint16(0x7FC0) if nan else np.uint16(rounded)
