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
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import cases, peers, providers, record, report, timing
from benchmarks.cases import Case
from benchmarks.targets import targets
from benchmarks.timing import Quantiles, Roofline, Run
from ssd.cli import ArgumentParser, exit_status

MAX_SETS = 16
COMPILING = 15  # seconds that a case must have left for torch.compile to begin


def main() -> int:
    options = _options()
    torch.set_float32_matmul_precision("highest")  # fp32 baselines are IEEE, as the kernels are
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    console = Console(width=None if sys.stdout.isatty() else 170)
    path = record.results_path(options.out, options.quick, device, "topk_bench")
    name = record.device_name(device)
    title = name if cuda else f"CPU FIGURES, no GPU was used ({name})"
    console.print(f"[bold]{title}[/bold]; torch {torch.__version__}; commit {record.commit()}")
    for line in peers.report(device):
        console.print(line)
    if not cuda:
        console.print("torch.compile providers and peak memory: CUDA only")
    with record.Writer(path, name) as writer:
        bench = Bench(writer, device, console, options)
        try:
            bench.run(_shapes(cuda, options))
        finally:
            report.show(console, writer.rows, title, cuda)
            report.figure(writer.rows, path.with_suffix(".png"), title)
            console.print(f"{title}. Rows: {path}")
    verdicts = Counter(target.verdict(writer.rows if cuda else [])[1] for target in targets())
    found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    console.print(
        f"targets: {found}; providers of ours that are wrong: {bench.wrong}; "
        f"left out for lack of time: {bench.cut}"
    )
    return 1 if bench.lost or bench.wrong else 0


class Bench:
    """One run: measures cases until they are done or the time budget is spent."""

    def __init__(
        self,
        writer: record.Writer,
        device: torch.device,
        console: Console,
        options: argparse.Namespace,
    ) -> None:
        self.writer, self.device, self.console = writer, device, console
        self.options = options
        self.deadline = time.monotonic() + options.budget
        self.seconds = 0.01 if options.quick else 0.2
        # A case that compiles slowly must not eat the others' time.
        self.case_seconds = options.budget / 8
        self.lost = False
        self.wrong = 0  # providers of ours
        self.cut = 0  # cases and providers that the budget left out

    def run(self, shapes: list[cases.Shape]) -> None:
        ceilings = self._roofline(tuple({s.dtype: None for s in shapes}))
        for number, shape in enumerate(shapes):
            if time.monotonic() > self.deadline or self.lost:
                why = "the CUDA context is lost" if self.lost else "the time budget is spent"
                left = ", ".join(f"{s.op} {s.mode} {s.sizes}" for s in shapes[number:])
                self.console.print(f"[red]not measured, {why}:[/red] {left}")
                self.cut += len(shapes) - number
                return
            try:
                self.measure(providers.build(shape, self.device), ceilings)
            except Exception as error:
                self._failed(f"{shape.op} {shape.mode} {shape.sizes}", error)
            # Past eight compilations of one function torch.compile would fall back to eager.
            torch.compiler.reset()
            if self.device.type == "cuda" and not self.lost:
                torch.cuda.empty_cache()

    def measure(self, case: Case, ceilings: Roofline) -> None:
        """Checks every provider of a case, then times those that are right, in turns."""
        sets = self._sets(case)
        started, runs = time.monotonic(), {}
        memory: dict[str, int | None] = {}
        # The default and the baselines first, what is slow to compile last: the budget cuts there.
        for name in sorted(case.providers, key=lambda n: ("(compile)" in n, n.startswith("ours:"))):
            provider = case.providers[name]
            if self.options.no_compile and "(compile)" in name:
                continue
            end = min(self.deadline, started + self.case_seconds)
            spare = COMPILING if "(compile)" in name else 0
            if self.lost or time.monotonic() > end - spare:
                self.console.print(f"{case.title}: {name} not measured, the time budget is spent")
                self.cut += 1
                continue
            try:
                wrong = case.check(name, sets[0], provider(sets[0]))
                for given in sets[1:]:  # what is captured or compiled for a set is, before timing
                    provider(given)
                run = _rotating(provider, sets)
                # A graph allocates when it is captured, not when it is replayed.
                measured = "(graph)" not in name
                memory[name] = timing.peak_extra_bytes(run, self.device) if measured else None
            except Exception as error:
                wrong = self._failed(f"{case.title}: {name}", error)
            else:
                if wrong:
                    self.console.print(f"[red]{case.title}: {name} is wrong:[/red] {escape(wrong)}")
            if wrong:
                self.wrong += name.startswith("ours")
                self._write(case, name, "time", None, "ms", None)
            else:
                runs[name] = run
        times, errors = timing.alternate(runs, self.seconds, self.device)
        for name, raised in errors.items():
            self._failed(f"{case.title}: {name}", raised)
            self.wrong += name.startswith("ours")
            self._write(case, name, "time", None, "ms", None)
        for name, quantiles in times.items():
            self._measured(case, name, quantiles, memory[name], ceilings)

    def _measured(
        self, case: Case, name: str, taken: Quantiles, memory: int | None, ceilings: Roofline
    ) -> None:
        floor = ceilings.floor_ms(case.size, case.operations, case.dtype)
        self._write(case, name, "time", taken, "ms", floor / taken.p50)
        moved = _rate(case.size / 1e6, taken)
        copied = ceilings.bandwidth / 1e9
        self._write(case, name, "bandwidth", moved, "GB/s", moved.p50 / copied)
        if case.operations:
            done = _rate(case.operations / 1e9, taken)
            peak = ceilings.compute[case.dtype] / 1e12
            self._write(case, name, "compute", done, "TFLOP/s", done.p50 / peak)
        if memory is not None:
            size = memory / 2**20
            self._write(case, name, "memory", Quantiles(size, size, size), "MiB", None)

    def _write(
        self,
        case: Case,
        provider: str,
        metric: str,
        figure: Quantiles | None,
        unit: str,
        fraction: float | None,
    ) -> None:
        p20, p50, p80 = (figure.p20, figure.p50, figure.p80) if figure else (None, None, None)
        dtype = str(case.dtype).removeprefix("torch.")
        self.writer.write(
            record.Row(
                case.op,
                provider,
                case.mode,
                dtype,
                case.shape,
                metric,
                p20,
                p50,
                p80,
                unit,
                fraction,
                figure is not None,
            )
        )

    def _roofline(self, dtypes: tuple[torch.dtype, ...]) -> Roofline:
        found = timing.roofline(self.device, dtypes, self.seconds)
        for dtype, rate in found.compute.items():
            name = str(dtype).removeprefix("torch.")
            rows = (("copy", "bandwidth", found.bandwidth / 1e9, "GB/s"),
                    ("gemm", "compute", rate / 1e12, "TFLOP/s"))  # fmt: skip
            for provider, metric, figure, unit in rows:
                three = (figure, figure, figure)
                row = record.Row("roofline", provider, "forward", name, {}, metric, *three, unit,
                                 1.0, True)  # fmt: skip
                self.writer.write(row)
        return found

    def _sets(self, case: Case) -> list[Any]:
        """Input sets that together are three times the L2 cache: each call finds it cold."""
        first = case.inputs()
        if self.device.type != "cuda":
            return [first]
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        count = min(MAX_SETS, 1 + 3 * cache // max(1, case.size))
        return [first, *(case.inputs() for _ in range(count - 1))]

    def _failed(self, what: str, error: Exception) -> str:
        """Says what was raised, and finds out whether the GPU still answers."""
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.console.print(f"[red]{what} raised[/red] {escape(text)}")
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                self.lost = True
        return text


def _rotating(provider: cases.Provider, sets: list[Any]) -> Run:
    turn = cycle(sets)
    return lambda: provider(next(turn))


def _rate(amount: float, taken: Quantiles) -> Quantiles:
    """amount per millisecond; a rate's low quantile comes from the time's high one."""
    return Quantiles(amount / taken.p80, amount / taken.p50, amount / taken.p20)


def _shapes(cuda: bool, options: argparse.Namespace) -> list[cases.Shape]:
    on_cuda = {"all": cases.CUDA, "targets": cases.TARGETS, "others": cases.OTHERS}
    shapes = cases.QUICK if options.quick else on_cuda[options.rows] if cuda else cases.CPU
    return [s for s in shapes if options.op in (None, s.op)]


def _options() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="CSV file; the figure goes beside it")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all")
    parser.add_argument("--op", choices=sorted(providers.BUILDERS), help="this op alone")
    parser.add_argument("--rows", choices=("all", "targets", "others"), default="all",
                        help="the shapes that the targets name, or the others")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--budget", type=float, default=240, help="seconds, compiling included")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
