"""Sparse codes of a layer under graded inhibition, private to the two packages.

While some neurons answer inhibition with g < 1, a few more than k fire. linear_code returns them as
a sparse code. One sample may fire too many for that, though over a batch most of the layer stays
silent: linear_active returns the neurons that fire for some sample, dense among them, for little
more than the product costs. linear_inhibit compares all R activations with their bounds; with a
Shadow of the weight, linear_code scores a few candidates only.

Why that is exact. One product estimates all scores s_j, in bfloat16 where the CPU multiplies it
fast, else in float32. Nothing is negative, so the rounding errors of s_j and s_j / g_j are together
at most a fraction c of them. Any k + 1 neurons bound I, the (k+1)-th largest activation, from
below; the largest estimates of their groups bound it closely. If the estimate of s_j / g_j, raised
by c, is under that bound, lowered by c, neuron j neither fires nor sets I. All others are
candidates, and are scored in float32. All neurons are scored for a row whose scores leave the range
where c holds, and for a batch with too many candidates. A score is always summed in the same order,
so both ways give the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _checks, _cpu_groups, _dispatch, _encoder, reference
from ssd_kernels.count_active import count_active
from ssd_kernels.linear_inhibit import inhibit_triton, linear_inhibit
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.topk import MAX_K, select, topk

CANDIDATES = 3  # at least, for each of the k: enough to settle almost every row
TINY = 1e-30
NEIGHBOURS = 16  # whose estimates have one maximum
MAX_LOOPED = 64  # the k that numba's loops rank, by insertion
# To score all neurons is faster once one group in so many may hold a candidate,
GROUPS_PER_CANDIDATE = 8
# or once a candidate has fewer neurons than this.
NEURONS_PER_CANDIDATE = 32


class Scratch:
    """Memory kept from call to call: the operating system zeroes every page of new memory."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def __call__(self, number: int, like: Tensor, neurons: int, batch: int) -> Tensor:
        """Buffer `number` [R, B], holding anything."""
        held = self._kept.get(number)
        if held is None or held.numel() < neurons * batch or held.dtype != like.dtype:
            held = self._kept[number] = like.new_empty(neurons * batch)
        return held[: neurons * batch].view(neurons, batch)


class Shadow:
    """A copy of a weight that estimates scores, and which version of the weight it copies.

    Args:
        weight: [R, d] float32, not negative.
        dtype: bfloat16 or float32, by default the one that this CPU multiplies faster. A copy in
            float32 is the weight itself.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        self.rows = weight.detach().to(dtype or estimate_dtype())
        self._seen: tuple[int, int] | None = None
        self._scratch = Scratch()
        self.update(weight)

    def estimates(self, x: Tensor) -> Tensor:
        """x @ weight.T in the copy's dtype, [R', B], valid until the next call.

        R' is R, padded with rows of zeros to whole groups.
        """
        padded = -(-len(self.rows) // NEIGHBOURS) * NEIGHBOURS
        estimates = self._scratch(0, self.rows, padded, len(x))
        # Neurons first: the faster order of the product, and of the maxima over groups.
        torch.mm(self.rows, x.to(self.rows.dtype).T, out=estimates[: len(self.rows)])
        estimates[len(self.rows) :] = 0
        return estimates

    def graded(self, estimates: Tensor, gaba: Tensor) -> Tensor:
        """Each neuron's estimate over its gaba, [R', B], valid until the next call."""
        raised = F.pad(gaba.reciprocal(), (0, len(estimates) - len(gaba))).unsqueeze(1)
        return torch.mul(estimates, raised, out=self._scratch(1, self.rows, *estimates.shape))

    def relative_error(self) -> float:
        """Bound c: of both factors, the result, its quotient by gaba, and either float32 sum."""
        exact = torch.get_float32_matmul_precision() == "highest"
        unit = torch.finfo(self.rows.dtype if exact else torch.bfloat16).eps / 2
        sums = (2 * self.rows.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
        rounding = (1 + unit) ** 4 * (1 + sums) - 1
        return rounding / (1 - rounding)

    def update(self, weight: Tensor, neurons: Tensor | None = None) -> None:
        """Copies all rows, or those of `neurons` [n] if no others changed.

        Raises:
            ValueError: a negative weight, for which the error bound would not hold. Checked when
                all rows are copied; rows named later must not be negative either.
        """
        weight = weight.detach()
        if neurons is None and weight.numel() > 0 and not weight.min() >= 0:
            raise ValueError(f"Shadow: weight must not be negative, not {weight.min():g}")
        if self.rows.dtype == weight.dtype:
            self.rows = weight
        elif neurons is None:
            self.rows.copy_(weight)
        elif _dispatch.NUMBA and self.rows.dtype == torch.bfloat16 and weight.is_contiguous():
            from ssd_kernels import _loops

            rows = self.rows.view(torch.uint16).numpy()
            _loops.round_rows(weight.view(torch.uint32).numpy(), neurons.numpy(), rows)
        else:
            self.rows.index_copy_(0, neurons, F.embedding(neurons, weight).to(self.rows.dtype))
        self._seen = weight._version, weight.data_ptr()

    def stale(self, weight: Tensor) -> bool:
        """Whether weight was written to since the last update, but for writes to weight.data."""
        return self._seen != (weight._version, weight.data_ptr())


class Layer(NamedTuple):
    """A layer under inhibition, and its input."""

    x: Tensor  # [S B, d]
    weight: Tensor  # [S R, d]
    k: int
    gaba: Tensor | None  # [S R]
    inhibition: str
    networks: int  # S

    def hidden(self, op: Callable[..., Tensor], counts: Tensor | None = None) -> Tensor:
        """The dense output, by linear_inhibit or its reference."""
        x, weight, k, gaba, inhibition, networks = self
        given = {"inhibition": inhibition, "counts": counts, "networks": networks}
        return op(x, weight, k, gaba, **given)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def estimate_dtype() -> torch.dtype:
    """The dtype in which this CPU estimates scores fastest."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def linear_code(
    x: Tensor,
    weight: Tensor,
    k: int,
    width: int,
    gaba: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    counts: Tensor | None = None,
    shadow: Shadow | None = None,
    scratch: Scratch | None = None,
    networks: int = 1,
    impl: str | None = None,
) -> tuple[TopKOutput, Tensor]:
    """The neurons that fire in linear_inhibit(x, weight, k, gaba), as a sparse code.

    Args:
        x: [B, d] floating, float32 and not negative if there is a shadow; weight: [R, d].
        width: slots of the code, k..R.
        gaba: [R] in (0, 1].
        counts: as in linear_topk, of the neurons in the code.
        shadow: an up-to-date Shadow of weight; the result is the same without it, but for rounding
            where numba serves.
        scratch: memory of an earlier call, used again on a CPU.
        networks: networks whose rows follow one another; with several there is no shadow.
        impl: "triton", "numba", "torch" or "reference".

    Returns:
        The code, values [B, width] >= 0 descending and indices [B, width] int64, without gradient;
        slots of value 0 are padding, whatever their index; where the layer's output is not
        finite, neither is the code's. And bool [B]: whether more than `width` neurons fire, in
        which case the code is not the layer's.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    _check("linear_code", x, weight, k, gaba, inhibition, networks, positive=True)
    _checks.counter("linear_code", "counts", counts, x, weight.shape[0])
    neurons = weight.shape[0] // networks
    _checks.whole("linear_code", "width", width)
    if not k <= width <= neurons:
        raise ValueError(f"linear_code: width={width} must lie in {k}..{neurons}")
    if networks > 1 and shadow is not None:
        raise ValueError(f"linear_code: a shadow serves one network, not networks={networks}")
    # Without gaba the torch path calls linear_topk, which has kernels.
    served = gaba is not None and x.dtype == torch.float32 and k < neurons
    served = served and max(k + 1, width) <= MAX_K
    looped = (
        gaba is None
        and networks == 1
        and k < MAX_LOOPED
        and len(x) > 0
        and weight.dtype == torch.float32
    )
    serve = _dispatch.choose("linear_code", impl, x, served=served, looped=looped)
    looked_at = shadow is not None and x.numel() > 0 and not _dispatch.symbolic(x)
    if looked_at and not x.min() >= 0:
        raise ValueError(f"linear_code: with a shadow x must not be negative, not {x.min():g}")
    layer = Layer(x, weight, k, gaba, inhibition, networks)
    with torch.no_grad():
        if serve is _triton_code and gaba is not None:
            return _triton_code(layer, gaba, width, counts)
        if serve is _numba_code:
            code, wider = _numba_code(layer, width, shadow, scratch or Scratch())
        else:
            code, wider = serve(layer, width, shadow)
        if counts is not None:
            count_active(code.values, code.indices, counts)
    return code, wider


def _check(
    op: str,
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    networks: int,
    positive: bool,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [B, d]")
    _checks.linear(op, x, weight, None, k, networks)
    _checks.response(op, gaba, x, weight.shape[0], positive=positive)
    _checks.inhibition(op, inhibition)


def _reference_code(layer: Layer, width: int, shadow: Shadow | None) -> tuple[TopKOutput, Tensor]:
    return _compress(layer.hidden(reference.linear_inhibit), width, layer.networks)


def _torch_code(layer: Layer, width: int, shadow: Shadow | None) -> tuple[TopKOutput, Tensor]:
    x, weight, k, gaba, inhibition, networks = layer
    count = max(width, CANDIDATES * k) + k
    exact = x.is_cpu and x.dtype in (torch.float32, torch.float64)
    if not exact or len(x) == 0 or count * NEURONS_PER_CANDIDATE > weight.shape[0] // networks:
        # Ties with the threshold are seen in its own precision alone.
        tell = inhibition == "subtract" or reference.accumulation_dtype(x.dtype) == x.dtype
        if gaba is None and tell:
            code = linear_topk(
                x, weight, k, inhibition=inhibition, threshold=True, networks=networks
            )
            if inhibition == "mask" and code.threshold is not None:
                # linear_topk keeps neurons among the k that tie with the threshold.
                tied = code.values <= code.threshold.unsqueeze(1)
                code = code._replace(values=code.values.masked_fill(tied, 0.0))
            wider = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            return _widened(code, width), wider
        return _compress(layer.hidden(linear_inhibit), width, networks)
    if networks > 1:
        return _one_by_one(layer, width)

    def rank(x: Tensor) -> Candidates:
        scores = x @ weight.T
        best = select(scores if gaba is None else scores / gaba, count).sort(dim=1).values
        return Candidates(best.flatten(), torch.full((len(x),), count, device=x.device))

    near = None if shadow is None else _candidates(shadow, x, k, gaba)
    if near is None:
        code, _, fires = _decide(layer, rank(x), width)
    else:
        code, cut, fires = _decide(layer, near, width)
        # Outside these the rounding bound does not hold: products underflow or overflow.
        doubtful = ~((cut > TINY) & (cut < 1 / TINY))
        if doubtful.any():
            rest = layer._replace(x=x[doubtful])
            again, _, fires[doubtful] = _decide(rest, rank(rest.x), width)
            code.values[doubtful], code.indices[doubtful] = again.values, again.indices
    return code, fires > width


def _one_by_one(layer: Layer, width: int) -> tuple[TopKOutput, Tensor]:
    x, weight, k, gaba, inhibition, networks = layer
    parts = x.chunk(networks), weight.chunk(networks)
    responses = [None] * networks if gaba is None else gaba.chunk(networks)
    codes, wider = zip(
        *(
            _torch_code(Layer(own, rows, k, response, inhibition, 1), width, None)
            for own, rows, response in zip(*parts, responses, strict=True)
        ),
        strict=True,
    )
    indices = torch.cat([code.indices for code in codes])
    indices = reference.numbered_through(indices, weight.shape[0] // networks, networks)
    values = torch.cat([code.values for code in codes])
    return TopKOutput(values, indices), torch.cat(wider)


class Candidates(NamedTuple):
    """Neurons that may fire, sample by sample, ascending within a sample."""

    neurons: Tensor  # [m]
    lengths: Tensor  # [B], their sum is m


def _candidates(shadow: Shadow, x: Tensor, k: int, gaba: Tensor | None) -> Candidates | None:
    """All neurons that may fire or set the inhibition; None if they lie in too many groups."""
    batch = len(x)
    estimates = shadow.estimates(x)
    groups = estimates.view(-1, NEIGHBOURS, batch)
    reached = best = groups.amax(1)
    if gaba is not None:
        groups = shadow.graded(estimates, gaba).view(-1, NEIGHBOURS, batch)
        best = groups.amax(1)
    # Every group has a neuron of that activation, so the inhibition is at least `least`.
    least = _cpu_groups.largest(reached.T, k + 1)[0][:, k].float()
    error = shadow.relative_error()
    least = (least * ((1 - error) / (1 + error))).clamp_(min=TINY**1.2)
    # NaN is a candidate, so that it is seen.
    sample, group = (best < least).logical_not_().T.contiguous().nonzero(as_tuple=True)
    if len(sample) * GROUPS_PER_CANDIDATE > best.numel():
        return None
    near = (groups[group, :, sample] < least[sample].unsqueeze(1)).logical_not_()
    place, member = near.nonzero(as_tuple=True)
    return Candidates(
        (group * NEIGHBOURS)[place] + member, torch.bincount(sample[place], minlength=batch)
    )


def _decide(layer: Layer, candidates: Candidates, width: int) -> tuple[TopKOutput, Tensor, Tensor]:
    """The code among the candidates, the inhibition I [B], and how many fire [B]."""
    x, weight, k, gaba, inhibition, _ = layer
    neurons, lengths = candidates
    starts = F.pad(lengths.cumsum(0), (1, 0))
    # One dot product per candidate, summed in the same order whatever the others are.
    scores = torch.sparse.sampled_addmm(
        _pattern(starts, neurons, weight), x, weight.T, beta=0.0
    ).values()
    slots = max(int(lengths.max()), width, k + 1)
    sample = torch.repeat_interleave(lengths, output_size=len(neurons))
    slot = sample * slots + torch.arange(len(neurons), device=x.device) - starts[sample]
    a = scores.new_zeros(len(x) * slots).index_copy_(0, slot, scores.relu_()).view(-1, slots)
    index = neurons.new_zeros(len(x) * slots).index_copy_(0, slot, neurons)
    index = index.view(-1, slots)
    cut = a.topk(k + 1).values[:, k:]
    surplus = a - (cut if gaba is None else gaba[index] * cut)
    mask = inhibition == "mask"
    fired = torch.where((surplus > 0) | a.isnan(), a, 0.0) if mask else surplus.relu()
    # Candidates ascend, so that a stable sort gives ties to the lower index.
    values, order = fired.sort(dim=1, descending=True, stable=True)
    code = TopKOutput(values[:, :width], index.gather(1, order[:, :width]))
    return code, cut.squeeze(1), (~(fired <= 0)).sum(1)


def _pattern(starts: Tensor, neurons: Tensor, weight: Tensor) -> Tensor:
    """A sparse matrix [B, R] that stores zeros at the neurons of every sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "beta state"
        return torch.sparse_csr_tensor(
            starts,
            neurons,
            weight.new_zeros(len(neurons)),
            (len(starts) - 1, len(weight)),
            device=weight.device,
            check_invariants=False,
        )


def _numba_code(
    layer: Layer, width: int, shadow: Shadow | None, scratch: Scratch
) -> tuple[TopKOutput, Tensor]:
    from ssd_kernels import _loops

    x, weight, k, _, inhibition, _ = layer
    code = TopKOutput(x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64))
    given = k, inhibition == "mask", code.values.numpy(), code.indices.numpy()
    served = False
    if shadow is not None and shadow.rows.dtype == torch.bfloat16 and k < len(weight) // NEIGHBOURS:
        served = _loops.code_of_estimates(
            shadow.estimates(x).view(torch.uint16).numpy(),
            NEIGHBOURS,
            GROUPS_PER_CANDIDATE,
            shadow.relative_error(),
            TINY,
            x.contiguous().numpy(),
            weight.detach().contiguous().numpy(),
            *given,
        )
    if not served:
        scores = torch.mm(weight, x.T, out=scratch(0, x, len(weight), len(x)))
        _loops.code(scores.numpy(), *given)
    return _widened(code, width), x.new_zeros(len(x), dtype=torch.bool)


def _widened(code: TopKOutput, width: int) -> TopKOutput:
    """A code with slots of value 0 at its end."""
    more = width - code.values.shape[1]
    if more == 0:
        return TopKOutput(code.values, code.indices)
    spare = code.indices[:, :1].expand(-1, more)
    return TopKOutput(F.pad(code.values, (0, more)), torch.cat([code.indices, spare], dim=1))


def _compress(hidden: Tensor, width: int, networks: int) -> tuple[TopKOutput, Tensor]:
    code = topk(hidden, width)
    indices = reference.numbered_through(code.indices, hidden.shape[-1], networks)
    # NaN fires, so that it is seen.
    return code._replace(indices=indices), (~(hidden <= 0)).sum(-1) > width


def _triton_code(
    layer: Layer, gaba: Tensor, width: int, counts: Tensor | None
) -> tuple[TopKOutput, Tensor]:
    x, weight, k, _, inhibition, networks = layer
    given = x, weight, k, width, gaba, inhibition, counts, networks
    values, indices, wider = _encoder.graded_code(*given)
    return TopKOutput(values, indices), wider


class ActiveNeurons(NamedTuple):
    """The neurons that fire for some sample of a batch."""

    values: Tensor  # [S B, n] >= 0
    neurons: Tensor | None  # [n] int64, ascending; None: all
    gate: Tensor  # [S B, n]: the gradient passes where it is > 0


def linear_active(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None = None,
    *,
    inhibition: str = "subtract",
    counts: Tensor | None = None,
    scratch: Scratch | None = None,
    every: bool = False,
    networks: int = 1,
    impl: str | None = None,
) -> ActiveNeurons:
    """The columns of linear_inhibit(x, weight, k, gaba) that are not all 0. No gradient.

    On a CPU scores keep the order [R, B]: the product is fastest, and a neuron's maximum over the
    batch is one contiguous pass. All later work is on the rows of neurons that fire.

    Args:
        x: [S B, d] floating; weight: [S R, d]; gaba: [S R].
        counts: as in linear_inhibit.
        scratch: memory of an earlier call, used again on a CPU; what that call returned is gone.
        every: return all columns. So do calls of several networks, and Triton, which reads no value
            back.
        networks: S, networks side by side, as in linear_inhibit.
        impl: "triton", "numba", "torch" or "reference".

    Returns:
        Values [S B, n], neurons [n] int64 and the gate [S B, n].

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    _check("linear_active", x, weight, k, gaba, inhibition, networks, positive=False)
    _checks.counter("linear_active", "counts", counts, x, weight.shape[0])
    if _dispatch.symbolic(x) and not every:
        raise TypeError(
            "linear_active: how many neurons fire depends on values, and x has none here; "
            "every=True gives all"
        )
    looped = networks == 1 and len(x) > 0 and weight.dtype == torch.float32
    serve = _dispatch.choose("linear_active", impl, x, looped=looped)
    every = every or networks > 1
    with torch.no_grad():
        layer = Layer(x, weight, k, gaba, inhibition, networks)
        return serve(layer, counts, scratch or Scratch(), every)


def _reference_active(
    layer: Layer, counts: Tensor | None, scratch: Scratch, every: bool
) -> ActiveNeurons:
    hidden = layer.hidden(reference.linear_inhibit, counts)
    gate = hidden * (reference.scores_of(layer.x, layer.weight, None, layer.networks) > 0)
    if every:
        return ActiveNeurons(hidden, None, gate)
    neurons = (~(hidden <= 0)).any(0).nonzero().squeeze(1)
    if len(neurons) == len(layer.weight):
        return ActiveNeurons(hidden, None, gate)
    return ActiveNeurons(hidden.index_select(1, neurons), neurons, gate.index_select(1, neurons))


def _torch_active(
    layer: Layer, counts: Tensor | None, scratch: Scratch, every: bool
) -> ActiveNeurons:
    x, weight, k, gaba, inhibition, networks = layer
    batch, neurons = len(x), len(weight)
    wide = reference.accumulation_dtype(x.dtype) == x.dtype
    if not x.is_cpu or not wide or batch == 0 or networks > 1:
        return _reference_active(layer, counts, scratch, every)
    scores = torch.mm(weight, x.T, out=scratch(0, x, neurons, batch))
    cut = _cut(scores, k)
    surplus = scratch(1, x, neurons, batch)
    excited = gaba is not None and not gaba.min() > 0
    if excited:
        scores.relu_()  # an excited neuron fires where its activation is 0
    if gaba is None:
        torch.sub(scores, cut, out=surplus)
    else:
        torch.addr(scores, gaba, cut, alpha=-1, out=surplus)
    chosen = None
    highest = surplus.amax(1)
    if inhibition == "mask" and bool(highest.isnan().any()):
        # An infinite activation under infinite inhibition does not fire, a NaN does.
        return _reference_active(layer, counts, scratch, every)
    if not (every or excited):
        chosen = (~(highest <= 0)).nonzero().squeeze(1)
        if len(chosen) == neurons:
            chosen = None
        else:
            surplus = surplus.index_select(0, chosen)
            scores = scores.index_select(0, chosen) if inhibition == "mask" else scores
    if inhibition == "mask":
        surplus = torch.where(surplus <= 0, 0.0, scores)
    values = gate = surplus.relu_()
    if excited:
        gate = torch.ops.aten.threshold_backward(values, scores, 0.0)
    if counts is not None:
        # Faster than to sum booleans, in a dtype that holds every count.
        fired = values.sign().sum(1, dtype=torch.float32 if batch <= 2**24 else torch.float64)
        fired = fired.to(counts.dtype)
        counts += (
            fired if chosen is None else counts.new_zeros(neurons).index_copy_(0, chosen, fired)
        )
    return ActiveNeurons(values.T, chosen, gate.T)


def _numba_active(
    layer: Layer, counts: Tensor | None, scratch: Scratch, every: bool
) -> ActiveNeurons:
    from ssd_kernels import _loops

    x, weight, k, gaba, inhibition, _ = layer
    batch, size = len(x), len(weight)
    scores = torch.mm(weight, x.T, out=scratch(0, x, size, batch))
    if k < min(size, MAX_LOOPED):
        cut = x.new_empty(batch)
        _loops.inhibition(scores.numpy(), k, cut.numpy())
    else:
        cut = _cut(scores, k)
    excited = gaba is not None and not gaba.min() > 0
    values = gate = scratch(1, x, size, batch)
    if excited:
        gate = scratch(2, x, size, batch)
    neurons, nothing = x.new_empty(size, dtype=torch.int64), x.new_empty(0)
    found = _loops.inhibit(
        scores.numpy(),
        cut.numpy(),
        (nothing if gaba is None else gaba.contiguous()).numpy(),
        inhibition == "mask",
        every,
        excited,
        values.numpy(),
        gate.numpy(),
        neurons.numpy(),
        (neurons[:0] if counts is None else counts).numpy(),
    )
    chosen = None if found == size else neurons[:found]
    return ActiveNeurons(values[:found].T, chosen, gate[:found].T)


def _cut(scores: Tensor, k: int) -> Tensor:
    """The inhibition [B] of scores [R, B]: the (k+1)-th largest activation."""
    if k == len(scores):
        return scores.new_zeros(scores.shape[1])
    return _cpu_groups.largest(scores.T, k + 1)[0][:, k].relu()


def _triton_active(
    layer: Layer, counts: Tensor | None, scratch: Scratch, every: bool
) -> ActiveNeurons:
    x, weight, k, gaba, inhibition, networks = layer
    given = x, weight, None, k, gaba, inhibition, counts, True, networks
    hidden, passes = inhibit_triton(*given)
    return ActiveNeurons(hidden, None, passes)


_dispatch.register(
    "linear_code",
    reference=_reference_code,
    torch=_torch_code,
    numba=_numba_code,
    triton=_triton_code,
)
_dispatch.register(
    "linear_active",
    reference=_reference_active,
    torch=_torch_active,
    numba=_numba_active,
    triton=_triton_active,
)
