"""Compiles what the launchers launch, for GPUs that need not be there.

    python tests/kernels/aot.py [--all] [--gpu sm90] [--write] [WORD ...]

launches.py records the launches. All of them are compiled for sm_90, and the first of each kernel
for the other families; --all compiles them all. --gpu and WORD choose families and calls. --write
keeps the table in benchmarks/results/aot/triton-VERSION.txt.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

import gpus
import launches
from launches import Launch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "aot"
WIDTH = 170  # of the table, in characters
FULL = "sm90"  # for which every launch is always compiled

# Far from the limit of 255 registers ptxas may still keep one 64-bit value on the stack, to stay at
# a step of the occupancy; in which launches it does differs between Triton 3.8 and 3.9. Before 3.4
# it may keep two.
PARKED = 16 if find_spec("triton") and not find_spec("triton.knobs") else 8


class Resources(NamedTuple):
    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # bytes of local memory per thread
    resident: int | None  # programs on a multiprocessor at a time; None: not known


Key = tuple[str, str, str, str]  # family, kernel, call, warps


class Row(NamedTuple):
    family: str
    launch: Launch
    resources: Resources


def chosen(family: str, everything: bool = False) -> list[Launch]:
    """The launches to compile for a family."""
    recorded = launches.grid(family).launches
    if everything or family == FULL:
        return recorded
    first = {launch.name: launch for launch in reversed(recorded)}
    return list(first.values())


def compile_launch(launch: Launch, family: str) -> Resources:
    """What one launch takes on one family; raises what the compiler raises."""
    with gpus.present(family):
        binary = launch.kernel.preload(launch.specialization)
    read = _cuda_resources if gpus.GPUS[family].backend == "cuda" else _hip_resources
    registers, spills = read(binary.asm)
    shared = binary.metadata.shared
    resident = gpus.resident(family, launch.warps, registers, shared)
    return Resources(registers, shared, spills, resident)


def _cuda_resources(asm: dict[str, Any]) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(
        r"LOCAL:(\d+)", text
    )


def _hip_resources(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    registers = _number(r"\.vgpr_count:\s*(\d+)", text)
    return registers, _number(r"\.private_segment_fixed_size:\s*(\d+)", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's report has no {pattern!r}:\n{text[:2000]}")
    return int(match[1])


def complaints(row: Row, residents: Mapping[Key, int] | None) -> list[str]:
    """What is wrong with a launch's resources; residents: what `kept` returns."""
    registers, shared, spills, resident = row.resources
    found = []
    if spills > (PARKED if registers <= 128 else 0):
        found.append(f"spills {spills} bytes a thread")
    if shared > gpus.GPUS[row.family].shared_limit:
        found.append(f"takes {shared} bytes of shared memory")
    if residents is not None and resident is not None:
        least = residents.get(_key(row))
        if least is None:
            found.append(f"is not in {_file().name}; write it anew with aot.py --all --write")
        elif resident < least:
            found.append(f"runs {resident} programs a multiprocessor, not {least} as it did")
    return [f"{row.family} {row.launch.name} of {row.launch.call}: {text}" for text in found]


def _key(row: Row) -> Key:
    return row.family, row.launch.name, row.launch.call, str(row.launch.warps)


def kept() -> dict[Key, int] | None:
    """The programs per multiprocessor in the table of this Triton; None if it has no table."""
    if not _file().exists():
        return None
    found: dict[Key, int] = {}
    for line in _file().read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[-1].isdigit():
            family, name, call, warps, *_, resident = cells
            key = family, name, call, warps
            found[key] = min(int(resident), found.get(key, int(resident)))
    return found


def _file() -> Path:
    return RESULTS / f"triton-{_version()}.txt"


def _version() -> str:
    import triton

    return str(triton.__version__)


def table(rows: Iterable[Row]) -> Table:
    result = Table(title=f"Triton {_version()}: registers a thread, bytes of shared memory")
    for heading in ("GPU", "kernel", "first call that launches it"):
        result.add_column(heading, no_wrap=True)
    for heading in ("warps", "registers", "shared", "spills", "programs per SM"):
        result.add_column(heading, justify="right")
    for family, launch, (registers, shared, spills, resident) in rows:
        figures = (launch.warps, registers, shared, spills, "-" if resident is None else resident)
        result.add_row(family, launch.name, launch.call, *map(str, figures))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a call's name")
    parser.add_argument("--all", action="store_true", help="every launch for every family")
    parser.add_argument("--gpu", action="append", choices=list(gpus.GPUS), help="one of the GPUs")
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results")
    given = parser.parse_args(arguments)
    if given.write and not given.all:
        parser.error("--write keeps the table of every launch; add --all")
    if given.write and (given.words or given.gpu):
        parser.error("--write keeps the table of every launch; leave out WORD and --gpu")
    began = time.perf_counter()
    rows = [
        Row(family, launch, compile_launch(launch, family))
        for family in given.gpu or gpus.GPUS
        for launch in chosen(family, given.all)
        if all(word in launch.call for word in given.words)
    ]
    report = table(rows)
    Console(width=WIDTH).print(report)
    residents = None if given.write else kept()
    if given.write:
        with _file().open("w", encoding="utf-8") as file:
            Console(width=WIDTH, file=file).print(report)
    wrong = [text for row in rows for text in complaints(row, residents)]
    print(*wrong, sep="\n")
    print(f"{len(rows)} launches in {time.perf_counter() - began:.0f} s, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
