"""Compiles every shipped kernel launch for every supported GPU, without one.

    python tests/kernels/aot.py [op ...]      prints registers, shared memory and spills

An op's module lists what it ships in one function:

    def aot_cases(family: str) -> list[AotCase]       (ssd_kernels._triton.AotCase)

called with each of _tuning.FAMILIES; it takes its launch options from _tuning.rows(op, family).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ssd_kernels
from ssd_kernels._triton import AotCase, triton

KIB = 1024


class Target(NamedTuple):
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a program may use


TARGETS = {
    "sm80": Target("cuda", 80, 32, 163 * KIB),
    "sm90": Target("cuda", 90, 32, 227 * KIB),
    "sm100": Target("cuda", 100, 32, 227 * KIB),
    "sm120": Target("cuda", 120, 32, 99 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
}


class Resources(NamedTuple):
    registers: int  # per thread
    shared: int  # bytes per program
    spills: int  # bytes of local memory per thread


def modules() -> list[tuple[str, ModuleType]]:
    names = [info.name for info in pkgutil.iter_modules(ssd_kernels.__path__)]
    return [(name, importlib.import_module(f"ssd_kernels.{name}")) for name in names]


def cases(family: str) -> list[AotCase]:
    """Every launch that some op ships for this family; the name begins with the op's."""
    return [
        case
        for _, module in modules()
        if hasattr(module, "aot_cases")
        for case in module.aot_cases(family)
    ]


def compile_case(case: AotCase, family: str) -> Resources:
    """Compiles one launch for one family; raises what the compiler raises."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[family]
    source = ASTSource(
        case.kernel,
        signature=_signature(case),
        constexprs=dict(case.constexprs),
        attrs=_divisible(case),
    )
    binary = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options=dict(case.options),
    )
    read = _cuda_resources if target.backend == "cuda" else _hip_resources
    registers, spills = read(binary.asm)
    return Resources(registers, binary.metadata.shared, spills)


def _signature(case: AotCase) -> dict[str, str]:
    given = {name: kind.split(":")[0] for name, kind in case.signature.items()}
    return {name: given.get(name, "constexpr") for name in case.kernel.arg_names}


def _divisible(case: AotCase) -> dict[tuple[int, ...], list[list[Any]]]:
    names = case.kernel.arg_names
    return {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.signature.items()
        if kind.endswith(":16") or (kind.startswith("*") and not kind.endswith(":1"))
    }


def _cuda_resources(asm: dict[str, Any]) -> tuple[int, int]:
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


def table(rows: list[tuple[str, str, Resources]]) -> Any:
    """A rich table of (family, case name, resources)."""
    from rich.table import Table

    result = Table("GPU", "launch", title="Registers, shared memory and spills")
    for heading in ("registers", "shared (bytes)", "spills (bytes)"):
        result.add_column(heading, justify="right")
    for family, name, resources in rows:
        result.add_row(family, name, *(str(figure) for figure in resources))
    return result


def main(wanted: list[str]) -> None:
    from rich.console import Console

    rows = [
        (family, case.name, compile_case(case, family))
        for family in TARGETS
        for case in cases(family)
        if not wanted or case.name.split()[0] in wanted
    ]
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
