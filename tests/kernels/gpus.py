"""The GPUs that kernels are compiled for ahead of time, and a stand-in for their drivers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

KIB = 1024


class GPU(NamedTuple):
    """A family as _tuning names it. None: this table does not know."""

    backend: str
    arch: int | str
    warp_size: int
    multiprocessors: int  # of its largest card
    shared_limit: int  # bytes a program may use
    shared: int | None = None  # bytes of a multiprocessor
    warps: int | None = None  # resident on a multiprocessor
    programs: int | None = None  # resident on a multiprocessor


# From the table "Technical Specifications per Compute Capability" of the CUDA programming guide.
GPUS = {
    "sm80": GPU("cuda", 80, 32, 108, 163 * KIB, 164 * KIB, 64, 32),
    "sm90": GPU("cuda", 90, 32, 132, 227 * KIB, 228 * KIB, 64, 32),
    "sm100": GPU("cuda", 100, 32, 148, 227 * KIB, 228 * KIB, 64, 32),
    "sm120": GPU("cuda", 120, 32, 170, 99 * KIB, 100 * KIB, 48, 24),
    "gfx942": GPU("hip", "gfx942", 64, 304, 64 * KIB),
}
REGISTERS = 64 * KIB  # of a multiprocessor, in every CUDA family above


class _Driver:
    """What Triton asks a driver for before it compiles; nothing here can launch."""

    def __init__(self, family: str) -> None:
        self.family = family

    def get_current_device(self) -> Any:
        return self  # a device of its own, so that Triton has compiled nothing for it yet

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        gpu = GPUS[self.family]
        return GPUTarget(gpu.backend, gpu.arch, gpu.warp_size)


@contextmanager
def present(family: str) -> Iterator[None]:
    """Triton takes this family for the GPU of the machine."""
    from triton.runtime import driver

    before = dict(vars(driver))
    driver.set_active(_Driver(family))
    try:
        yield
    finally:
        vars(driver).update(before)


def resident(family: str, warps: int, registers: int, shared: int) -> int | None:
    """How many programs of so many warps run at a time on one multiprocessor."""
    gpu = GPUS[family]
    if gpu.shared is None or gpu.warps is None or gpu.programs is None:
        return None
    # Registers are handed out to a warp 256 at a time, and warps come by fours.
    held = REGISTERS // _up(max(registers, 1) * gpu.warp_size, 256) // 4 * 4
    memory = gpu.shared // _up(shared + KIB, 128)  # 1 KiB goes to the system
    return min(held // warps, memory, gpu.warps // warps, gpu.programs)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
