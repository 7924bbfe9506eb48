"""Times launch configurations of ssd_kernels on this GPU, for the rows of _tuning.TABLE.

    python benchmarks/tune.py [topk] [encoder] [decode] [walk] [--out FILE.txt]

A line a configuration, fastest first; the present row of the table is marked. Results of topk are
compared with the specification's and those of the encoder with fp64 on some rows, those of the
others with the first configuration's, up to the order of the sums.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import gate, record, timing
from ssd.cli import ArgumentParser, exit_status
from ssd.errors import UserError
from ssd.storage.lock import file_lock
from ssd_kernels import _encoder as encoder
from ssd_kernels import _tuning, reference
from ssd_kernels.sparse_linear import gather_triton, gradients_triton
from ssd_kernels.topk import select_triton

DEVICE = torch.device("cuda")
PROCESSES = 12  # that compile
SECONDS = 0.05  # of timing, a configuration
FP32, BF16 = torch.float32, torch.bfloat16
PARTS = ("topk", "encoder", "decode", "walk")
Results = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Problem:
    """An op's table row, what it is timed on, and what may stand in the row."""

    part: str  # of the command line
    op: str  # in _tuning.TABLE
    sizes: tuple[int, ...]
    dtype: torch.dtype
    bounds: dict[str, int]  # as _tuning.config takes them
    candidates: tuple[_tuning.Config, ...]

    @property
    def title(self) -> str:
        return (
            f"{self.part} ({self.op}) {list(self.sizes)} {str(self.dtype).removeprefix('torch.')}"
        )


def _topk(batch: int, neurons: int, k: int, dtype: torch.dtype) -> Problem:
    tiles = ((512, 1), (1024, 1), (1024, 2), (1024, 4), (2048, 2), (2048, 4), (4096, 2), (4096, 4))
    return Problem(
        "topk", "topk", (batch, neurons, k), dtype, {"neurons": neurons, "k": k},
        tuple({"TILE": tile, "PROGRAMS": 64 if neurons <= 1024 else 32, "num_warps": warps}
              for tile, warps in tiles if tile <= max(512, neurons)),
    )  # fmt: skip


# How the encoder's product walks over its tiles, by rows that are aligned or not, and the tiles.
PLACE = ("DESCRIPTORS", "PERSISTENT", "TOGETHER", "num_stages")
PLAIN = ((0, 0, 64, 3), (0, 0, 8, 3), (0, 0, 64, 4))
DESCRIBED = ((1, 1, 8, 3), (1, 1, 8, 4), (1, 0, 64, 3), (1, 0, 64, 4), (0, 0, 64, 3))
TILE = ("BM", "BN", "BK", "num_warps")
SMALL = ((64, 32, 64, 4), (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 64, 64, 8))
LARGE = ((128, 128, 32, 8), (128, 128, 64, 4), (128, 128, 64, 8), (128, 256, 64, 8),
         (256, 128, 64, 8))  # fmt: skip


def _encoder(
    batch: int, d: int, neurons: int, k: int, dtype: torch.dtype, aligned: int = 1
) -> Problem:
    tiles = SMALL if batch <= 128 else LARGE
    return Problem(
        "encoder", "linear_topk", (batch, neurons, k, d), dtype,
        {"batch": batch, "aligned": aligned},
        tuple(dict(zip(PLACE + TILE, place + tile, strict=True))
              for place in (DESCRIBED if aligned else PLAIN) for tile in tiles),
    )  # fmt: skip


def _rows(part: str, batch: int, neurons: int, k: int, width: int, dtype: torch.dtype) -> Problem:
    op, bound = ("sparse_linear", "outputs") if part == "decode" else ("segments", "width")
    blocks = ((256, 1), (256, 2), (256, 4), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))
    slots = (4, 8, 16) if part == "decode" else (2, 4, 8)
    return Problem(
        part, op, (batch, neurons, k, width), dtype, {bound: width},
        tuple({"SLOTS": s, "BLOCK": block, "num_warps": warps}
              for block, warps in blocks if block <= max(256, width) for s in slots),
    )  # fmt: skip


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


def inputs(problem: Problem, batch: int) -> tuple[Tensor, ...]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=DEVICE).to(problem.dtype)

    if problem.part == "topk":
        return (normal(batch, problem.sizes[1]),)
    _, neurons, k, width = problem.sizes
    if problem.part == "encoder":
        return normal(batch, width), normal(neurons, width), normal(neurons)
    indices = torch.randint(neurons, (batch, k), device=DEVICE)
    return normal(batch, k), indices, normal(neurons, width), normal(batch, width)


def run(problem: Problem, chosen: _tuning.Config, given: tuple[Tensor, ...]) -> Results:
    _tuning.TABLE[problem.op] = {"default": (({}, chosen),)}
    if problem.part == "topk":
        return select_triton(given[0], problem.sizes[2])
    if problem.part == "encoder":
        return encoder.code(*given, problem.sizes[2], "mask", None, 1)[:2]
    values, indices, weight, grad = given
    if problem.part == "decode":
        return (gather_triton(values, indices, weight),)
    return gradients_triton(grad, values, indices, weight, True, True, ())


def warm(job: tuple[Problem, _tuning.Config]) -> str:
    """Compiles a configuration on a small batch, in a process of its own."""
    problem, chosen = job
    try:
        # As many rows as share no row out among several programs. The encoder's kernels are
        # compiled for the number of tiles too.
        few = 2 * _tuning.multiprocessors(DEVICE)
        run(
            problem, chosen, inputs(problem, problem.sizes[0] if problem.part == "encoder" else few)
        )
        torch.cuda.synchronize()
    except Exception as error:
        return f"{problem.title} {chosen}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def tune(problem: Problem, present: _tuning.Config, say: Callable[[str], None]) -> None:
    given = inputs(problem, problem.sizes[0])
    expected: Results | None = None
    runs: dict[str, timing.Run] = {}
    for chosen in problem.candidates:
        name = " ".join(f"{key}={value}" for key, value in chosen.items())
        try:
            got = run(problem, chosen, given)
        except Exception as error:
            say(f"  {name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        expected = got if expected is None else expected
        if not _right(problem, given, got, expected):
            say(f"  {name}: WRONG")
            continue
        mark = " (present row)" if chosen == present else ""
        runs[name + mark] = lambda chosen=chosen: run(problem, chosen, given)  # type: ignore[misc]
    if problem.part == "topk":
        runs["torch.topk"] = lambda: torch.topk(given[0], problem.sizes[2])
    times, errors = timing.alternate(runs, SECONDS, DEVICE)
    for name, error in errors.items():
        say(f"  {name}: {type(error).__name__}: {str(error)[:200]}")
    for name, taken in sorted(times.items(), key=lambda item: item[1].p50):
        say(f"  {taken.p50:8.3f} ms ({taken.p20:.3f} to {taken.p80:.3f})  {name}")


def _right(problem: Problem, given: tuple[Tensor, ...], got: Results, expected: Results) -> bool:
    """Some rows are the specification's, or the results the expected ones."""
    if problem.part not in ("topk", "encoder"):
        return _same(got, expected)
    values, indices = got
    assert values is not None
    assert indices is not None
    if problem.part == "encoder":
        return not gate.linear_topk(*given, values, indices, rounded=False)
    rows = gate.sample_rows(given[0])
    true = reference.topk(given[0][rows], problem.sizes[2])
    return torch.equal(values[rows], true.values) and torch.equal(indices[rows], true.indices)


def _same(got: Results, expected: Results) -> bool:
    """Equal but for the order of the sums."""
    return not any(
        gate.close("", mine, true.double())
        for mine, true in zip(got, expected, strict=True)
        if mine is not None and true is not None
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them")
    parser.add_argument("--out", type=Path, help="text file (default benchmarks/results/<gpu>)")
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
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        say(f"{record.device_name(DEVICE)}; torch {torch.__version__}; "
            f"triton {record.installed('triton')}; commit {record.commit()}")  # fmt: skip
        jobs: list[Any] = [(p, c) for p in problems for c in p.candidates]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool:
            try:
                for failure in filter(None, pool.map(warm, jobs, chunksize=4)):
                    say(failure)
            except BrokenProcessPool:
                say("a compiling process died: the rest is compiled one by one")
        for problem, row in zip(problems, present, strict=True):
            say(problem.title)
            tune(problem, row, say)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(exit_status(main))
