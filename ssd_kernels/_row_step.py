"""The step of one row in the update kernels: clipped, projected SGD with momentum."""

# Kernels carry no annotations but tl.constexpr.
# mypy: allow-untyped-defs

from __future__ import annotations

from ssd_kernels._triton import jit, tl


@jit
def clip_scale(square, bound):
    """reference.clip_scale of the norm whose square this is."""
    bound = tl.minimum(bound, 3.4028234663852886e38)
    below = tl.sqrt(square).to(tl.float32) + 1e-6 * bound
    below = tl.maximum(below, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(bound / below, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def step_row(
    weight,  # [WIDTH]
    buffer,  # [WIDTH]
    gradient,  # [WIDTH] fp32
    spare,  # [WIDTH] fp32: holds a row of several blocks until its length is known
    scale,
    lr,
    momentum,
    WIDTH: tl.constexpr,
    CLAMP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    length = tl.full([], 0.0, tl.float64)  # in whose range squares of float32 are
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        direction = tl.load(gradient + column, mask=inside, other=0.0) * scale
        if MOMENTUM:
            before = tl.load(buffer + column, mask=inside, other=0.0).to(tl.float32)
            direction += momentum * before
            tl.store(buffer + column, direction, mask=inside)
        moved = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) - lr * direction
        if CLAMP:
            moved = tl.maximum(moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if NORMALIZE:
            moved = tl.where(inside, moved, 0.0)
            wide = moved.to(tl.float64)
            length += tl.sum(wide * wide)
            if WIDTH <= BLOCK:
                moved /= tl.where(length > 0, tl.sqrt(length), 1.0).to(tl.float32)
                tl.store(weight + column, moved, mask=inside)
            else:
                tl.store(spare + column, moved, mask=inside)
        else:
            tl.store(weight + column, moved, mask=inside)
    if NORMALIZE and WIDTH > BLOCK:
        tl.debug_barrier()  # a thread may read what another wrote
        size = tl.where(length > 0, tl.sqrt(length), 1.0).to(tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            moved = tl.load(spare + column, mask=inside, other=0.0)
            tl.store(weight + column, moved / size, mask=inside)
