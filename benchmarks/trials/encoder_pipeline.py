"""Trial: an encoder that stores group keys in place of scores; it shows what linear_topk can reach.

    python benchmarks/trials/encoder_pipeline.py

Two kernels. `product` writes for each group of neurons the largest score's key and the second
largest, the winner's position in the low bits of one of them. `select` takes a row's keys, finds
the (k+1)-th largest, and looks at the groups that reach it:

- "rescore": the floor is lowered by the error of the estimate, and whatever reaches it is scored
  again in fp32. Serves fp32 inputs (estimated in fp16), and 16-bit ones.
- "exact": for 16-bit inputs the key is the score. Only the groups whose second key may reach the
  floor too are scored again.

Lists are cut at CAPACITY, so this is no implementation: a row that holds more is reported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from benchmarks import record, timing
from ssd.cli import exit_status
from ssd.errors import UserError

DEVICE = torch.device("cuda")
CAPACITY = 512


@triton.jit
def _ordered(value):
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(2**31) - bits, bits)


@triton.jit
def _unordered(key):
    return tl.where(key < 0, -(2**31) - key, key).to(tl.float32, bitcast=True)


@triton.jit
def product(
    x,  # descriptor of [B, d]
    weight,  # descriptor of [R, d]
    bias,  # [R]
    best,  # [B, groups] int32
    second,  # [B, groups] int32
    rows,
    neurons,
    features,
    groups,
    EXACT: tl.constexpr,  # best is the score's key and second holds the position, or the reverse
    FLATTEN: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TOGETHER: tl.constexpr,  # row tiles that share a tile of weight in L2
):
    row_tiles = tl.cdiv(rows, BM)
    band = TOGETHER * tl.cdiv(neurons, BN)
    tiles = row_tiles * tl.cdiv(neurons, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        first = (tile // band) * TOGETHER
        height = tl.minimum(row_tiles - first, TOGETHER)
        row_tile = first + (tile % band) % height
        column_tile = (tile % band) // height
        total = tl.zeros([BM, BN], tl.float32)
        for start in tl.range(0, features, BK):
            a = x.load([row_tile * BM, start])
            b = weight.load([column_tile * BN, start])
            total = tl.dot(a, b.T, total)
        neuron = column_tile * BN + tl.arange(0, BN)
        inside = neuron < neurons
        total += tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
        key = tl.where(inside[None, :], _ordered(total), -(2**31))
        lane = tl.arange(0, GROUP)[None, None, :]
        key = tl.reshape(key, [BM, BN // GROUP, GROUP])
        if EXACT:
            top = tl.max(key, axis=2)
            position = tl.min(tl.where(key == top[:, :, None], lane, GROUP), axis=2)
            rest = tl.max(tl.where(lane == position[:, :, None], -(2**31), key), axis=2)
            rest = (rest & -GROUP) | position
        else:
            key = (key & -GROUP) | (GROUP - 1 - lane)
            top = tl.max(key, axis=2)
            rest = tl.max(tl.where(key == top[:, :, None], -(2**31), key), axis=2)
        row = row_tile * BM + tl.arange(0, BM)
        group = column_tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
        at = row.to(tl.int64)[:, None] * groups + group[None, :]
        kept = (row < rows)[:, None] & (group < groups)[None, :]
        tl.store(best + at, top, mask=kept)
        tl.store(second + at, rest, mask=kept)


@triton.jit
def _packed_scores(x, weight, bias, neuron, inside, features, stride, N: tl.constexpr,
                   BK: tl.constexpr):  # fmt: skip
    """(key, index) of the fp32 scores of some neurons for one row."""
    feature = tl.arange(0, BK)
    total = tl.zeros([N, BK], tl.float32)
    for start in range(0, features, BK):
        here = start + feature
        a = tl.load(x + here, mask=here < features, other=0.0).to(tl.float32)
        at = weight + neuron.to(tl.int64)[:, None] * stride + here[None, :]
        b = tl.load(at, mask=inside[:, None] & (here < features)[None, :], other=0.0)
        total += a[None, :] * b.to(tl.float32)
    score = tl.sum(total, axis=1) + tl.load(bias + neuron, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(inside, _ordered(score), -(2**31))
    return (key.to(tl.int64) << 32) | (neuron ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def select(
    x,
    weight,
    bias,
    best,
    second,
    slack,  # [B]: twice the error of an estimate
    listed,  # [B, CAPACITY] int32
    packed,  # [B, CAPACITY] int64
    values,  # [B, k]
    indices,  # [B, k]
    held,  # [B] int32
    k,
    groups,
    neurons,
    features,
    stride,
    EXACT: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CAP: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    packed += row * CAP
    listed += row * CAP
    group = tl.arange(0, GROUPS)
    at = row * groups + group
    top = tl.load(best + at, mask=group < groups, other=-(2**31))
    low = tl.min(top)
    high = tl.max(top)
    found = tl.sum((top >= low).to(tl.int32))
    while (found > k + 1) & (low < high):
        middle = (low | high) - ((low ^ high) >> 1)
        reached = tl.sum((top >= middle).to(tl.int32))
        if reached >= k + 1:
            low = middle
            found = reached
        else:
            high = middle - 1
    if EXACT:
        floor = low & -GROUP
        winner = top >= low
    else:
        floor = _ordered(_unordered(low & -GROUP) - tl.load(slack + row)) & -GROUP
        winner = top >= floor
    rest = tl.load(second + at, mask=winner, other=-(2**31))
    crowded = winner & ((rest & -GROUP) >= floor)
    single = winner & ((rest & -GROUP) < floor)
    if EXACT:
        neuron = group * GROUP + (rest & (GROUP - 1))
        count = tl.sum(single.to(tl.int32))
        place = tl.cumsum(single.to(tl.int32), 0) - 1
        entry = (top.to(tl.int64) << 32) | (neuron ^ 0x7FFFFFFF).to(tl.int64)
        tl.store(packed + place, entry, mask=single & (place < CAP))
        done = -1
        lane = tl.arange(0, N)
        for _ in range(tl.sum(crowded.to(tl.int32))):
            done = tl.min(tl.where(crowded & (group > done), group, GROUPS))
            for member in range(0, GROUP, N):
                near = done * GROUP + member + lane
                scored = _packed_scores(
                    x, weight, bias, near, near < neurons, features, stride, N, BK
                )
                tl.store(packed + count + lane, scored, mask=count + lane < CAP)
                count += N
        held_now = count
    else:
        take = tl.where(crowded, GROUP, single.to(tl.int32))
        place = tl.cumsum(take, 0) - take
        held_now = tl.sum(take)
        neuron = group * GROUP + (GROUP - 1 - (top & (GROUP - 1)))
        tl.store(listed + place, neuron, mask=single & (place < CAP))
        if tl.sum(crowded.to(tl.int32)) > 0:
            for member in range(GROUP):
                fits = crowded & (place + member < CAP)
                tl.store(listed + place + member, group * GROUP + member, mask=fits)
        tl.debug_barrier()
        start = 0
        while start < tl.minimum(held_now, CAP):
            lane = start + tl.arange(0, N)
            inside = lane < tl.minimum(held_now, CAP)
            near = tl.load(listed + lane, mask=inside, other=0)
            scored = _packed_scores(
                x, weight, bias, near, inside & (near < neurons), features, stride, N, BK
            )
            tl.store(packed + lane, scored, mask=inside)
            start += N
    tl.store(held + row, held_now)
    count = tl.minimum(held_now, CAP)
    tl.debug_barrier()
    slot = tl.arange(0, CAP)
    entry = tl.load(packed + slot, mask=slot < count, other=-(2**63))
    rank = tl.zeros([CAP], tl.int32)
    start = 0
    while start < count:
        other = start + tl.arange(0, 8)
        rival = tl.load(packed + other, mask=other < count, other=-(2**63))
        rank += tl.sum((rival[:, None] > entry[None, :]).to(tl.int32), axis=0)
        start += 8
    chosen = (rank < k) & (slot < count)
    value = _unordered((entry >> 32).to(tl.int32))
    tl.store(values + row * k + rank, tl.where(value <= 0, 0.0, value), mask=chosen)
    index = (entry & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF
    tl.store(indices + row * k + rank, index.to(tl.int64), mask=chosen)


def slack(x: Tensor, weight: Tensor, estimated: bool) -> Tensor:
    """Twice the error of a score: of fp16 factors, if estimated, and of the order of the sum."""
    features = x.shape[1]
    share = features * 2.0**-22
    if estimated:
        share = 2 * share + 2.0**-10 + 2.0**-22
    return 2 * share * x.float().norm(dim=1) * weight.float().norm(dim=1).max()


def median(run: timing.Run) -> float:
    times, errors = timing.alternate({"": run}, 0.1, DEVICE)
    if errors:
        raise errors[""]
    return times[""].p50


def trial(batch: int, d: int, neurons: int, k: int, dtype: torch.dtype, group: int, exact: bool,
          flatten: bool = False, tile: tuple[int, ...] = (128, 256, 64, 8, 3)) -> str:  # fmt: skip
    torch.manual_seed(0)
    fp32 = dtype == torch.float32
    estimate = torch.float16 if fp32 else dtype
    x, weight, bias = (
        torch.randn(*size, device=DEVICE) for size in ((batch, d), (neurons, d), (neurons,))
    )
    x, weight = x.to(dtype), weight.to(dtype)
    coarse_x, coarse_weight = x.to(estimate), weight.to(estimate)
    bm, bn, bk, warps, stages = tile
    groups = triton.cdiv(neurons, group)

    def empty(kind: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(batch, *sizes, dtype=kind, device=DEVICE)

    best, second = empty(torch.int32, groups), empty(torch.int32, groups)
    values, indices = empty(torch.float32, k), empty(torch.int64, k)
    listed, packed = empty(torch.int32, CAPACITY), empty(torch.int64, CAPACITY)
    held = empty(torch.int32)
    width = slack(x, weight, fp32)
    ways: list[Any] = [TensorDescriptor.from_tensor(coarse_x, [bm, bk]),
                       TensorDescriptor.from_tensor(coarse_weight, [bn, bk])]  # fmt: skip
    tiles = triton.cdiv(batch, bm) * triton.cdiv(neurons, bn)
    programs = min(tiles, torch.cuda.get_device_properties(DEVICE).multi_processor_count)

    def multiply() -> Any:
        return product[(programs if flatten else tiles,)](
            *ways, bias, best, second, batch, neurons, d, groups, EXACT=exact, FLATTEN=flatten,
            GROUP=group, BM=bm, BN=bn, BK=bk, TOGETHER=8 if flatten else 64, num_warps=warps,
            num_stages=stages,
        )  # fmt: skip

    def choose() -> Any:
        return select[(batch,)](
            x, weight, bias, best, second, width, listed, packed, values, indices, held, k, groups,
            neurons, d, x.stride(0), EXACT=exact, GROUPS=triton.next_power_of_2(groups),
            GROUP=group, CAP=CAPACITY, N=16, BK=min(256, d), num_warps=4,
        )  # fmt: skip

    def both() -> None:
        multiply()
        choose()

    compiled = multiply(), choose()
    rows = torch.linspace(0, batch - 1, 64, device=DEVICE).long()
    true = (x[rows].double() @ weight.double().T + bias).topk(k)
    # Rounding of the scores, which grow with d.
    right = bool((values[rows] - true.values).abs().max() < 1e-3 * max(1.0, d / 1024))
    library = median(lambda: coarse_x @ coarse_weight.T)
    times = [median(run) for run in (multiply, choose, both)]
    return (
        f"B={batch} d={d} R={neurons} k={k} {str(dtype)[6:]} group {group} "
        f"{'exact' if exact else 'rescore'}{' persistent' if flatten else ''}: "
        f"library GEMM {library:.3f} ms, product {times[0]:.3f}, select {times[1]:.3f}, "
        f"both {times[2]:.3f} = {library / times[2]:.2f} of the GEMM's speed; "
        f"held mean {held.float().mean():.0f}, most {held.max()} of {CAPACITY}; "
        f"registers {compiled[0].n_regs} and {compiled[1].n_regs}, "
        f"spills {compiled[0].n_spills} and {compiled[1].n_spills}; {'right' if right else 'WRONG'}"
    )


def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; run it on a machine with one")
    print(f"{record.device_name(DEVICE)}; torch {torch.__version__}; triton {triton.__version__}; "
          f"commit {record.commit()}", flush=True)  # fmt: skip
    bf16, fp32 = torch.bfloat16, torch.float32
    for arguments in (
        (8192, 1024, 131072, 32, bf16, 64, True),
        (8192, 1024, 131072, 32, bf16, 64, True, True),
        (8192, 1024, 131072, 32, bf16, 32, True),
        (8192, 1024, 131072, 32, bf16, 64, False),
        (8192, 4096, 131072, 32, bf16, 64, True, True),
        (8192, 1024, 65536, 32, fp32, 32, False),
        (8192, 1024, 65536, 32, fp32, 32, False, True),
        (8192, 256, 10000, 10, fp32, 32, False),
        (1024, 256, 10000, 10, fp32, 32, False),
        (128, 256, 10000, 10, fp32, 32, False, False, (64, 64, 64, 4, 3)),
    ):
        try:
            print(trial(*arguments), flush=True)  # type: ignore[arg-type]
        except Exception as error:
            print(f"{arguments}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main, place=""))
