"""Triton kernels of linear_topk and linear_inhibit; _encoder.py launches them and has the proof.

Rows of the batch are worked on in blocks that hold `size` rows of every network; the first is row
`start` of its network. Networks follow one another in every tensor: x [S B, d], weight [S R, d].
"""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

from ssd_kernels._triton import jit, tl
from ssd_kernels.topk import LAST, LEAST, NOTHING, _bisect, _ordered, _ranked

INFINITE = tl.constexpr(0x7F800000)  # the key of infinity


@jit
def _unordered(key):
    """int32 -> fp32: the inverse of _ordered."""
    return tl.where(key < 0, -(2**31) - key, key).to(tl.float32, bitcast=True)


@jit
def _either(x, weight, of_x, of_weight, column, features):
    """Columns of rows, each of x or of weight."""
    there = (column < features)[None, :]
    value = tl.load(x[:, None] + column[None, :], mask=of_x[:, None] & there, other=0.0)
    other = tl.load(weight[:, None] + column[None, :], mask=of_weight[:, None] & there, other=0.0)
    return tl.where(of_x[:, None], value, other)


@jit(do_not_specialize=["x_rows", "weight_rows"])
def _halve_kernel(
    x,  # [S B, d] fp32
    weight,  # [S R, d] fp32
    halves,  # [S B + S R, WIDTH] fp16: rows of x, then of weight, each times a power of two
    units,  # [S B + S R] fp32: its inverse
    norms,  # [S B + S R] fp32: L2 norm, rounded up; infinite from 2^100 on
    x_rows,  # S B
    weight_rows,  # S R
    features,
    x_stride,
    weight_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Programs of x, then of weight: a row is of one of the two, so one of its loads reads nothing.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_x = row < x_rows
    weight_row = row - tl.cdiv(x_rows, ROWS) * ROWS
    of_weight = (weight_row >= 0) & (weight_row < weight_rows)
    inside = of_x | of_weight
    out = tl.where(of_x, row, x_rows + weight_row)
    x_source = x + row.to(tl.int64) * x_stride
    weight_source = weight + weight_row.to(tl.int64) * weight_stride
    column = tl.arange(0, BLOCK)
    peak = tl.zeros([ROWS], tl.int32)
    for start in range(0, WIDTH, BLOCK):
        value = _either(x_source, weight_source, of_x, of_weight, start + column, features)
        peak = tl.maximum(peak, tl.max(value.to(tl.int32, bitcast=True) & LAST, axis=1))
    # The largest entry of a row comes to lie in 2^14 .. 2^15: fp16 ends at 2^16.
    exponent = tl.minimum(tl.maximum(268 - (peak >> 23), 1), 253)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    unit = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        here = start + column
        value = _either(x_source, weight_source, of_x, of_weight, here, features)
        value *= scale[:, None]
        square += tl.sum(value * value, axis=1)
        at = halves + out.to(tl.int64)[:, None] * WIDTH + here[None, :]
        tl.store(at, value.to(tl.float16), mask=inside[:, None] & (here < WIDTH)[None, :])
    norm = tl.sqrt(square) * unit
    norm += norm * (features * 2.0**-23 + 2.0**-20)
    # An estimate may overflow halfway, between the units of its factors.
    norm = tl.where(norm < 2.0**100, norm, float("inf"))
    tl.store(units + out, unit, mask=inside)
    tl.store(norms + out, norm, mask=inside)


@jit
def _keys_of_tile(
    x,
    weight,
    bias,
    units,
    norms,
    keys,
    group_norms,
    gaba,
    tile,
    start,
    size,
    batch,
    networks,
    neurons,
    features,
    groups,
    x_stride,
    weight_stride,
    relative_error,
    tiny,
    BIAS: tl.constexpr,
    ESTIMATE: tl.constexpr,
    GRADED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row_tiles = tl.cdiv(size, BM)
    each = row_tiles * tl.cdiv(neurons, BN)
    network = tile // each
    # Tiles that run together share rows of weight in L2.
    place = tile % each
    band = TOGETHER * tl.cdiv(neurons, BN)
    first_tile = place // band * TOGETHER
    height = tl.minimum(row_tiles - first_tile, TOGETHER)
    row_tile = first_tile + place % band % height
    first_row = row_tile * BM
    first_neuron = place % band // height * BN
    row = first_row + tl.arange(0, BM)
    neuron = first_neuron + tl.arange(0, BN)
    inside = neuron < neurons
    sample = network * batch + start + first_row
    own = network.to(tl.int64) * neurons
    total = tl.zeros([BM, BN], tl.float32)
    if DESCRIPTORS:
        for done in range(0, features, BK):
            a = x.load([sample, done])
            b = weight.load([network * neurons + first_neuron, done])
            total = tl.dot(a, b.T, total)
    else:
        feature = tl.arange(0, BK)
        a_rows = x + (sample + tl.arange(0, BM)).to(tl.int64)[:, None] * x_stride
        b_rows = weight + (own + neuron)[None, :] * weight_stride
        for done in range(0, features, BK):
            column = done + feature
            a = tl.load(
                a_rows + column[None, :],
                mask=(row < size)[:, None] & (column < features)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_rows + column[:, None],
                mask=inside[None, :] & (column < features)[:, None],
                other=0.0,
            )
            total = tl.dot(a, b, total)
    group = first_neuron // GROUP + tl.arange(0, BN // GROUP)
    if ESTIMATE:
        samples = networks * batch
        unit = tl.load(units + sample + tl.arange(0, BM), mask=row < size, other=0.0)
        weight_unit = tl.load(units + samples + own + neuron, mask=inside, other=0.0)
        total = total * unit[:, None] * weight_unit[None, :]
        norm = tl.load(norms + samples + own + neuron, mask=inside, other=0.0)
        if row_tile == 0:
            longest = tl.max(tl.reshape(norm, [BN // GROUP, GROUP]), axis=1)
            out = group_norms + network.to(tl.int64) * groups + group
            tl.store(out, longest, mask=group < groups)
    if BIAS:
        shift = tl.load(bias + own + neuron, mask=inside, other=0.0)
        total += shift.to(tl.float32)[None, :]
    at = (network * size + row).to(tl.int64)[:, None] * groups + group[None, :]
    kept = (row < size)[:, None] & (group < groups)[None, :]
    plane = (networks * size).to(tl.int64) * groups
    if GRADED:
        # The bounds of each neuron: below, of the activation; above, over the response.
        length = tl.load(norms + sample + tl.arange(0, BM), mask=row < size, other=0.0)
        slope = relative_error * length + tiny
        width = slope[:, None] * norm[None, :] + (tiny * (length + 1.0))[:, None]
        width += tl.abs(total) * 2.0**-21
        lower = tl.where(total - width == total - width, total - width, float("-inf"))
        key = tl.where(inside[None, :], _ordered(lower), NOTHING)
        floor = tl.max(tl.reshape(key, [BM, BN // GROUP, GROUP]), axis=2)
        tl.store(keys + 2 * plane + at, floor, mask=kept)
        response = tl.load(gaba + own + neuron, mask=inside, other=1.0).to(tl.float32)
        total = (total + width) / response[None, :]
    key = tl.where(inside[None, :], _ordered(total), NOTHING)
    key = tl.reshape(key, [BM, BN // GROUP, GROUP])
    lane = tl.arange(0, GROUP)[None, None, :]
    best = tl.max(key, axis=2)
    position = tl.min(tl.where(key == best[:, :, None], lane, GROUP - 1), axis=2)
    second = tl.max(tl.where(lane == position[:, :, None], NOTHING, key), axis=2)
    tl.store(keys + at, best, mask=kept)
    tl.store(keys + plane + at, (second & -GROUP) | position, mask=kept)


@jit(do_not_specialize=["start", "size", "networks"])
def _keys_kernel(
    x,  # [S B, D] fp16 or bf16, or a descriptor of it
    weight,  # [S R, D], or a descriptor of it
    bias,  # [S R]
    units,  # [S B + S R] fp32: what the rows of x and of weight are to be multiplied by
    norms,  # [S B + S R] fp32
    keys,  # [2 or 3, S size, groups] int32: a group's largest, its second with a position, bounds
    group_norms,  # [S, groups] fp32: the largest norm of a group's rows of weight
    gaba,  # [S R]
    tiles,
    start,
    size,
    batch,
    networks,
    neurons,
    features,
    groups,
    x_stride,
    weight_stride,
    relative_error,  # of an estimate, in units of the product of the norms
    tiny,  # what underflows, in units of the norms
    BIAS: tl.constexpr,
    ESTIMATE: tl.constexpr,
    GRADED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """A product that keeps of each group of neurons the two largest keys, and no score.

    The position of the largest key lies in the low bits of the second, which thereby shrinks.
    GRADED: keys are of the upper bound over the response to inhibition; a third one bounds the
    largest activation of a group from below.
    """
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _keys_of_tile(
                x,
                weight,
                bias,
                units,
                norms,
                keys,
                group_norms,
                gaba,
                tile,
                start,
                size,
                batch,
                networks,
                neurons,
                features,
                groups,
                x_stride,
                weight_stride,
                relative_error,
                tiny,
                BIAS,
                ESTIMATE,
                GRADED,
                DESCRIPTORS,
                GROUP,
                BM,
                BN,
                BK,
                TOGETHER,
            )
    else:
        _keys_of_tile(
            x,
            weight,
            bias,
            units,
            norms,
            keys,
            group_norms,
            gaba,
            tl.program_id(0),
            start,
            size,
            batch,
            networks,
            neurons,
            features,
            groups,
            x_stride,
            weight_stride,
            relative_error,
            tiny,
            BIAS,
            ESTIMATE,
            GRADED,
            DESCRIPTORS,
            GROUP,
            BM,
            BN,
            BK,
            TOGETHER,
        )


@jit
def _list(keys, group, second, reached, crowded, GROUP: tl.constexpr):
    """Writes what is to be looked at over the keys: single neurons, then crowded groups.

    Returns how many are single, how many neurons that makes in all, and the place of each group.
    """
    single = reached & ~crowded
    singles = tl.sum(single.to(tl.int32))
    total = singles + GROUP * tl.sum(crowded.to(tl.int32))
    place = tl.cumsum(single.to(tl.int32), 0) - 1
    place = tl.where(single, place, singles + tl.cumsum(crowded.to(tl.int32), 0) - 1)
    tl.debug_barrier()  # every thread has read its keys
    winner = group * GROUP + (second & (GROUP - 1))
    tl.store(keys + place, tl.where(single, winner, group), mask=reached)
    return singles, total, place


@jit
def _blank(x, features, BK: tl.constexpr):
    """Whether the row x is all zeros."""
    feature = tl.arange(0, BK)
    found = 0
    for start in range(0, features, BK):
        here = start + feature
        value = tl.load(x + here, mask=here < features, other=0.0)
        found += tl.sum((value != 0).to(tl.int32))
    return found == 0


@jit
def _listed(keys, at, singles, total, neurons, GROUP: tl.constexpr, N: tl.constexpr):
    """N neurons of the list, and which of them there are."""
    lane = at + tl.arange(0, N)
    alone = lane < singles
    member = tl.maximum(lane - singles, 0)
    place = tl.where(alone, lane, singles + member // GROUP)
    entry = tl.load(keys + place, mask=lane < total, other=0)
    neuron = tl.where(alone, entry, entry * GROUP + member % GROUP)
    return neuron, (lane < total) & (neuron < neurons)


@jit
def _scores(x, weight, neuron, inside, features, weight_stride, N: tl.constexpr, BK: tl.constexpr):
    """fp32 products of one row x with weight[neuron], [N]."""
    feature = tl.arange(0, BK)
    rows = weight + neuron.to(tl.int64)[:, None] * weight_stride
    total = tl.zeros([N, BK], tl.float32)
    for start in range(0, features, BK):
        here = start + feature
        a = tl.load(x + here, mask=here < features, other=0.0).to(tl.float32)
        b = tl.load(
            rows + here[None, :], mask=inside[:, None] & (here < features)[None, :], other=0.0
        )
        total += a[None, :] * b.to(tl.float32)
    return tl.sum(total, axis=1)


@jit
def _append(
    buffer, held, floor, key, neuron, inside, best, CAPACITY: tl.constexpr, STEP: tl.constexpr
):
    """Adds what exceeds the floor to the buffer, which is cut to its `best` when it is full."""
    if held + inside.shape[0] > CAPACITY:
        packed, rank = _ranked(buffer, held, CAPACITY, STEP)
        tl.store(buffer + rank, packed, mask=rank < best)
        floor = tl.max(tl.where(rank == best - 1, packed, LEAST))
        held = best
    entry = (key.to(tl.int64) << 32) | (neuron ^ LAST).to(tl.int64)
    keep = inside & (entry > floor)
    place = held + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(buffer + place, entry, mask=keep)
    return held + tl.sum(keep.to(tl.int32)), floor


@jit(do_not_specialize=["start", "size", "networks", "k", "best"])
def _code_kernel(
    x,  # [S B, d]
    weight,  # [S R, d]
    bias,  # [S R]
    norms,  # [S B] fp32
    group_norms,  # [S, groups] fp32
    keys,  # [2, S size, groups] int32; overwritten
    buffer,  # [S size, CAPACITY] int64
    values,  # [S B, k]
    indices,  # [S B, k] int64, through all networks
    after,  # [S B] int64: index of the (k+1)-th
    cut,  # [S B]: the (k+1)-th activation
    passes,  # [S B, k] bool: where the gradient passes
    cut_passes,  # [S B] bool
    counts,  # [S R]
    start,
    size,
    batch,
    networks,
    neurons,
    features,
    groups,
    k,
    best,  # k + 1, or R
    x_stride,
    weight_stride,
    counts_stride,
    relative_error,  # of an estimate, in units of the product of the norms
    tiny,  # what underflows, in units of the norms
    BIAS: tl.constexpr,
    ESTIMATE: tl.constexpr,
    SUBTRACT: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # lanes for the groups
    CAPACITY: tl.constexpr,  # of the buffer, at least best + N
    STEP: tl.constexpr,
    N: tl.constexpr,  # neurons that are scored at a time
    BK: tl.constexpr,
):
    """A row's code from the keys of its groups."""
    row = tl.program_id(0)
    network = row // size
    sample = network.to(tl.int64) * batch + start + row % size
    own = network.to(tl.int64) * neurons
    x += sample * x_stride
    weight += own * weight_stride
    bias += own
    buffer += row.to(tl.int64) * CAPACITY
    second_keys = keys + ((networks * size).to(tl.int64) + row) * groups
    keys += row.to(tl.int64) * groups

    group = tl.arange(0, GROUPS)
    known = group < groups
    top = tl.load(keys + group, mask=known, other=NOTHING)
    low = top
    if ESTIMATE:
        estimate = _unordered(top)
        length = tl.load(norms + sample)
        longest = tl.load(group_norms + network.to(tl.int64) * groups + group, mask=known, other=0)
        width = relative_error * (length * longest) + tiny * (length + longest + 1.0)
        lower = estimate - (width + tl.abs(estimate) * 2.0**-21)
        # What is no number bounds nothing.
        low = _ordered(tl.where(lower == lower, lower, float("-inf")))
        low = tl.where(known, low, NOTHING)
    least, _ = _bisect(low, best, tl.min(low), best)
    least = tl.where(best > groups, NOTHING, least)
    high = top
    if ESTIMATE:
        high = _ordered(estimate + (width + tl.abs(estimate) * 2.0**-21))
    reached = known & (high >= least)
    second = tl.load(second_keys + group, mask=reached, other=NOTHING)
    high = second | (GROUP - 1)
    if ESTIMATE:
        estimate = _unordered(high)
        high = _ordered(estimate + (width + tl.abs(estimate) * 2.0**-21))
    crowded = reached & (high >= least)
    singles, total, place = _list(keys, group, second, reached, crowded, GROUP)
    if not BIAS:
        # A row of zeros ties all finite neurons, and the first are the best.
        tied = (tl.max(top) == 0) & _blank(x, features, BK)
        total = tl.where(tied, tl.minimum(total, singles + best), total)
    if not ESTIMATE:
        tl.store(second_keys + place, top, mask=reached & ~crowded)
    tl.debug_barrier()

    held = 0
    floor = LEAST
    at = 0
    if ESTIMATE:
        floor = least.to(tl.int64) << 32
    else:
        # In 16 bits the product was the score.
        while at < singles:
            lane = at + tl.arange(0, N)
            inside = lane < singles
            neuron = tl.load(keys + lane, mask=inside, other=0)
            key = tl.load(second_keys + lane, mask=inside, other=NOTHING)
            held, floor = _append(buffer, held, floor, key, neuron, inside, best, CAPACITY, STEP)
            at += N
        at = singles
    while at < total:
        neuron, inside = _listed(keys, at, singles, total, neurons, GROUP, N)
        score = _scores(x, weight, neuron, inside, features, weight_stride, N, BK)
        if BIAS:
            score += tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)
        key = _ordered(score)
        held, floor = _append(buffer, held, floor, key, neuron, inside, best, CAPACITY, STEP)
        at += N

    packed, rank = _ranked(buffer, held, CAPACITY, STEP)
    activation = _unordered((packed >> 32).to(tl.int32))
    activation = tl.where(activation <= 0, 0.0, activation)  # NaN stays
    following = (rank == k) & (rank < best)  # none if k is all of them
    inhibition = tl.sum(tl.where(following, activation, 0.0))
    bound = inhibition.to(cut.dtype.element_ty)
    tl.store(cut + sample, bound)
    tl.store(cut_passes + sample, ~(bound.to(tl.float32) <= 0))
    if SUBTRACT:
        activation -= inhibition
        activation = tl.where(activation <= 0, 0.0, activation)
    index = own + ((packed & LAST).to(tl.int32) ^ LAST)
    chosen = rank < k
    value = activation.to(values.dtype.element_ty)
    tl.store(values + sample * k + rank, value, mask=chosen)
    tl.store(passes + sample * k + rank, ~(value.to(tl.float32) <= 0), mask=chosen)
    tl.store(indices + sample * k + rank, index, mask=chosen)
    tl.store(after + sample + rank - k, index, mask=following)
    if COUNT:
        one = tl.full([CAPACITY], 1, counts.dtype.element_ty)
        active = chosen & (value.to(tl.float32) > 0)
        tl.atomic_add(counts + index * counts_stride, one, mask=active, sem="relaxed")


@jit(do_not_specialize=["start", "size", "networks", "k", "width"])
def _graded_kernel(
    x,  # [S B, d] fp32
    weight,  # [S R, d] fp32
    gaba,  # [S R]
    keys,  # [3, S size, groups] int32; overwritten
    buffer,  # [S size, CAPACITY] int64
    values,  # [S B, width]
    indices,  # [S B, width] int64, through all networks
    overflow,  # [S B] bool: whether more than `width` neurons fire
    counts,  # [S R]
    start,
    size,
    batch,
    networks,
    neurons,
    features,
    groups,
    k,  # less than R
    width,
    x_stride,
    weight_stride,
    counts_stride,
    SUBTRACT: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,  # of the buffer, at least N more than k + 1 and than width
    STEP: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    """A row's code under graded inhibition: first the inhibition, then what exceeds it."""
    row = tl.program_id(0)
    network = row // size
    sample = network.to(tl.int64) * batch + start + row % size
    own = network.to(tl.int64) * neurons
    x += sample * x_stride
    weight += own * weight_stride
    gaba += own
    buffer += row.to(tl.int64) * CAPACITY
    plane = (networks * size).to(tl.int64) * groups
    keys += row.to(tl.int64) * groups

    group = tl.arange(0, GROUPS)
    known = group < groups
    low = tl.load(keys + 2 * plane + group, mask=known, other=NOTHING)
    least, _ = _bisect(low, k + 1, tl.min(low), k + 1)
    # The inhibition is at least this; the quotients were rounded.
    bound = tl.where(k < groups, _unordered(least), 0.0)
    bound = tl.where(bound > 0, bound * (1 - 2.0**-20), 0.0)
    least = _ordered(bound)
    high = tl.load(keys + group, mask=known, other=NOTHING)
    reached = known & (high >= least)
    second = tl.load(keys + plane + group, mask=reached, other=NOTHING)
    crowded = reached & ((second | (GROUP - 1)) >= least)
    singles, total, _ = _list(keys, group, second, reached, crowded, GROUP)
    # A row of zeros: nothing fires.
    total = tl.where((tl.max(high) < INFINITE) & _blank(x, features, BK), 0, total)
    tl.debug_barrier()

    held = 0
    floor = LEAST
    at = 0
    while at < total:
        neuron, inside = _listed(keys, at, singles, total, neurons, GROUP, N)
        score = _scores(x, weight, neuron, inside, features, weight_stride, N, BK)
        held, floor = _append(
            buffer, held, floor, _ordered(score), neuron, inside, k + 1, CAPACITY, STEP
        )
        at += N
    packed, rank = _ranked(buffer, held, CAPACITY, STEP)
    activation = _unordered((packed >> 32).to(tl.int32))
    activation = tl.where(activation <= 0, 0.0, activation)
    inhibition = tl.sum(tl.where((rank == k) & (rank < held), activation, 0.0))

    held = 0
    floor = LEAST
    at = 0
    fires = 0
    while at < total:
        neuron, inside = _listed(keys, at, singles, total, neurons, GROUP, N)
        score = _scores(x, weight, neuron, inside, features, weight_stride, N, BK)
        activation_here = tl.where(score <= 0, 0.0, score)
        response = tl.load(gaba + neuron, mask=inside, other=1.0).to(tl.float32)
        surplus = activation_here - response * inhibition
        if SUBTRACT:
            value = tl.where(surplus <= 0, 0.0, surplus)
        else:
            stays = (surplus > 0) | (activation_here != activation_here)
            value = tl.where(stays, activation_here, 0.0)
        active = inside & ((value > 0) | (value != value))  # NaN fires, so that it is seen
        fires += tl.sum(active.to(tl.int32))
        held, floor = _append(
            buffer, held, floor, _ordered(value), neuron, active, width, CAPACITY, STEP
        )
        at += N
    packed, rank = _ranked(buffer, held, CAPACITY, STEP)
    there = rank < tl.minimum(held, width)
    value = tl.where(there, _unordered((packed >> 32).to(tl.int32)), 0.0)
    index = tl.where(there, (packed & LAST).to(tl.int32) ^ LAST, 0)
    tl.store(values + sample * width + rank, value, mask=rank < width)
    tl.store(indices + sample * width + rank, own + index, mask=rank < width)
    tl.store(overflow + sample, fires > width)
    if COUNT:
        one = tl.full([CAPACITY], 1, counts.dtype.element_ty)
        place = (own + index).to(tl.int64) * counts_stride
        tl.atomic_add(counts + place, one, mask=there & (value > 0), sem="relaxed")


@jit
def _inhibit_kernel(
    scores,  # [S rows, R] fp32
    best,  # [S rows, k + 1] fp32: the largest scores
    gaba,  # [S R]
    hidden,  # [S rows, R]; may be the scores
    passes,  # [S rows, R] bool: where the gradient passes
    counts,  # [S R]
    rows,
    neurons,
    k,
    counts_stride,
    CUT: tl.constexpr,
    GABA: tl.constexpr,
    SUBTRACT: tl.constexpr,
    COUNT: tl.constexpr,
    PASSES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tiles = tl.cdiv(neurons, BN)
    row_tiles = tl.cdiv(rows, BM)
    row_tile = tl.program_id(0) // tiles
    network = (row_tile // row_tiles).to(tl.int64)
    row = row_tile % row_tiles * BM + tl.arange(0, BM)
    neuron = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    inside = (row < rows)[:, None] & (neuron < neurons)[None, :]
    gaba += network * neurons
    counts += network * neurons * counts_stride
    best += network * rows * (k + 1)
    at = (network * rows + row)[:, None] * neurons + neuron[None, :]
    score = tl.load(scores + at, mask=inside, other=0.0)
    activation = tl.where(score <= 0, 0.0, score)
    surplus = activation
    if CUT:
        inhibition = tl.load(best + row.to(tl.int64) * (k + 1) + k, mask=row < rows, other=0.0)[
            :, None
        ]
        inhibition = tl.where(inhibition <= 0, 0.0, inhibition)
        if GABA:
            response = tl.load(gaba + neuron, mask=neuron < neurons, other=0.0).to(tl.float32)
            inhibition = response[None, :] * inhibition
        surplus = activation - inhibition
    positive = tl.where(surplus <= 0, 0.0, surplus)
    # What is not a number stays, so that it is seen.
    kept = (surplus > 0) | (activation != activation)
    value = positive if SUBTRACT else tl.where(kept, activation, 0.0)
    value = value.to(hidden.dtype.element_ty)
    tl.store(hidden + at, value, mask=inside)
    if PASSES:
        blocked = (score <= 0) | (value.to(tl.float32) <= 0)
        tl.store(passes + at, ~blocked, mask=inside)
    if COUNT:
        active = inside & (value.to(tl.float32) > 0)
        hits = tl.sum(active.to(tl.int32), axis=0).to(counts.dtype.element_ty)
        tl.atomic_add(
            counts + neuron.to(tl.int64) * counts_stride, hits, mask=hits > 0, sem="relaxed"
        )
