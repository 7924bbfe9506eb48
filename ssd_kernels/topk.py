"""Exact row-wise top-k with stable ties."""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _checks, _cpu_groups, _dispatch, _op, _tuning, reference
from ssd_kernels._triton import jit, tl
from ssd_kernels.reference import TopKOutput

_tuning.TABLE["topk"] = {
    "default": (
        ({"neurons": 512, "k": 64}, {"TILE": 512, "PROGRAMS": 64, "num_warps": 1}),
        ({"neurons": 4096, "k": 64}, {"TILE": 1024, "PROGRAMS": 32, "num_warps": 1}),
        ({"k": 64}, {"TILE": 512, "PROGRAMS": 32, "num_warps": 1}),
        ({}, {"TILE": 2048, "PROGRAMS": 32, "num_warps": 4}),
    )
}

# The Triton kernel keeps candidates for at most MAX_K; beyond it the torch path serves.
MAX_K = 256
# Keys below that of -inf: no neuron, and a neuron that the mask disallows.
NOTHING = tl.constexpr(-(2**31))
DISALLOWED = tl.constexpr(-(2**31) + 1)
NAN = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(0x7F800000)
LAST = tl.constexpr(2**31 - 1)  # the largest index
LEAST = tl.constexpr(-(2**63))


def topk(
    scores: Tensor,
    k: int,
    *,
    boost: Tensor | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> TopKOutput:
    """The k largest entries of each row: exact, descending, ties to the lower index.

    Negative winners keep their value; nn.TopK and linear_topk set them to 0.

    Args:
        scores: [.., R], floating. NaN counts as largest, -0.0 equals 0.0.
        k: entries to keep, 1..R.
        boost: [R], same dtype as scores. Selects on `scores * boost`, passes on `scores`.
        mask: [R] bool. Neurons that are False are not selected; where fewer than k are allowed, the
            slots left over have value 0 and the lowest disallowed indices.
        impl: "triton", "torch" or "reference"; by default the fastest for the device.

    Returns:
        TopKOutput with values [.., k] (dtype of scores, differentiable) and indices [.., k] int64,
        ordered by the selection key.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    _checks.floating("topk", scores=scores, boost=boost)
    if scores.dim() < 1:
        raise ValueError("topk: scores must have at least one dimension [.., R]")
    neurons = scores.shape[-1]
    _checks.active_range("topk", k, neurons)
    _checks.shape("topk", "boost", boost, (neurons,))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"topk: mask has dtype {mask.dtype}; use torch.bool")
        _checks.shape("topk", "mask", mask, (neurons,))
        _checks.same_device("topk", "scores", scores, "mask", mask)
    serve = _dispatch.choose("topk", impl, scores, served=k <= MAX_K)
    return serve(scores, k, boost=boost, mask=mask)


def _torch(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    if mask is not None or scores.shape[-1] == k:
        return reference.topk(scores, k, boost=boost, mask=mask)
    keys = scores.detach().to(reference.accumulation_dtype(scores.dtype))
    if boost is not None:
        keys = keys * boost.to(keys.dtype)
    indices = select(keys, k)
    return TopKOutput(scores.gather(-1, indices), indices)


def select(keys: Tensor, k: int) -> Tensor:
    """reference.select by torch.topk; keys [.., R], or the transpose of [R, B] -> [.., k] int64."""
    if keys.shape[-1] == k:
        return reference.select(keys, k)
    flat = _dispatch.flattened(keys.detach())
    values, indices = _cpu_groups.largest(flat, k + 1)
    chosen = indices[:, :k].contiguous()
    rows = (~(values[:, :k] > values[:, 1:]).all(1)).nonzero().squeeze(1)
    if len(rows):
        # torch.topk breaks ties arbitrarily. Sorting corrects a tie among the k; the specification
        # ranks a row again if its k-th and (k+1)-th keys tie, or if it holds NaN.
        by_index, values = chosen[rows].sort(dim=-1).values, values[rows]
        tied = flat[rows.unsqueeze(1), by_index] + 0.0
        order = tied.sort(dim=-1, descending=True, stable=True).indices
        chosen[rows] = by_index.gather(-1, order)
        rows = rows[~(values[:, k - 1] > values[:, k]) | values[:, 0].isnan()]
        chosen[rows] = reference.select(flat[rows], k)
    return chosen.view(*keys.shape[:-1], k)


# The Triton path reads a row once, tile by tile and one tile ahead (measured on one H100: 2.1 ms in
# place of 3.8 at B = 8,192, R = 131,072). It appends to a small buffer every entry above `floor`, a
# proven lower bound of the k-th key. A buffer that would overflow is cut to its k best; if one tile
# alone overflows it, as the first does, bisection on the tile raises the floor. A random row of R
# has about k (1 + ln(R / k)) entries above a running k-th, so cuts are rare. Most tiles cost their
# loads and a maximum. A tile whose maximum exceeds the floor is read again, from the cache, and its
# entries are compared one by one; keys are built of the appended entries, or of all where the floor
# is raised. Entries of the buffer, packed (key, ~index), are distinct. So the rank of an entry is
# the number of larger ones, and the outcome is exact whatever the order of execution.


@jit
def _ordered(x):
    """fp32 -> int32 of the same order; -0.0 equals 0.0, NaN is largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, -(2**31) - bits, bits), NAN)


@jit
def _compared(loaded, boost, neuron, inside, IS_KEY: tl.constexpr, BOOST: tl.constexpr):
    """What selects: keys, or scores times boost in fp32."""
    x = loaded
    if not IS_KEY:
        x = x.to(tl.float32)
        if BOOST:
            x *= tl.load(boost + neuron, mask=inside, other=1).to(tl.float32)
    return x


@jit
def _keys(x, permitted, inside, IS_KEY: tl.constexpr, MASK: tl.constexpr):
    key = x
    if not IS_KEY:
        key = _ordered(x)
        if MASK:
            key = tl.where(permitted, key, DISALLOWED)
    return tl.where(inside, key, NOTHING)


@jit
def _permitted(allowed, neuron, inside, MASK: tl.constexpr):
    permitted = inside
    if MASK:
        permitted = tl.load(allowed + neuron, mask=inside, other=0) != 0
    return permitted


@jit
def _ranked(buffer, held, CAPACITY: tl.constexpr, STEP: tl.constexpr):
    """The packed entries of the buffer and the rank of each; empty places come last."""
    slot = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # the appends of other threads
    packed = tl.load(buffer + slot, mask=slot < held, other=LEAST)
    rank = tl.zeros([CAPACITY], tl.int32)
    start = 0
    while start < held:
        other = start + tl.arange(0, STEP)
        rival = tl.load(buffer + other, mask=other < held, other=LEAST)
        rank += tl.sum((rival[:, None] > packed[None, :]).to(tl.int32), axis=0)
        start += STEP
    tl.debug_barrier()  # before anyone appends again
    return packed, tl.where(slot < held, rank, slot)


@jit
def _bisect(key, k, low, room):
    """A floor at or below the k-th key: at most `room` keys reach it, or it is the k-th key."""
    high = tl.max(key)
    found = tl.sum((key >= low).to(tl.int32))
    while (found > room) & (low < high):
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((key >= middle).to(tl.int32))
        if reached >= k:
            low = middle
            found = reached
        else:
            high = middle - 1
    return low, found


@jit
def _best(key, early, k, low, room):
    """A floor as in _bisect, found, and the keys; of too many that tie with it the latest go."""
    floor, found = _bisect(key, k, low, room)
    if found > room:
        # The floor is the k-th key: `early`, an index ^ LAST, decides.
        places = k - tl.sum((key > floor).to(tl.int32))
        tied = tl.where(key == floor, early, NOTHING)
        least, _ = _bisect(tied, places, tl.minimum(places, 0), places)
        key = tl.where((key == floor) & (tied < least), NOTHING, key)
        found = k
    return floor, found, key


@jit
def _cut(buffer, held, k, floor, CAPACITY: tl.constexpr):
    """Leaves the k best of at least k entries in the buffer; the floor is the key of the k-th."""
    slot = tl.arange(0, CAPACITY)
    tl.debug_barrier()  # the appends of other threads
    packed = tl.load(buffer + slot, mask=slot < held, other=LEAST)
    key = (packed >> 32).to(tl.int32)
    floor, _, key = _best(key, (packed & LAST).to(tl.int32), k, floor, k)
    keep = key >= floor
    tl.debug_barrier()  # before anyone overwrites what another has yet to load
    tl.store(buffer + tl.cumsum(keep.to(tl.int32), 0) - 1, packed, mask=keep)
    return floor


@jit
def _limit(floor):
    """x, for which a key exceeds floor where not (score <= x); NaN if no number is such an x."""
    bits = tl.where(floor < 0, -(2**31) - floor, floor)
    x = bits.to(tl.float32, bitcast=True)
    return tl.where((floor >= -INFINITY) & (floor <= INFINITY), x, float("nan"))


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _read(source, row, stride, neuron, neurons, WHOLE: tl.constexpr, IS_KEY: tl.constexpr):
    """A tile of a row; what lies beyond the row is less than any other."""
    start = source + row.to(tl.int64) * stride
    if WHOLE:
        loaded = tl.load(start + neuron)
    elif IS_KEY:
        loaded = tl.load(start + neuron, mask=neuron < neurons, other=NOTHING)
    else:
        loaded = tl.load(start + neuron, mask=neuron < neurons, other=float("-inf"))
    return loaded


@jit
def _marks(keep, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A bit for every entry of a tile that a thread holds, [LANES], and how many of them are 1."""
    ROWS: tl.constexpr = keep.shape[0] // (LANES * VECTOR)
    row = tl.arange(0, ROWS)[:, None, None] * VECTOR
    number = row + tl.arange(0, VECTOR)[None, None, :]
    kept = tl.reshape(keep.to(tl.int32), [ROWS, LANES, VECTOR])
    bits = tl.sum(tl.sum(kept << number, axis=2), axis=0)
    # LLVM knows this for the instruction that counts them.
    x = bits.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return bits, ((x * 0x01010101) >> 24).to(tl.int32)


@jit(
    do_not_specialize=["k", "tasks", "part_tiles"],
    do_not_specialize_on_alignment=["buffer", "boost", "allowed"],
)
def _select_kernel(
    source,  # [B, R]: scores, or int32 keys
    boost,  # [R]
    allowed,  # [R]
    origin,  # [B, R] int32: the index that a key stands for
    scores,  # [B, ..]: where the values come from
    buffer,  # [programs, CAPACITY] int64
    values,  # [B, parts, k]: values of scores, or int32 keys
    indices,  # [B, parts, k]
    k,
    tasks,  # B * parts
    neurons,
    source_stride,
    scores_stride,
    tiles,
    parts,
    part_tiles,  # no part is empty
    FROM_KEYS: tl.constexpr,
    TO_KEYS: tl.constexpr,
    BOOST: tl.constexpr,
    MASK: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches beyond R
    WAYS: tl.constexpr,  # groups of the first bound, at least k
    CAPACITY: tl.constexpr,  # places in the buffer, at least 2 k
    TILE: tl.constexpr,
    LANES: tl.constexpr,  # threads
    VECTOR: tl.constexpr,  # neighbours that a thread loads at a time
    COLUMNS: tl.constexpr,  # groups of the tile, a multiple of WAYS
    STEP: tl.constexpr,  # entries that are ranked against the buffer at a time
):
    lane = tl.arange(0, TILE)
    buffer += tl.program_id(0) * CAPACITY
    task = tl.program_id(0)
    first = (task % parts) * part_tiles * TILE + lane
    loaded = _read(source, task // parts, source_stride, first, neurons, WHOLE, FROM_KEYS)
    while task < tasks:
        row = (task // parts).to(tl.int64)
        begin = (task % parts) * part_tiles
        end = tl.minimum(begin + part_tiles, tiles)
        held = 0
        floor = NOTHING
        limit = _limit(NOTHING)
        tile = begin
        while tile < end:
            neuron = tile * TILE + lane
            # One comparison a thread, and a NaN wins it: most tiles have no entry above the floor.
            x = _compared(loaded, boost, neuron, neuron < neurons, FROM_KEYS, BOOST)
            x = tl.reshape(x, [TILE // (LANES * VECTOR), LANES, VECTOR])
            if FROM_KEYS:
                hot = tl.max(tl.max(x, axis=2), axis=0) > floor
            else:
                hot = ~(tl.reduce(tl.reduce(x, 2, _larger), 0, _larger) <= limit)
            # The tile after this one, of the next task at the end, is on its way meanwhile.
            last = tile + 1 == end
            next_task = tl.where(last, tl.minimum(task + tl.num_programs(0), tasks - 1), task)
            next_tile = tl.where(last, (next_task % parts) * part_tiles, tile + 1)
            ahead = next_tile * TILE + lane
            loaded = _read(
                source, next_task // parts, source_stride, ahead, neurons, WHOLE, FROM_KEYS
            )
            if tl.max(hot.to(tl.int32)) > 0:
                # Read again, from the cache: to keep every tile costs registers and moves.
                inside = neuron < neurons
                entry = _read(source, row, source_stride, neuron, neurons, WHOLE, FROM_KEYS)
                entry = _compared(entry, boost, neuron, inside, FROM_KEYS, BOOST)
                permitted = _permitted(allowed, neuron, inside, MASK and not FROM_KEYS)
                if FROM_KEYS:
                    unsure = False
                    above = entry > floor
                else:
                    unsure = limit != limit
                    above = ~(entry <= limit)
                    if MASK:
                        above &= permitted
                bits, count = _marks(above, LANES, VECTOR)
                found = tl.sum(count)
                if (held + found > CAPACITY) | unsure:
                    key = _keys(entry, permitted, inside, FROM_KEYS, MASK)
                    found = tl.sum((key > floor).to(tl.int32))
                    if held + found > CAPACITY and held >= k:
                        floor = _cut(buffer, held, k, floor, CAPACITY)
                        held = k
                        found = tl.sum((key > floor).to(tl.int32))
                    append_above = floor
                    if held + found > CAPACITY:
                        # Each of WAYS >= k groups has an entry at or above the least maximum.
                        maxima = tl.max(tl.reshape(key, [TILE // COLUMNS, COLUMNS]), axis=0)
                        maxima = tl.max(tl.reshape(maxima, [COLUMNS // WAYS, WAYS]), axis=0)
                        low = tl.maximum(tl.min(maxima), floor + 1)
                        floor, found, key = _best(key, neuron ^ LAST, k, low, CAPACITY - held)
                        append_above = floor - 1
                    bits, count = _marks(key > append_above, LANES, VECTOR)
                    limit = _limit(floor)
                # Each thread appends what it holds, one entry a turn; few hold more than one.
                place = held + tl.cumsum(count, 0) - count
                turns = tl.max(count)
                while turns > 0:
                    lowest = bits & -bits
                    number = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
                    chosen = tile * TILE + tl.arange(0, LANES) * VECTOR
                    chosen += number + (number & -VECTOR) * (LANES - 1)
                    here = bits != 0
                    its_x = tl.load(source + row * source_stride + chosen, mask=here, other=0)
                    its_x = _compared(its_x, boost, chosen, here, FROM_KEYS, BOOST)
                    may = _permitted(allowed, chosen, here, MASK and not FROM_KEYS)
                    its_key = _keys(its_x, may, here, FROM_KEYS, MASK)
                    its_entry = (its_key.to(tl.int64) << 32) | (chosen ^ LAST).to(tl.int64)
                    tl.store(buffer + place, its_entry, mask=here)
                    bits ^= lowest
                    place += 1
                    turns -= 1
                held += found
            tile += 1
        # Older Tritons mix up a name of this loop with the same name inside an `if` above.
        best, place_of = _ranked(buffer, held, CAPACITY, STEP)
        best_key = (best >> 32).to(tl.int32)
        index = (best & LAST).to(tl.int32) ^ LAST
        out = task.to(tl.int64) * k + place_of
        wanted = place_of < k
        if FROM_KEYS:
            index = tl.load(origin + row * source_stride + index, mask=wanted, other=0)
        if TO_KEYS:
            tl.store(values + out, best_key, mask=wanted)
        else:
            value = tl.load(scores + row * scores_stride + index, mask=wanted, other=0)
            if MASK:
                value = tl.where(best_key == DISALLOWED, 0.0, value)
            tl.store(values + out, value, mask=wanted)
        tl.store(indices + out, index, mask=wanted)
        task += tl.num_programs(0)


def _like(scores: Tensor, k: int, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@_op.operator("ssd_kernels::topk", _like)
def select_triton(
    scores: Tensor, k: int, boost: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """topk of scores [B, R] for k <= MAX_K, without autograd: values, indices [B, k].

    Allocates O(B k) and a buffer per resident program; reads no value on the host.
    """
    batch, neurons = scores.shape
    values, indices = _like(scores, k)
    if batch == 0:
        return values, indices
    scores = scores.detach()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    boost = None if boost is None else boost.detach().contiguous()
    mask = None if mask is None else mask.contiguous()
    parts = _parts(batch, neurons, k, scores.device)
    if parts == 1:
        _launch(scores, None, scores, boost, mask, values, indices, k, parts)
        return values, indices
    # Few long rows: every part keeps its k best, and a second launch selects from those. Parts are
    # in index order, and so are ties inside a part, so positions break ties as indices do.
    keys = torch.empty(batch, parts * k, dtype=torch.int32, device=scores.device)
    origin = torch.empty_like(keys)
    _launch(scores, None, scores, boost, mask, keys, origin, k, parts)
    _launch(keys, origin, scores, None, mask, values, indices, k, 1)
    return values, indices


def _parts(batch: int, neurons: int, k: int, device: torch.device) -> int:
    """Programs per row; more than one where the rows alone do not fill the chip."""
    chosen = _tuning.config("topk", device, neurons=neurons, k=k)
    tiles = _ceil_div(neurons, chosen["TILE"])
    multiprocessors = _tuning.multiprocessors(device)
    if tiles < 8 or batch >= 2 * multiprocessors:
        return 1
    return _ceil_div(tiles, _ceil_div(tiles, min(tiles, 8 * multiprocessors // batch)))


def _launch(
    source: Tensor,
    origin: Tensor | None,
    scores: Tensor,
    boost: Tensor | None,
    mask: Tensor | None,
    values: Tensor,
    indices: Tensor,
    k: int,
    parts: int,
) -> None:
    batch, neurons = source.shape
    device = source.device
    chosen = _tuning.config("topk", device, neurons=neurons, k=k)
    tiles = _ceil_div(neurons, chosen["TILE"])
    part_tiles = _ceil_div(tiles, parts)
    programs = min(batch * parts, _tuning.multiprocessors(device) * chosen["PROGRAMS"])
    warps = chosen["num_warps"]
    if chosen["TILE"] > 512 * warps and not (boost is None and mask is None):
        warps *= 2  # 32 scores, boosts and marks a thread are more than the registers hold
    aligned = source.data_ptr() % 16 == 0 and source.stride(0) % 16 == 0
    blocks = _blocks(k, chosen["TILE"], 32 * warps, 16 // source.itemsize if aligned else 1)
    buffer = torch.empty(programs, blocks["CAPACITY"], dtype=torch.int64, device=device)
    with torch.cuda.device_of(source):
        _select_kernel[(programs,)](
            source,
            source if boost is None else boost,
            source if mask is None else mask.view(torch.uint8),
            source if origin is None else origin,
            scores,
            buffer,
            values,
            indices,
            k,
            batch * parts,
            neurons,
            source.stride(0),
            scores.stride(0),
            tiles,
            parts,
            part_tiles,
            FROM_KEYS=origin is not None,
            TO_KEYS=values.dtype == torch.int32,
            BOOST=boost is not None,
            MASK=mask is not None,
            WHOLE=neurons % chosen["TILE"] == 0,
            **blocks,
            num_warps=warps,
        )


def _blocks(k: int, tile: int, lanes: int, vector: int) -> dict[str, int]:
    ways = max(32, 1 << (k - 1).bit_length())
    vector = min(vector, tile // lanes)
    return {
        "WAYS": ways,
        "CAPACITY": 2 * ways,
        "TILE": tile,
        "LANES": lanes,
        "VECTOR": vector,
        "COLUMNS": max(ways, lanes * vector),
        "STEP": max(2, min(8, 8 * lanes // ways)),
    }


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, k: int, boost: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values, indices = select_triton(scores, k, boost, mask)
        ctx.save_for_backward(indices, mask)
        ctx.shape = scores.shape
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: None) -> tuple[Any, ...]:
        indices, mask = ctx.saved_tensors
        if mask is not None:
            grad_values = torch.where(mask[indices], grad_values, 0.0)
        # The indices of a row are distinct: each entry is written at most once.
        grad = grad_values.new_zeros(ctx.shape).scatter(1, indices, grad_values)
        return grad, None, None, None


def _triton(
    scores: Tensor, k: int, *, boost: Tensor | None = None, mask: Tensor | None = None
) -> TopKOutput:
    flat = _dispatch.flattened(scores)
    if flat.requires_grad and torch.is_grad_enabled():
        values, indices = _TopK.apply(flat, k, boost, mask)
    else:
        values, indices = select_triton(flat, k, boost, mask)
    shape = (*scores.shape[:-1], k)
    return TopKOutput(_dispatch.unflattened(values, shape), indices.view(shape))


_dispatch.register("topk", reference=reference.topk, torch=_torch, triton=_triton)
