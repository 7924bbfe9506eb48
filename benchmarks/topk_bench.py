"""Measures every op of ssd_kernels beside PyTorch and the peers that are installed.

    python benchmarks/topk_bench.py [--quick] [--op OP] [--rows targets] [--budget SECONDS]

Without a GPU it measures small shapes on the CPU and says so. Rows go to
benchmarks/results/<gpu>/topk_bench.csv as they are measured, and a figure beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import bench, cases, peers, report, targets, timing
from benchmarks.providers import Case, Provider, Shape
from benchmarks.timing import Quantiles, Roofline, Run, quantiles
from ssd.cli import exit_status

MAX_SETS = 16
COMPILING = 15  # seconds that a case must have left for torch.compile to begin


class Kernels:
    """Measures cases until they are done or the time budget is spent."""

    def __init__(self, run: bench.Bench) -> None:
        self.bench, self.device, self.options = run, run.device, run.options
        self.say = run.console.print
        self.deadline = time.monotonic() + self.options.budget
        self.seconds = 0.01 if self.options.quick else 0.2
        self.lost = False  # the CUDA context
        self.wrong = 0  # providers of ours
        self.cut = 0  # cases and providers that the budget left out

    def measure_all(self, shapes: Sequence[Shape]) -> None:
        ceilings = self._roofline(list(dict.fromkeys(shape.dtype for shape in shapes)))
        for number, shape in enumerate(shapes):
            if time.monotonic() > self.deadline or self.lost:
                why = "the CUDA context is lost" if self.lost else "the time budget is spent"
                left = ", ".join(shape.title for shape in shapes[number:])
                self.say(f"[red]not measured, {why}:[/red] {left}")
                self.cut += len(shapes) - number
                return
            try:
                self.measure(cases.build(shape, self.device), ceilings)
            except Exception as error:
                self.say(f"[red]{shape.title}[/red] {escape(self._text(error))}")
            # Past eight compilations of one function torch.compile would fall back to eager.
            torch.compiler.reset()
            if self.bench.cuda and not self.lost:
                torch.cuda.empty_cache()

    def measure(self, case: Case, ceilings: Roofline) -> None:
        """Checks every provider of a case, then times those that are right, in turns."""
        sets, shape = self._sets(case), case.shape
        # A case that compiles slowly must not take the time of the others.
        end = min(self.deadline, time.monotonic() + self.options.budget / 8)
        runs: dict[str, Run] = {}
        memory: dict[str, int | None] = {}
        # The default and the baselines first, what compiles slowly last: the budget cuts the end.
        for name in sorted(case.providers, key=lambda n: ("(compile)" in n, n.startswith("ours:"))):
            compiles = "(compile)" in name
            if compiles and self.options.no_compile:
                continue
            if self.lost or time.monotonic() > end - (COMPILING if compiles else 0):
                self.say(f"{shape.title}: {name} not measured, the time budget is spent")
                self.cut += 1
                continue
            provider = case.providers[name]
            try:
                wrong = case.check(name, sets[0], provider(sets[0]))
                for given in sets[1:]:  # captures and compiles before the timing
                    provider(given)
                run = _rotating(provider, sets)
                # A graph allocates when it is captured, not when it is replayed.
                measured = "(graph)" not in name
                memory[name] = timing.peak_extra_bytes(run, self.device) if measured else None
            except Exception as error:
                wrong = self._text(error)
            if wrong:
                self._reject(shape, name, wrong)
            else:
                runs[name] = run
        times, errors = timing.alternate(runs, self.seconds, self.device)
        for name, raised in errors.items():
            self._reject(shape, name, self._text(raised))
        for name, taken in times.items():
            self._measured(case, name, taken, memory[name], ceilings)

    def _measured(
        self, case: Case, name: str, taken: Quantiles, memory: int | None, ceilings: Roofline
    ) -> None:
        shape = case.shape
        floor = ceilings.floor_ms(case.size, case.operations, shape.dtype)
        self._write(shape, name, "time", taken, "ms", floor / taken.p50)
        moved = _rate(case.size / 1e6, taken)
        copied = ceilings.bandwidth / 1e9
        self._write(shape, name, "bandwidth", moved, "GB/s", moved.p50 / copied)
        if case.operations:
            done = _rate(case.operations / 1e9, taken)
            peak = ceilings.compute[shape.dtype] / 1e12
            self._write(shape, name, "compute", done, "TFLOP/s", done.p50 / peak)
        if memory is not None:
            self._write(shape, name, "memory", quantiles([memory / 2**20]), "MiB")

    def _reject(self, shape: Shape, name: str, why: str) -> None:
        """Says why a provider gets no time, in its row too."""
        self.say(f"[red]{shape.title}: {name} is wrong:[/red] {escape(why)}")
        self.wrong += name.startswith("ours")
        self._write(shape, name, "time", None, "ms")

    def _text(self, error: Exception) -> str:
        """What was raised; finds out whether the GPU still answers."""
        if self.bench.cuda:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                self.lost = True
        return f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def _write(
        self,
        shape: Shape,
        provider: str,
        metric: str,
        figure: Quantiles | None,
        unit: str,
        fraction: float | None = None,
    ) -> None:
        case = shape.op, provider, shape.mode, shape.dtype_name, shape.sizes
        self.bench.write(case, metric, figure, unit, roofline_fraction=fraction)

    def _roofline(self, dtypes: Sequence[torch.dtype]) -> Roofline:
        found = timing.roofline(self.device, dtypes, self.seconds)
        for dtype, rate in found.compute.items():
            shape = Shape("roofline", "forward", dtype, {})
            copied, computed = (quantiles([x]) for x in (found.bandwidth / 1e9, rate / 1e12))
            self._write(shape, "copy", "bandwidth", copied, "GB/s", 1.0)
            self._write(shape, "gemm", "compute", computed, "TFLOP/s", 1.0)
        return found

    def _sets(self, case: Case) -> list[Any]:
        """Input sets of three times the L2 cache in all, so that every call finds it cold."""
        count = 1
        if self.bench.cuda:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            count = min(MAX_SETS, 1 + 3 * cache // max(1, case.size))
        return [case.inputs() for _ in range(count)]


def _rotating(provider: Provider, sets: list[Any]) -> Run:
    turn = cycle(sets)
    return lambda: provider(next(turn))


def _rate(amount: float, taken: Quantiles) -> Quantiles:
    """Amount per millisecond; a rate's low quantile comes from the time's high one."""
    return Quantiles(*(amount / ms for ms in reversed(taken)))


def _chosen(cuda: bool, options: argparse.Namespace) -> list[Shape]:
    on_cuda = {"all": cases.CUDA, "targets": targets.SHAPES, "others": cases.OTHERS}
    shapes = cases.QUICK if options.quick else on_cuda[options.rows] if cuda else cases.CPU
    return [shape for shape in shapes if options.op in (None, shape.op)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench.parser(__doc__, "tiny shapes: does it run at all")
    parser.add_argument("--op", choices=sorted(cases.BUILDERS), help="measure this op alone")
    parser.add_argument(
        "--rows",
        choices=("all", "targets", "others"),
        default="all",
        help="the shapes that have targets, or the others",
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--budget", type=float, default=240, help="seconds, compiling included")
    options = parser.parse_args(arguments)
    with bench.running("topk_bench", options) as run:
        for line in peers.report(run.device):
            run.console.print(line)
        if not run.cuda:
            run.console.print("torch.compile providers and peak memory: CUDA only")
        kernels = Kernels(run)
        try:
            kernels.measure_all(_chosen(run.cuda, options))
        finally:
            report.show(run)
    verdicts = Counter(
        target.line(run.writer.rows if run.cuda else [])[-1] for target in targets.TARGETS
    )
    found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    run.console.print(
        f"targets: {found}; providers of ours that are wrong: {kernels.wrong}; "
        f"left out for lack of time: {kernels.cut}"
    )
    return 1 if kernels.lost or kernels.wrong else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
