"""Times launch configurations of ssd_kernels on this GPU, for the rows of _tuning.TABLE.

    python benchmarks/tune.py [topk] [encoder] [decode] [walk] [--out FILE.txt]

A line a configuration, fastest first; the present row of the table is marked. Results pass the gate
of topk_bench, or the line says WRONG.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import cases, gate, record, timing
from benchmarks.providers import Shape
from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.storage.lock import file_lock
from ssd.storage.provenance import commit, installed
from ssd_kernels import _encoder as encoder
from ssd_kernels import _tuning, reference
from ssd_kernels.sparse_linear import gather_triton, gradients_triton
from ssd_kernels.topk import select_triton

DEVICE = torch.device("cuda")
PROCESSES = 12  # that compile
SECONDS = 0.05  # of timing, a configuration
FP32, BF16 = torch.float32, torch.bfloat16
Results = tuple[Any, ...]
# Part of the command line -> what is timed, on the inputs of the benchmark's case.
PARTS: dict[str, Callable[[Any, int], Results]] = {
    "topk": lambda scores, k: select_triton(scores, k)[:2],
    "encoder": lambda given, k: encoder.code(*given[:3], k, "mask", None, 1)[:2],
    "decode": lambda given, k: (gather_triton(*given[:3]),),
    "walk": lambda given, k: gradients_triton(given[4], *given[:3], True, True, ())[:2],
}


@dataclass(frozen=True)
class Problem:
    """What is timed for a row of the table, and the configurations that may stand there."""

    part: str  # of PARTS
    op: str  # in _tuning.TABLE
    shape: Shape
    bounds: dict[str, int]  # as _tuning.config takes them
    candidates: tuple[_tuning.Config, ...]


def _candidates(names: str, *choices: tuple[tuple[int, ...], ...]) -> tuple[_tuning.Config, ...]:
    """All combinations of the choices, each of which gives the values of some of the names."""
    return tuple(
        dict(zip(names.split(), sum(parts, ()), strict=True)) for parts in product(*choices)
    )


def _topk(batch: int, neurons: int, k: int, dtype: torch.dtype) -> Problem:
    tiles = ((512, 1), (1024, 1), (1024, 2), (1024, 4), (2048, 2), (2048, 4), (4096, 2), (4096, 4))
    fitting = tuple(tile for tile in tiles if tile[0] <= max(512, neurons))
    programs = ((64 if neurons <= 1024 else 32,),)
    shape = Shape("topk", "forward", dtype, {"B": batch, "R": neurons, "k": k})
    candidates = _candidates("PROGRAMS TILE num_warps", programs, fitting)
    return Problem("topk", "topk", shape, {"neurons": neurons, "k": k}, candidates)


# The encoder's tiles (BM BN BK num_warps), and how its product walks over them, by whether rows are
# aligned (DESCRIPTORS PERSISTENT TOGETHER num_stages).
SMALL = ((64, 32, 64, 4), (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 64, 64, 8))
LARGE = (
    (128, 128, 32, 8),
    (128, 128, 64, 4),
    (128, 128, 64, 8),
    (128, 256, 64, 8),
    (256, 128, 64, 8),
)
UNALIGNED = ((0, 0, 64, 3), (0, 0, 8, 3), (0, 0, 64, 4))
ALIGNED = ((1, 1, 8, 3), (1, 1, 8, 4), (1, 0, 64, 3), (1, 0, 64, 4), (0, 0, 64, 3))


def _encoder(
    batch: int, d: int, neurons: int, k: int, dtype: torch.dtype, aligned: int = 1
) -> Problem:
    names = "DESCRIPTORS PERSISTENT TOGETHER num_stages BM BN BK num_warps"
    candidates = _candidates(
        names, ALIGNED if aligned else UNALIGNED, SMALL if batch <= 128 else LARGE
    )
    shape = Shape("linear_topk", "forward", dtype, {"B": batch, "d": d, "R": neurons, "k": k})
    bounds = {"batch": batch, "aligned": aligned}
    return Problem("encoder", "linear_topk", shape, bounds, candidates)


def _rows(part: str, batch: int, neurons: int, k: int, width: int, dtype: torch.dtype) -> Problem:
    decodes = part == "decode"
    blocks = ((256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))
    fitting = tuple(block for block in blocks if block[0] <= max(256, width))
    slots = ((4,), (8,), (16,)) if decodes else ((2,), (4,), (8,))
    mode, op, bound = (
        ("forward", "sparse_linear", "outputs") if decodes else ("full", "segments", "width")
    )
    shape = Shape("sparse_linear", mode, dtype, {"B": batch, "R": neurons, "k": k, "C": width})
    candidates = _candidates("BLOCK num_warps SLOTS", fitting, slots)
    return Problem(part, op, shape, {bound: width}, candidates)


PROBLEMS = (
    _topk(8192, 131072, 64, FP32),
    _topk(8192, 131072, 64, BF16),
    *(_topk(65536, neurons, k, FP32) for neurons in (4096, 1024) for k in (10, 32)),
    _encoder(8192, 1024, 131072, 32, BF16),
    _encoder(8192, 1024, 65536, 32, FP32),
    _encoder(8192, 256, 10000, 10, FP32),
    _encoder(128, 256, 10000, 10, FP32),
    _encoder(8192, 1020, 65536, 32, BF16, aligned=0),
    *(
        _rows(part, *sizes)
        for part in ("decode", "walk")
        for sizes in (
            (8192, 65536, 64, 4096, BF16),
            (8192, 65536, 32, 1024, FP32),
            (8192, 10000, 10, 256, FP32),
        )
    ),
)


def inputs(shape: Shape) -> Any:
    return tree_map(torch.Tensor.detach, cases.build(shape, DEVICE).inputs())


def run(problem: Problem, chosen: _tuning.Config, given: Any) -> Results:
    _tuning.TABLE[problem.op] = {"default": (({}, chosen),)}
    return PARTS[problem.part](given, problem.shape.sizes["k"])


def error_of(problem: Problem, given: Any, results: Results) -> str:
    """What is wrong with results, or ""."""
    if problem.part == "topk":
        rows = gate.sample_rows(given)
        true = reference.topk(given[rows], problem.shape.sizes["k"])
        same = all(torch.equal(got[rows], t) for got, t in zip(results, true[:2], strict=True))
        return "" if same else "differs from the specification"  # in the order of ties too
    if problem.part == "walk":
        results = (gather_triton(*given[:3]), *results)
    result = results[0] if problem.part == "decode" else results
    return cases.build(problem.shape, DEVICE).check("ours", given, result)


def warm(job: tuple[Problem, _tuning.Config]) -> str:
    """Compiles a configuration on a small batch, in a process of its own; says what failed."""
    problem, chosen = job
    shape = problem.shape
    if problem.part != "encoder":  # which is compiled for the number of tiles too
        # As many rows as share no row out among several programs.
        shape = replace(shape, sizes=shape.sizes | {"B": 2 * _tuning.multiprocessors(DEVICE)})
    try:
        run(problem, chosen, inputs(shape))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{shape.title} {chosen}: {_said(error)}"
    return ""


def tune(problem: Problem, present: _tuning.Config, say: Callable[[str], None]) -> None:
    given, runs = inputs(problem.shape), {}
    for chosen in problem.candidates:
        name = " ".join(f"{key}={value}" for key, value in chosen.items())
        try:
            wrong = error_of(problem, given, run(problem, chosen, given))
        except Exception as error:
            say(f"  {name}: {_said(error)}")
            continue
        if wrong:
            say(f"  {name}: {wrong}: WRONG")
            continue
        mark = " (present row)" if chosen == present else ""
        runs[name + mark] = partial(run, problem, chosen, given)
    if problem.part == "topk":
        runs["torch.topk"] = lambda: torch.topk(given, problem.shape.sizes["k"])
    times, errors = timing.alternate(runs, SECONDS, DEVICE)
    for name, error in errors.items():
        say(f"  {name}: {_said(error)}")
    for name, taken in sorted(times.items(), key=lambda item: item[1].p50):
        say(f"  {taken.p50:8.3f} ms ({taken.p20:.3f} to {taken.p80:.3f})  {name}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--out", type=Path, help="text file (default: in benchmarks/results/<gpu>)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; run it on a machine with one")
    problems = [p for p in PROBLEMS if not options.parts or p.part in options.parts]
    present = [_tuning.config(p.op, DEVICE, **p.bounds) for p in problems]
    path = options.out or record.results_folder(DEVICE) / "tuning.txt"
    with file_lock(path), path.open("w", encoding="utf-8") as file:

        def say(line: str) -> None:
            for stream in (sys.stdout, file):
                print(line, file=stream, flush=True)

        versions = f"torch {torch.__version__}; triton {installed('triton')}; commit {commit()}"
        say(f"{record.device_name(DEVICE)}; {versions}")
        jobs = [(problem, chosen) for problem in problems for chosen in problem.candidates]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
            try:
                for failure in filter(None, pool.map(warm, jobs, chunksize=4)):
                    say(failure)
            except BrokenProcessPool:
                say("a compiling process died: the rest is compiled one by one")
        for problem, row in zip(problems, present, strict=True):
            say(f"{problem.part} ({problem.op}): {problem.shape.title}")
            tune(problem, row, say)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(exit_status(main))
