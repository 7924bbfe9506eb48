"""Times and memory of a call, and the ceilings of the machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]
LEAST, MOST = 5, 300  # samples of a provider, whatever the time budget says
BATCH = 5  # calls between two synchronisations on CUDA


class Quantiles(NamedTuple):
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Roofline:
    """Measured in the same run: a large copy and a large matrix product in each dtype."""

    bandwidth: float  # bytes a second, read plus written
    compute: dict[torch.dtype, float]  # operations a second

    def floor_ms(self, size: int, operations: int, dtype: torch.dtype) -> float:
        """The shortest time in which so many bytes and operations can be done."""
        return 1e3 * max(size / self.bandwidth, operations / self.compute[dtype])


@dataclass(frozen=True)
class SelfTimed:
    """A run in another process, which returns the milliseconds of its calls."""

    sample: Callable[[], list[float]]

    def __call__(self) -> object:
        return self.sample()


def quantiles(samples: Sequence[float]) -> Quantiles:
    return Quantiles(*map(float, np.percentile(samples, [20, 50, 80])))


def alternate(
    runs: dict[str, Run], seconds: float, device: torch.device
) -> tuple[dict[str, Quantiles], dict[str, Exception]]:
    """Milliseconds of the runs, timed in turns, and the errors of those that raise.

    Turns spread a change of clocks or load over all runs. Their order is drawn anew each round,
    since a run finds the caches as its predecessor left them.

    Args:
        seconds: to spend on a run.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, Exception] = {}
    deadline = time.perf_counter() + seconds * len(runs)
    shuffle = random.Random(0)
    while samples:
        fewest = min(map(len, samples.values()))
        if fewest >= MOST or (fewest >= LEAST and time.perf_counter() > deadline):
            break
        for name in shuffle.sample(list(samples), len(samples)):
            try:
                samples[name] += sample(runs[name], device)
            except Exception as error:
                errors[name] = error
                del samples[name]
    return {name: quantiles(taken) for name, taken in samples.items()}, errors


def sample(run: Run, device: torch.device) -> list[float]:
    """Milliseconds of a call: one by the clock, or BATCH of them by CUDA events."""
    if isinstance(run, SelfTimed):
        return run.sample()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return [1e3 * (time.perf_counter() - start)]
    pairs = []
    for _ in range(BATCH):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Device memory that a call needs beyond its inputs and results; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    returned = torch.cuda.memory_allocated(device) - before
    results = result if isinstance(result, tuple | list) else [result]
    kept = sum(t.untyped_storage().nbytes() for t in results if isinstance(t, Tensor))
    return torch.cuda.max_memory_allocated(device) - before - min(returned, kept)


def roofline(device: torch.device, dtypes: Sequence[torch.dtype], seconds: float) -> Roofline:
    """The bandwidth and the speed of products of this machine, measured now."""
    large = device.type == "cuda"
    source = torch.empty(2**29 if large else 2**24, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    size = 8192 if large else 1024

    def taken(run: Run) -> float:
        run()
        times, errors = alternate({"": run}, seconds, device)
        if errors:
            raise errors[""]
        return times[""].p50 / 1e3

    def product_rate(dtype: torch.dtype) -> float:
        # Random data: on zeros a GPU draws less power and clocks higher.
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / taken(lambda: a @ b)

    bandwidth = 2 * source.nbytes / taken(lambda: target.copy_(source))
    return Roofline(bandwidth, {dtype: product_rate(dtype) for dtype in dtypes})
