"""Times launch configurations of ssd_kernels on this GPU, for the rows of _tuning.TABLE.

    python benchmarks/tune.py [topk] [encoder] [decode] [walk] [--out FILE.txt]

Prints one line per configuration, fastest first, and marks the present row of the table. A result
that fails the gate of topk_bench is marked WRONG.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable
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
from benchmarks.providers import Shape, shapes
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
SECONDS = 0.05  # of timing per configuration
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
    """A row of the tuning table, and the configurations that may stand there."""

    part: str  # of PARTS
    op: str  # in _tuning.TABLE
    shape: Shape
    bounds: dict[str, int]  # as _tuning.config takes them
    candidates: list[_tuning.Config]


# Width of a tile or block -> the numbers of warps that are tried for it.
TOPK_TILES = {512: (1,), 1024: (1, 2, 4), 2048: (2, 4), 4096: (2, 4)}
ROW_BLOCKS = {256: (1, 2, 4), 512: (1, 2), 1024: (2, 4), 2048: (4,)}
# The encoder's tiles (BM BN BK num_warps), and how its product walks over them (DESCRIPTORS
# PERSISTENT TOGETHER num_stages), by whether rows are aligned.
SMALL = ((64, 32, 64, 4), (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 64, 64, 8))
LARGE = (
    (128, 128, 32, 8),
    (128, 128, 64, 4),
    (128, 128, 64, 8),
    (128, 256, 64, 8),
    (256, 128, 64, 8),
)
WALKS = (
    ((0, 0, 64, 3), (0, 0, 8, 3), (0, 0, 64, 4)),
    ((1, 1, 8, 3), (1, 1, 8, 4), (1, 0, 64, 3), (1, 0, 64, 4), (0, 0, 64, 3)),
)
ALIGNMENT = 16  # bytes


def problem_of(shape: Shape) -> Problem:
    """The configurations to try on a shape."""
    sizes, op = shape.sizes, shape.op
    choices: tuple[Iterable[tuple[int, ...]], ...]  # values of some of the names each
    if op == "topk":
        part, bounds = "topk", {"neurons": sizes["R"], "k": sizes["k"]}
        names, programs = "PROGRAMS TILE num_warps", 64 if sizes["R"] <= 1024 else 32
        choices = ((programs,),), _fitting(TOPK_TILES, sizes["R"])
    elif op == "linear_topk":
        aligned = sizes["d"] * shape.dtype.itemsize % ALIGNMENT == 0
        part, bounds = "encoder", {"batch": sizes["B"], "aligned": int(aligned)}
        names = "DESCRIPTORS PERSISTENT TOGETHER num_stages BM BN BK num_warps"
        choices = WALKS[aligned], SMALL if sizes["B"] <= 128 else LARGE
    else:
        slots, names = ((4,), (8,), (16,)), "BLOCK num_warps SLOTS"
        part, bounds = "decode", {"outputs": sizes["C"]}
        if shape.mode == "full":
            slots = ((2,), (4,), (8,))
            part, op, bounds = "walk", "segments", {"width": sizes["C"]}
        choices = _fitting(ROW_BLOCKS, sizes["C"]), slots
    combined = (sum(values, ()) for values in product(*choices))
    candidates = [dict(zip(names.split(), values, strict=True)) for values in combined]
    return Problem(part, op, shape, bounds, candidates)


def _fitting(warps: dict[int, tuple[int, ...]], width: int) -> list[tuple[int, int]]:
    """(tile, warps) for the tiles of at most this width, and for the smallest."""
    return [(t, n) for t, numbers in warps.items() if t <= max(min(warps), width) for n in numbers]


PROBLEMS = [
    problem_of(shape)
    for shape in shapes("""
        topk           forward  float32   B=8192 R=131072 k=64
        topk           forward  bfloat16  B=8192 R=131072 k=64
        topk           forward  float32   B=65536 R=4096 k=10
        topk           forward  float32   B=65536 R=4096 k=32
        topk           forward  float32   B=65536 R=1024 k=10
        topk           forward  float32   B=65536 R=1024 k=32
        linear_topk    forward  bfloat16  B=8192 d=1024 R=131072 k=32
        linear_topk    forward  float32   B=8192 d=1024 R=65536 k=32
        linear_topk    forward  float32   B=8192 d=256 R=10000 k=10
        linear_topk    forward  float32   B=128 d=256 R=10000 k=10
        linear_topk    forward  bfloat16  B=8192 d=1020 R=65536 k=32
        sparse_linear  forward  bfloat16  B=8192 R=65536 k=64 C=4096
        sparse_linear  forward  float32   B=8192 R=65536 k=32 C=1024
        sparse_linear  forward  float32   B=8192 R=10000 k=10 C=256
        sparse_linear  full     bfloat16  B=8192 R=65536 k=64 C=4096
        sparse_linear  full     float32   B=8192 R=65536 k=32 C=1024
        sparse_linear  full     float32   B=8192 R=10000 k=10 C=256
    """)
]


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
    """Compiles a configuration on a small batch, in a process of its own; returns any error."""
    problem, chosen = job
    shape = problem.shape
    if problem.part != "encoder":  # which is compiled for the number of tiles too
        # So many rows that none is split among several programs.
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
