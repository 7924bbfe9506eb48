"""Runs every op and every implementation on small shapes against the specification in fp64.

    python scripts/smoke.py [--quick]     one line a case: ok, how wrong, or what was raised

A failure does not end it; if the GPU no longer answers, a new process runs the rest. --quick takes
fp32 alone, as compute-sanitizer needs it. Without a GPU the implementations for a CPU run, and with
TRITON_INTERPRET=1 Triton's too. Exit status: 1 if a case failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from ssd.cli import ArgumentParser, exit_status
from ssd_kernels import _dispatch
from tests.kernels.cases import Arguments, Draw, Op, Results, gradients
from tests.kernels.ops import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest error of a result over its largest entry: a few roundings of the dtype.
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case(NamedTuple):
    """A call of an op: what it is called, and what runs it."""

    op: str
    name: str
    run: Callable[[str, Draw], Results]
    half: bool = True  # whether 16-bit inputs are tried


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fp32 alone")
    begun = {"nargs": 2, "type": int, "default": (0, 0), "help": argparse.SUPPRESS}
    parser.add_argument("--from", dest="begun", metavar=("DONE", "WRONG"), **begun)
    given = parser.parse_args(arguments)
    quick, (skip, wrong) = given.quick, given.begun
    if skip and DEVICE.type != "cuda":
        print(f"cuda: the device is gone; {wrong} wrong of {skip}")
        return 1
    for number, (case, impl, dtype) in enumerate(_cases(quick)):
        if number < skip:
            continue
        start = time.perf_counter()
        found = _attempt(case, impl, dtype)
        seconds = time.perf_counter() - start
        title = f"{case.op + case.name:32} {impl:10} {str(dtype)[6:]:9}"
        print(f"{title} {seconds:5.1f} s  {found or 'ok'}", flush=True)
        wrong += bool(found)
        if not _answers():
            print("the GPU no longer answers: the rest runs in a new process", flush=True)
            again = [*["--quick"] * quick, "--from", str(number + 1), str(wrong)]
            os.execv(sys.executable, [sys.executable, __file__, *again])
    print(f"{DEVICE}: {wrong} wrong of {number + 1}")
    return 1 if wrong else 0


def _cases(quick: bool) -> Iterator[tuple[Case, str, torch.dtype]]:
    """What is run here: case, implementation, dtype."""
    interpreted, cpu = _dispatch.interpreted(), DEVICE.type == "cpu"
    runs_triton = interpreted or not cpu
    runs = {"reference": False, "torch": True, "triton": runs_triton, "numba": cpu}
    for case in CASES:
        for impl in filter(runs.get, _dispatch.TABLES[case.op]):
            dtypes = [torch.float32]
            if not quick and case.half and runs_triton and impl != "numba":
                dtypes.append(torch.float16)
                if not interpreted:  # the interpreter has no bfloat16
                    dtypes.append(torch.bfloat16)
            for dtype in dtypes:
                yield case, impl, dtype


def _attempt(case: Case, impl: str, dtype: torch.dtype) -> str:
    """ "" if every result is the specification's, else what is wrong."""
    try:
        got, true = (_run(case, name, dtype) for name in (impl, "reference"))
        pairs = enumerate(zip(got, true, strict=True))
        return "; ".join(filter(None, (_wrong(*pair) for pair in pairs)))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " | ".join(lines[:1] + lines[1:][-3:])
        return f"{type(error).__name__}: {said[:600]} ({Path(where.filename).name}:{where.lineno})"


def _run(case: Case, impl: str, dtype: torch.dtype) -> Results:
    """The reference computes in fp64 on the same, rounded inputs."""
    torch.manual_seed(0)

    return case.run(impl, Draw(DEVICE, dtype, wide=impl == "reference"))


def _results(op: Op, given: Arguments, impl: str, draw: Draw) -> Results:
    """What a call returns or writes, and the gradients of what it draws to be differentiated."""
    results = op.prepare(draw, given)(impl)
    return *results, *gradients(results, draw.leaves)


def _wrong(number: int, pair: tuple[Tensor | None, Tensor | None]) -> str:
    got, true = pair
    if got is None or true is None:
        return "" if got is true else f"result {number} is {got}, expected {true}"
    if got.shape != true.shape:
        return f"result {number} has shape {list(got.shape)}, expected {list(true.shape)}"
    if not got.dtype.is_floating_point:
        return "" if torch.equal(got, true) else f"result {number}: integers differ"
    scale = true.abs().max().clamp(min=1e-30)
    error = ((got.double() - true).abs().max() / scale).item()
    return "" if error <= TOLERANCE[got.dtype] else f"result {number} is off by {error:.2g}"


def _answers() -> bool:
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
    return True


CASES = [
    Case(name, f" {words}" if words else "", partial(_results, op, given), op.half)
    for name, op in OPS.items()
    for words, given in op.calls.items()
]


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
