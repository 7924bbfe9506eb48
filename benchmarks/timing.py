"""How times and memory are measured, and the two ceilings of the machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], object]
LEAST, MOST = 5, 300  # samples a provider, whatever the time budget says
BATCH = 5  # calls between two synchronisations on CUDA


@dataclass(frozen=True)
class Quantiles:
    """20th, 50th and 80th percentile of the milliseconds of a call."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Roofline:
    """Measured in the same run: a large copy and a large matrix product in each dtype."""

    bandwidth: float  # bytes a second, read plus written
    compute: dict[torch.dtype, float]  # operations a second

    def floor_ms(self, size: int, operations: int, dtype: torch.dtype) -> float:
        """The shortest time for so many bytes and operations."""
        return 1e3 * max(size / self.bandwidth, operations / self.compute[dtype])


@dataclass(frozen=True)
class SelfTimed:
    """A run that says itself how many milliseconds its calls took, in another process."""

    sample: Callable[[], list[float]]

    def __call__(self) -> object:
        return self.sample()


def alternate(
    runs: dict[str, Run], seconds: float, device: torch.device
) -> tuple[dict[str, Quantiles], dict[str, Exception]]:
    """Times the runs in turns, about `seconds` each; a run that raises is left out and reported.

    Turns spread a change of clocks or of the machine's load over all of them; their order is drawn
    anew each round, since a run finds the caches as the one before it left them.
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
    return {name: _quantiles(taken) for name, taken in samples.items()}, errors


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Device memory that a call needs beyond what it was given and what it returns."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    returned = torch.cuda.memory_allocated(device) - before
    kept = sum(t.untyped_storage().nbytes() for t in _tensors(result))
    return torch.cuda.max_memory_allocated(device) - before - min(returned, kept)


def roofline(device: torch.device, dtypes: tuple[torch.dtype, ...], seconds: float) -> Roofline:
    """The two ceilings of this machine, at this moment."""
    large = device.type == "cuda"
    source = torch.empty(2**29 if large else 2**24, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    taken = _median(lambda: target.copy_(source), seconds, device)
    compute = {dtype: _gemm_rate(8192 if large else 1024, dtype, seconds, device)
               for dtype in dtypes}  # fmt: skip
    return Roofline(2 * source.nbytes / taken, compute)


def _gemm_rate(size: int, dtype: torch.dtype, seconds: float, device: torch.device) -> float:
    # Random data: on zeros a GPU draws less power and clocks higher.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: a @ b, seconds, device)


def _median(run: Run, seconds: float, device: torch.device) -> float:
    run()
    quantiles, errors = alternate({"": run}, seconds, device)
    if errors:
        raise errors[""]
    return quantiles[""].p50 / 1e3


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


def _quantiles(samples: list[float]) -> Quantiles:
    cuts = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Quantiles(*cuts.tolist())


def _tensors(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for t in result if isinstance(t, Tensor)] if isinstance(result, tuple | list) else []
