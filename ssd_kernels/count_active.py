"""How often each neuron was active, and when last: exact integers."""

from __future__ import annotations

from torch import Tensor

from ssd_kernels import _checks, _dispatch, reference


def count_active(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    last_active: Tensor | None = None,
    step: int | Tensor = 0,
    *,
    impl: str | None = None,
) -> None:
    """counts[j] += number of samples in which neuron j is active (its value is > 0).

    Args:
        values: [.., K] floating; indices: [.., K] int64, distinct within a sample.
        counts: [R] int64 or int32, updated in place.
        last_active: [R] int64 or int32 or None, set in place to `step` where a neuron is active.
        step: the present step, an int or a 0-d integer tensor on the device of values.
        impl: "reference"; by default the fastest for the device.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    _checks.code("count_active", values, indices)
    neurons = counts.shape[0] if counts.dim() else 0
    _checks.counter("count_active", "counts", counts, values, neurons)
    _checks.counter("count_active", "last_active", last_active, values, neurons)
    serve = _dispatch.choose("count_active", IMPLEMENTATIONS, impl, values)
    serve(values, indices, counts, last_active, step)


IMPLEMENTATIONS = {"reference": reference.count_active}
