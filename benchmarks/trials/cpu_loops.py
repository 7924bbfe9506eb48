"""A trial: the element-wise parts of a step on a CPU in PyTorch, under torch.compile and in numba.

    OMP_NUM_THREADS=1 python benchmarks/trials/cpu_loops.py

Prints the least process time of a call in milliseconds, on one thread, each in turns. torch.compile
needs a C++ compiler; row_update has shapes that depend on values and is not compiled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from benchmarks.record import device_name, installed
from ssd.ops.dense_update import dense_update
from ssd.ops.distill_code import distill_code
from ssd_kernels import row_update
from ssd_kernels.reference import clip_scale

B, D, K, C, N, TURNS = 128, 256, 10, 10, 10, 200
Run = Callable[[], object]


def loss() -> dict[str, Run]:
    """Decode, cross entropy, both distillation terms and their gradients."""
    values, indices = torch.rand(B, K), torch.randint(1000, (B, K))
    decoder, labels = torch.rand(1000, C), torch.randint(C, (B,))
    positions = torch.arange(1000).clamp(max=N)
    given = values, indices, decoder, labels, torch.randn(B, C), torch.rand(B, N)
    options = {"positions": positions, "alpha": 0.7, "lam": 0.1, "temperature": 8.0,
               "weight": torch.full((B,), 1 / B)}  # fmt: skip
    compiled = torch.compile(distill_code, dynamic=False)
    return {
        "torch": lambda: distill_code(*given, **options, impl="torch"),
        "compiled": lambda: compiled(*given, **options, impl="torch"),
        "numba": lambda: distill_code(*given, **options, impl="numba"),
    }


def update(neurons: int) -> dict[str, Run]:
    """Clip, step, clamp and unit rows of a whole weight."""
    from ssd_kernels import _loops

    weights = [torch.rand(neurons, D), torch.rand(neurons, C)]
    gradients = [torch.randn_like(weight) for weight in weights]
    options = {"lr": 0.05, "max_norm": 1.0, "nonnegative": True, "normalize": (True, False)}
    every = torch.arange(neurons).numpy()

    def plain(first: Tensor, second: Tensor, slope: Tensor, other: Tensor) -> None:
        norm = (slope.square().sum() + other.square().sum()).sqrt()
        scale = 0.05 * clip_scale(norm, 1.0)
        moved = (first - scale * slope).clamp(min=0)
        length = moved.norm(dim=1, keepdim=True)
        first.copy_(moved / torch.where(length > 0, length, 1.0))
        second.copy_((second - scale * other).clamp(min=0))

    def loops() -> None:
        norm = sum(float(gradient.norm()) ** 2 for gradient in gradients) ** 0.5
        step = 0.05 * float(clip_scale(torch.tensor(norm), 1.0))
        for weight, gradient, scaled in zip(weights, gradients, (True, False), strict=True):
            _loops.move_rows(weight.numpy(), every, gradient.numpy(), step, True, scaled)

    compiled = torch.compile(plain, dynamic=False)
    return {
        "torch": lambda: dense_update(weights, gradients, **options, impl="torch"),
        "compiled": lambda: compiled(*weights, *gradients),
        "numba": loops,
    }


def inhibit(neurons: int) -> dict[str, Run]:
    """Graded inhibition, relu and counts of scores [R, B]."""
    from ssd_kernels import _loops

    scores, gaba, cut = torch.rand(neurons, B), torch.rand(neurons), torch.rand(B)
    counts, out = torch.zeros(neurons, dtype=torch.int64), torch.empty(neurons, B)
    nothing, who = torch.empty(0, 0), torch.empty(neurons, dtype=torch.int64)

    def plain(scores: Tensor, gaba: Tensor, cut: Tensor) -> None:
        out.copy_((scores - gaba.unsqueeze(1) * cut).relu())
        counts.add_((out > 0).sum(1))

    compiled = torch.compile(plain, dynamic=False)
    arrays = [t.numpy() for t in (scores, cut, gaba)]
    outputs = [t.numpy() for t in (out, nothing, who, counts)]
    return {
        "torch": lambda: plain(scores, gaba, cut),
        "compiled": lambda: compiled(scores, gaba, cut),
        "numba": lambda: _loops.inhibit(*arrays, False, True, False, *outputs),
    }


def rows(neurons: int) -> dict[str, Run]:
    """row_update of a code."""
    weights = [torch.rand(neurons, D), torch.rand(neurons, C)]
    factors = [torch.rand(B, K) for _ in weights]
    vectors = [torch.randn(B, weight.shape[1]) for weight in weights]
    given = weights, factors, vectors, torch.randint(neurons, (B, K))
    options = {"lr": 0.05, "max_norm": 1.0, "nonnegative": True, "normalize": (True, False)}
    return {
        impl: lambda impl=impl: row_update(*given, **options, impl=impl)
        for impl in ("torch", "numba")
    }


def main() -> None:
    torch.set_num_threads(1)
    versions = ", ".join(f"{name} {installed(name)}" for name in ("torch", "numba"))
    print(f"{device_name(torch.device('cpu'))}, 1 thread; {versions}")
    print("| part | PyTorch | torch.compile | numba |\n|---|---|---|---|")
    cases = {"loss": loss()}
    for neurons in (1000, 10_000):
        cases |= {
            f"{part.__name__}, R = {neurons:,}": part(neurons) for part in (update, inhibit, rows)
        }
    for name, runs in cases.items():
        least = dict.fromkeys(("torch", "compiled", "numba"), float("inf"))
        for turn in range(TURNS):
            for provider, run in runs.items():
                start = time.process_time_ns()
                run()
                taken = (time.process_time_ns() - start) / 1e6
                if turn >= 3:  # compiles before
                    least[provider] = min(least[provider], taken)
        shown = ["" if ms == float("inf") else f"{ms:.3f} ms" for ms in least.values()]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
