"""Triton kernels of linear_topk and linear_inhibit.

Groups are 32 consecutive neurons. The k largest scores of a row lie in the k groups with the
largest maxima (equal maxima: the lower groups), so a matrix product whose epilogue writes group
maxima leaves little to select from. Scores live in a slab of rows that is reused.

A slab holds equally many rows of one or several networks. Axis 1 of every grid is the network, the
first being number `first` of all; no program serves two. Pointers to rows of the batch are those of
the slab's first row; those to neurons (weight, bias, gaba, counts) are those of all networks.
"""

from __future__ import annotations

from ssd_kernels._triton import jit, tl
from ssd_kernels.topk import LAST, NOTHING, _bisect, _ordered, _ranked

GROUP = 32
_GROUP = tl.constexpr(GROUP)


@jit
def _program():
    """The number of this program among those of all networks."""
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)


@jit
def _first_neuron(first, neurons):
    """Where the neurons of this program's network begin among those of all."""
    return (first + tl.program_id(1)).to(tl.int64) * neurons


@jit(do_not_specialize=["first"])
def _score_kernel(
    x,  # [S rows, D]
    weight,  # [S R, D]
    bias,  # [S R]
    slab,  # [S rows, R] fp32, without the bias
    maxima,  # [S rows, groups] int32 keys, with the bias
    first,
    rows,  # of each network
    neurons,  # of each network
    features,
    groups,
    x_stride,
    weight_stride,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Programs that run together share their rows of weight.
    row_tiles = tl.cdiv(rows, BM)
    row = (tl.program_id(0) % row_tiles) * BM + tl.arange(0, BM)
    start = (tl.program_id(0) // row_tiles).to(tl.int64) * BN
    neuron = start + tl.arange(0, BN)
    feature = tl.arange(0, BK)
    above = tl.program_id(1).to(tl.int64) * rows
    x += above * x_stride
    slab += above * neurons
    maxima += above * groups
    weight += _first_neuron(first, neurons) * weight_stride
    bias += _first_neuron(first, neurons)
    x_tile = x + row.to(tl.int64)[:, None] * x_stride + feature[None, :]
    weight_tile = weight + neuron[None, :] * weight_stride + feature[:, None]
    inside = neuron < neurons
    total = tl.zeros([BM, BN], tl.float32)
    for done in range(0, features, BK):
        left = features - done
        a = tl.load(x_tile, mask=(row[:, None] < rows) & (feature[None, :] < left), other=0.0)
        b = tl.load(weight_tile, mask=inside[None, :] & (feature[:, None] < left), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_tile += BK
        weight_tile += BK
    out = slab + row.to(tl.int64)[:, None] * neurons + neuron[None, :]
    tl.store(out, total, mask=(row[:, None] < rows) & inside[None, :])
    if BIAS:
        total += tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
    key = tl.where(inside[None, :], _ordered(total), NOTHING)
    best = tl.max(tl.reshape(key, [BM, BN // _GROUP, _GROUP]), axis=2)
    group = start // _GROUP + tl.arange(0, BN // _GROUP)
    out = maxima + row.to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(out, best, mask=(row[:, None] < rows) & (group < groups)[None, :])


@jit(do_not_specialize=["first"])
def _maxima_kernel(
    slab, bias, maxima, first, neurons, groups, tiles, BIAS: tl.constexpr, BN: tl.constexpr
):
    row = _program() // tiles
    start = (tl.program_id(0) % tiles).to(tl.int64) * BN
    neuron = start + tl.arange(0, BN)
    inside = neuron < neurons
    score = tl.load(slab + row * neurons + neuron, mask=inside, other=0.0)
    if BIAS:
        bias += _first_neuron(first, neurons)
        score += tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(inside, _ordered(score), NOTHING)
    best = tl.max(tl.reshape(key, [BN // _GROUP, _GROUP]), axis=1)
    group = start // _GROUP + tl.arange(0, BN // _GROUP)
    tl.store(maxima + row * groups + group, best, mask=group < groups)


@jit
def _best(key, index, count):
    """Marks the `count` largest keys, of equal ones those with the lower index."""
    low, _ = _bisect(key, count, tl.min(key), count)
    places = count - tl.sum((key > low).to(tl.int32))
    early = tl.where(key == low, index ^ LAST, NOTHING)
    least, _ = _bisect(early, places, tl.minimum(places, 0), places)
    return (key > low) | (early >= least)


@jit
def _places(keep):
    return tl.cumsum(keep.to(tl.int32), 0) - 1


@jit(do_not_specialize=["first"])
def _decide_kernel(
    slab,  # [rows, R] fp32
    bias,  # [S R]
    maxima,  # [rows, groups] int32
    picked,  # [rows or 1, picks] int32 or int64: the groups to look into
    listed,  # [rows, CANDIDATES] int32: neurons of the network to look at instead, where held >= 0
    rescored,  # [rows, CANDIDATES] fp32
    held,  # [rows] int32
    scratch,  # [rows, CAPACITY] int64
    values,  # [rows, k]
    indices,  # [rows, k] int64, through all networks
    after,  # [rows] int64: index of the (k+1)-th
    cut,  # [rows]
    counts,  # [S R]
    first,
    k,
    best,  # k + 1, or R
    neurons,
    groups,
    picks,
    picked_stride,
    counts_stride,
    BIAS: tl.constexpr,
    PICK: tl.constexpr,
    LISTED: tl.constexpr,
    CODE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CAPACITY: tl.constexpr,
    STEP: tl.constexpr,
):
    row = _program()
    own = _first_neuron(first, neurons)
    bias += own
    lane = tl.arange(0, MEMBERS)
    if PICK:
        number = tl.arange(0, GROUPS)
        top = tl.load(maxima + row * groups + number, mask=number < groups, other=NOTHING)
        keep = _best(top, number, picks)
        tl.store(picked + row * picked_stride + _places(keep), number, mask=keep)
        tl.debug_barrier()
    seen = lane // _GROUP < picks
    group = tl.load(picked + row * picked_stride + lane // _GROUP, mask=seen, other=0).to(tl.int32)
    neuron = group * _GROUP + lane % _GROUP
    seen = seen & (neuron < neurons)
    if LISTED:
        found = tl.load(held + row) + tl.zeros_like(lane)
        plain = found < 0
        inside = seen & plain
        score = tl.load(slab + row * neurons + neuron, mask=inside, other=0.0)
        entry = row * CANDIDATES + lane
        neuron = tl.where(plain, neuron, tl.load(listed + entry, mask=lane < found, other=0))
        score = tl.where(plain, score, tl.load(rescored + entry, mask=lane < found, other=0.0))
        seen = inside | (lane < found)
    else:
        score = tl.load(slab + row * neurons + neuron, mask=seen, other=0.0)
    if BIAS:
        score += tl.load(bias + neuron, mask=seen, other=0.0).to(tl.float32)
    key = tl.where(seen, _ordered(score), NOTHING)
    keep = _best(key, neuron, best)
    packed = (key.to(tl.int64) << 32) | (neuron ^ LAST).to(tl.int64)
    scratch += row * CAPACITY
    tl.store(scratch + _places(keep), packed, mask=keep)
    packed, rank = _ranked(scratch, best, CAPACITY, STEP)
    key = (packed >> 32).to(tl.int32)
    bits = tl.where(key < 0, -(2**31) - key, key)
    activation = bits.to(tl.float32, bitcast=True)
    activation = tl.where(activation <= 0, 0.0, activation)  # NaN stays
    following = (rank == k) & (rank < best)  # none if k is all of them
    inhibition = tl.sum(tl.where(following, activation, 0.0))
    tl.store(cut + row, inhibition.to(cut.dtype.element_ty))
    if CODE:
        if SUBTRACT:
            activation -= inhibition
            activation = tl.where(activation <= 0, 0.0, activation)
        index = own + ((packed & LAST).to(tl.int32) ^ LAST)
        chosen = rank < k
        value = activation.to(values.dtype.element_ty)
        tl.store(values + row * k + rank, value, mask=chosen)
        tl.store(indices + row * k + rank, index, mask=chosen)
        tl.store(after + row + rank - k, index, mask=following)
        if COUNT:
            one = tl.full([CAPACITY], 1, counts.dtype.element_ty)
            active = chosen & (value.to(tl.float32) > 0)
            tl.atomic_add(counts + index * counts_stride, one, mask=active, sem="relaxed")


@jit(do_not_specialize=["first"])
def _filter_kernel(
    slab,  # [rows, R] fp32 estimates
    bias,
    maxima,  # [rows, groups] int32
    slack,  # [rows] fp32: twice the error bound of an estimate
    picked,  # [rows, PICKS] int32
    listed,  # [rows, CANDIDATES] int32
    held,  # [rows] int32
    first,
    best,
    neurons,
    groups,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    PICKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Lists the neurons that the estimates cannot rule out; held = -1 where they do not fit."""
    row = _program()
    number = tl.arange(0, GROUPS)
    top = tl.load(maxima + row * groups + number, mask=number < groups, other=NOTHING)
    low, _ = _bisect(top, best, tl.min(top), best)
    least = tl.min(tl.where(top >= low, top, LAST))
    bound = tl.where(least < 0, -(2**31) - least, least).to(tl.float32, bitcast=True)
    width = tl.load(slack + row)
    floor = bound - width - tl.abs(bound) * 2.0**-20
    floor_key = _ordered(floor)
    keep = (top >= floor_key) & (number < groups)
    reached = tl.sum(keep.to(tl.int32))
    place = _places(keep)
    tl.store(picked + row * PICKS + place, number, mask=keep & (place < PICKS))
    tl.debug_barrier()
    lane = tl.arange(0, PICKS * _GROUP)
    seen = lane // _GROUP < reached
    group = tl.load(picked + row * PICKS + lane // _GROUP, mask=seen, other=0)
    neuron = group * _GROUP + lane % _GROUP
    seen = seen & (neuron < neurons)
    score = tl.load(slab + row * neurons + neuron, mask=seen, other=0.0)
    if BIAS:
        bias += _first_neuron(first, neurons)
        score += tl.load(bias + neuron, mask=seen, other=0.0).to(tl.float32)
    keep = seen & (_ordered(score) >= floor_key)
    found = tl.sum(keep.to(tl.int32))
    place = _places(keep)
    tl.store(listed + row * CANDIDATES + place, neuron, mask=keep & (place < CANDIDATES))
    found = tl.where(found <= CANDIDATES, found, -1)
    found = tl.where(reached <= PICKS, found, -1)
    # A bound that is infinite or NaN proves nothing.
    found = tl.where(width + tl.abs(floor) < float("inf"), found, -1)
    tl.store(held + row, found)


@jit
def _dots(x, weight, neuron, inside, features, weight_stride, N: tl.constexpr, BK: tl.constexpr):
    """fp32 products of one row x with weight[neuron], [N]."""
    feature = tl.arange(0, BK)
    at = weight + neuron.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros([N, BK], tl.float32)
    for start in range(0, features, BK):
        here = start + feature
        a = tl.load(x + here, mask=here < features, other=0.0)
        b = tl.load(
            at + here[None, :], mask=inside[:, None] & (here < features)[None, :], other=0.0
        )
        total += a[None, :] * b
    return tl.sum(total, axis=1)


@jit(do_not_specialize=["first"])
def _rescore_kernel(
    x,
    weight,
    listed,
    held,
    rescored,
    first,
    neurons,
    features,
    x_stride,
    weight_stride,
    CANDIDATES: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    row = _program()
    weight += _first_neuron(first, neurons) * weight_stride
    found = tl.load(held + row)
    start = 0
    while start < found:
        lane = start + tl.arange(0, N)
        neuron = tl.load(listed + row * CANDIDATES + lane, mask=lane < found, other=0)
        score = _dots(
            x + row * x_stride, weight, neuron, lane < found, features, weight_stride, N, BK
        )
        tl.store(rescored + row * CANDIDATES + lane, score, mask=lane < found)
        start += N


@jit(do_not_specialize=["first"])
def _recover_kernel(
    x,
    weight,
    bias,
    held,
    slab,
    maxima,
    first,
    neurons,
    features,
    groups,
    x_stride,
    weight_stride,
    BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BK: tl.constexpr,
):
    """All scores of a row that the filter gave up; the others cost a few empty programs."""
    row = _program() // PARTS
    weight += _first_neuron(first, neurons) * weight_stride
    bias += _first_neuron(first, neurons)
    group = tl.program_id(0) % PARTS
    end = tl.where(tl.load(held + row) < 0, groups, 0)
    while group < end:
        neuron = group * _GROUP + tl.arange(0, _GROUP)
        inside = neuron < neurons
        score = _dots(
            x + row * x_stride, weight, neuron, inside, features, weight_stride, _GROUP, BK
        )
        tl.store(slab + row * neurons + neuron, score, mask=inside)
        if BIAS:
            score += tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)
        key = tl.where(inside, _ordered(score), NOTHING)
        tl.store(maxima + row * groups + group, tl.max(key))
        group += PARTS


@jit(do_not_specialize=["first"])
def _inhibit_kernel(
    slab,  # [S rows, R]
    bias,  # [S R]
    gaba,  # [S R]
    cut,  # [S rows] fp32
    hidden,  # [S rows, R]
    passes,  # [S rows, R] int8: where the gradient passes
    counts,  # [S R]
    first,
    rows,  # of each network
    neurons,  # of each network
    tiles,
    counts_stride,
    BIAS: tl.constexpr,
    GABA: tl.constexpr,
    SUBTRACT: tl.constexpr,
    COUNT: tl.constexpr,
    PASSES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64) * BM + tl.arange(0, BM)
    neuron = (tl.program_id(0) % tiles).to(tl.int64) * BN + tl.arange(0, BN)
    inside = (row < rows)[:, None] & (neuron < neurons)[None, :]
    above = tl.program_id(1).to(tl.int64) * rows
    own = _first_neuron(first, neurons)
    bias += own
    gaba += own
    counts += own * counts_stride
    at = above * neurons + row[:, None] * neurons + neuron[None, :]
    score = tl.load(slab + at, mask=inside, other=0.0)
    if BIAS:
        score += tl.load(bias + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)[None, :]
    activation = tl.where(score <= 0, 0.0, score)
    inhibition = tl.load(cut + above + row, mask=row < rows, other=0.0)[:, None]
    if GABA:
        response = tl.load(gaba + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)
        surplus = activation - response[None, :] * inhibition
    else:
        surplus = activation - inhibition
    positive = tl.where(surplus <= 0, 0.0, surplus)
    # What is not a number stays, so that it is seen.
    kept = (surplus > 0) | (activation != activation)
    value = positive if SUBTRACT else tl.where(kept, activation, 0.0)
    value = value.to(hidden.dtype.element_ty)
    tl.store(hidden + at, value, mask=inside)
    if PASSES:
        blocked = (score <= 0) | (value.to(tl.float32) <= 0)
        tl.store(passes + at, (~blocked).to(tl.int8), mask=inside)
    if COUNT:
        active = inside & (value.to(tl.float32) > 0)
        hits = tl.sum(active.to(tl.int32), axis=0).to(counts.dtype.element_ty)
        tl.atomic_add(counts + neuron * counts_stride, hits, mask=hits > 0, sem="relaxed")
