"""What rounding may do to a result, element by element, so that no tolerance needs tuning.

The truth is ssd_kernels.reference on inputs in float64. A sum of n terms in a dtype of rounding
error u may miss it by (n + 4) u times the sum of the terms' absolute values, whatever the order,
and so may the truth in its own dtype. Where every term is a multiple of one power of two, and their
sum is small enough, nothing rounds: the bound is 0, and ties are real.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssd_kernels import reference

# Tensor cores truncate where they add: 4 ulp a term.
ULPS = 4 if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else 1
NAN_KEY = 2**63 - 1
DOUBLE = torch.finfo(torch.float64)


class Bounds(NamedTuple):
    """Where a result may lie: float64, or anywhere where `free`. NaN in both: NaN is expected."""

    lower: Tensor
    upper: Tensor
    free: Tensor

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor, free: Tensor | None = None) -> Bounds:
        unclear = lower.isnan() != upper.isnan()
        return cls(lower, upper, unclear if free is None else free | unclear)

    @classmethod
    def around(cls, exact: Tensor, error: Tensor) -> Bounds:
        """Within this error; one that is no number bounds nothing."""
        error = torch.where(error.isnan(), torch.inf, error)
        error = torch.where(exact.isfinite() | error.isinf(), error, 0.0)
        return cls.of(exact - error, exact + error, error.isinf())

    def map(self, monotone: Callable[[Tensor], Tensor]) -> Bounds:
        return Bounds.of(monotone(self.lower), monotone(self.upper), self.free)

    def gather(self, indices: Tensor) -> Bounds:
        return Bounds(*(t.gather(-1, indices) for t in self))

    def reshape(self, *shape: int) -> Bounds:
        return Bounds(*(t.reshape(*shape) for t in self))

    def wrong(self, got: Tensor) -> Tensor:
        """Where `got` lies outside. Rounding to its dtype is monotone: the bounds are rounded."""
        lower, upper = (bound.to(got.dtype).double() for bound in self[:2])
        value = got.double()
        inside = (value >= lower) & (value <= upper)
        return ~(inside | (self.lower.isnan() & value.isnan()) | self.free)


def finite(values: Tensor) -> Tensor:
    """The absolute values in float64; 0 for what is not finite."""
    values = values.double()
    return torch.where(values.isfinite(), values.abs(), 0.0)


def rounding(
    magnitude: Tensor, terms: Tensor | int, dtype: torch.dtype, grain: float = 0.0
) -> Tensor:
    """Error bound of a sum of `terms` terms, multiples of `grain`; infinite where it may overflow.

    magnitude: the sum of their absolute values, float64.
    """
    info = torch.finfo(dtype)
    bound = (terms + 4) * (ULPS * (info.eps + DOUBLE.eps) / 2 * magnitude + info.tiny)
    exact = (magnitude * info.eps <= grain) & (grain >= info.tiny)
    return torch.where(magnitude > info.max / 2, torch.inf, torch.where(exact, 0.0, bound))


def key(values: Tensor) -> Tensor:
    """float64 -> int64 of the same order; -0.0 equals 0.0, NaN is largest."""
    bits = (values + 0.0).view(torch.int64)
    return torch.where(values.isnan(), NAN_KEY, torch.where(bits < 0, bits ^ NAN_KEY, bits))


def value(keys: Tensor) -> Tensor:
    """The inverse of key."""
    return torch.where(keys < 0, keys ^ NAN_KEY, keys).view(torch.float64)


class Ranking:
    """Which selections among scores within these bounds [.., R] are right."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.low = torch.where(bounds.free, -NAN_KEY, key(bounds.lower))
        self.high = torch.where(bounds.free, NAN_KEY, key(bounds.upper))

    def doubtful(self) -> bool:
        """Whether a score may not be finite."""
        return not all(bool(bound.isfinite().all()) for bound in self.bounds[:2])

    def wrong(self, indices: Tensor) -> str | None:
        """What is wrong with these k largest [.., k]: descending, ties to the lower index."""
        if not indices.numel():
            return None
        if not ((indices >= 0) & (indices < self.low.shape[-1])).all():
            return "indices out of range"
        if not (indices.sort(-1).values.diff(dim=-1) > 0).all():
            return "an index twice in a row"
        low, high = self.low.gather(-1, indices), self.high.gather(-1, indices)
        before, after = high.cummin(-1).values[..., :-1], low[..., 1:]
        tied = (high[..., :-1] == after) & (indices[..., :-1] > indices[..., 1:])
        if (before < after).any() or tied.any():
            return "indices not in the order of the scores"
        chosen = torch.zeros_like(self.low, dtype=torch.bool).scatter(-1, indices, True)
        least = high.amin(-1, keepdim=True)
        neuron = torch.arange(self.low.shape[-1], device=indices.device)
        passed = (self.low > least) | ((self.low == high[..., -1:]) & (neuron < indices[..., -1:]))
        if (passed & ~chosen).any():
            return "a larger score, or an equal one of a lower index, is left out"
        return None

    def largest(self, number: int) -> Bounds:
        """Where the entry of this rank [..], 0 the largest, may lie."""
        low = self.low.sort(-1, descending=True).values[..., number]
        high = self.high.sort(-1, descending=True).values[..., number]
        return Bounds.of(
            value(low), value(high), (low == -NAN_KEY) | ((high == NAN_KEY) & (low != NAN_KEY))
        )

    def certain(self, number: int) -> tuple[Tensor, Tensor]:
        """The neuron of this rank [..], and whether no rounding can make it another one."""
        order = torch.sort(self.low, dim=-1, descending=True, stable=True).indices
        low, high = self.low.gather(-1, order), self.high.gather(-1, order)
        exact = (low == high).all(-1)
        above = low[..., :number].amin(-1) if number else torch.full_like(low[..., 0], NAN_KEY)
        below = high[..., number + 1 :]
        rest = below.amax(-1) if below.shape[-1] else torch.full_like(above, -NAN_KEY)
        apart = (high[..., number] < above) & (low[..., number] > rest)
        return order[..., number], exact | apart


def scores(x: Tensor, weight: Tensor, bias: Tensor | None, networks: int, grain: float) -> Bounds:
    """x weight^T + bias [S B, R] in the dtype in which scores accumulate."""
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    double = None if bias is None else bias.double()
    exact = reference.scores_of(flat.double(), weight.double(), double, networks)
    magnitude = reference.scores_of(
        finite(flat), finite(weight), None if bias is None else finite(bias), networks
    )
    dtype = reference.accumulation_dtype(x.dtype)
    error = rounding(magnitude, x.shape[-1] + 1, dtype, grain)
    bounds = Bounds.around(exact, error)
    if dtype == torch.float64 or not error.isinf().any():
        return bounds
    # Partial sums lie between those of the negative and of the positive terms: where one of the two
    # alone may overflow, the result is no NaN.
    info = torch.finfo(dtype)
    error = (x.shape[-1] + 5) * (ULPS * info.eps * magnitude + info.tiny)
    up, down = ((magnitude + sign * exact) / 2 > info.max / 2 for sign in (1, -1))
    one = exact.isfinite() & (up != down)
    lower = torch.where(down, -torch.inf, (exact - error).to(dtype).double())
    upper = torch.where(up, torch.inf, (exact + error).to(dtype).double())
    return Bounds.of(
        torch.where(one, lower, bounds.lower),
        torch.where(one, upper, bounds.upper),
        bounds.free & ~one,
    )
