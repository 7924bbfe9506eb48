"""The neurons of a layer under graded inhibition that fire somewhere in a batch, dense among them.

While inhibition is being switched on, one sample may activate many neurons, too many for a sparse
code, and yet a batch leaves most of the layer silent. On a CPU this costs little more than the
product: scores stay in the order [R, B], in which the product is fastest, a neuron's maximum over
the batch is a contiguous pass, and what follows touches the firing rows alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _checks, _cpu_groups, _dispatch, reference
from ssd_kernels.linear_inhibit import linear_inhibit


class ActiveNeurons(NamedTuple):
    """What fires in a batch."""

    values: Tensor  # [B, n] >= 0
    neurons: Tensor  # [n] int64, ascending: those with a value > 0 for some sample


class Scratch:
    """Memory kept from call to call: the operating system zeroes each page of fresh memory."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def __call__(self, number: int, like: Tensor, *shape: int) -> Tensor:
        """Buffer `number` as a tensor of this shape, holding anything; `like` gives the dtype."""
        count = 1
        for size in shape:
            count *= size
        held = self._kept.get(number)
        if held is None or held.numel() < count or held.dtype != like.dtype:
            held = self._kept[number] = like.new_empty(count)
        return held[:count].view(shape)


def linear_active(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    counts: Tensor | None = None,
    scratch: Scratch | None = None,
    impl: str | None = None,
) -> ActiveNeurons:
    """The columns of linear_inhibit(x, weight, k, gaba) that are not all 0. No gradient.

    Args:
        x: [B, d] floating; weight: [R, d]. k: neurons that full inhibition leaves active, 1..R.
        gaba: [R] in (0, 1], each neuron's response to inhibition; None means 1.
        inhibition: "subtract" or "mask", see linear_inhibit.
        counts: [R] int64 or int32, updated in place: += samples in which the neuron is active.
        scratch: memory of an earlier call, used again on a CPU; what that call returned is gone.
        impl: "torch" or "reference"; by default the fastest for the device.

    Returns:
        Values [B, n] and neurons [n] int64. n depends on the data: reads it back from a GPU.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    if x.dim() != 2:
        raise ValueError(f"linear_active: x has shape {list(x.shape)}, expected [B, d]")
    _checks.linear("linear_active", x, weight, None, k)
    _checks.response("linear_active", gaba, x, weight.shape[0], positive=True)
    _checks.inhibition("linear_active", inhibition)
    _checks.counter("linear_active", "counts", counts, x, weight.shape[0])
    if _dispatch.symbolic(x):
        raise TypeError(
            "linear_active: how many neurons fire depends on values, and x has none here; "
            "linear_inhibit gives all R"
        )
    serve = _dispatch.choose("linear_active", IMPLEMENTATIONS, impl, x)
    with torch.no_grad():
        active = serve(x, weight, k, gaba, inhibition, scratch or Scratch())
        if counts is not None:
            # Faster than to sum booleans, in a dtype that holds every count.
            exact = torch.float32 if len(x) <= 2**24 else torch.float64
            fired = active.values.sign().sum(0, dtype=exact)
            counts.index_add_(0, active.neurons, fired.to(counts.dtype))
    return active


def _reference(
    x: Tensor, weight: Tensor, k: int, gaba: Tensor | None, inhibition: str, scratch: Scratch
) -> ActiveNeurons:
    return _firing(reference.linear_inhibit(x, weight, k, gaba, inhibition=inhibition))


def _torch(
    x: Tensor, weight: Tensor, k: int, gaba: Tensor | None, inhibition: str, scratch: Scratch
) -> ActiveNeurons:
    batch, neurons = len(x), len(weight)
    if not x.is_cpu or reference.accumulation_dtype(x.dtype) != x.dtype or batch == 0:
        return _firing(linear_inhibit(x, weight, k, gaba, inhibition=inhibition))
    scores = torch.mm(weight, x.T, out=scratch(0, x, neurons, batch))
    cut = x.new_zeros(batch)
    if k < neurons:
        cut = _cpu_groups.largest(scores.T, k + 1)[0][:, k].relu()
    surplus = scratch(1, x, neurons, batch)
    if gaba is None:
        torch.sub(scores, cut, out=surplus)
    else:
        torch.addr(scores, gaba, cut, alpha=-1, out=surplus)
    highest = surplus.amax(1)
    if inhibition == "mask" and bool(highest.isnan().any()):
        # An infinite activation under infinite inhibition does not fire, a NaN does.
        return _firing(linear_inhibit(x, weight, k, gaba, inhibition=inhibition))
    chosen = (~(highest <= 0)).nonzero().squeeze(1)
    own = surplus if len(chosen) == neurons else surplus.index_select(0, chosen)
    if inhibition == "mask":
        own = torch.where(own <= 0, 0.0, scores.index_select(0, chosen))
    return ActiveNeurons(own.relu_().T, chosen)


def _firing(hidden: Tensor) -> ActiveNeurons:
    neurons = (~(hidden <= 0)).any(0).nonzero().squeeze(1)
    return ActiveNeurons(hidden.index_select(1, neurons), neurons)


IMPLEMENTATIONS = {"reference": _reference, "torch": _torch}
