"""What a benchmark case consists of; providers and inputs that several ops share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd_kernels import _dispatch

Provider = Callable[[Any], Any]
# Providers that targets name.
LIBRARY, GEMM, ALONE = "F.linear + torch.topk", "16-bit GEMM alone", "F.linear alone"
DENSE = "dense matmul"


@dataclass(frozen=True)
class Shape:
    """A line of the tables in cases.py: an op on inputs of these sizes."""

    op: str
    mode: str  # see record.Row
    dtype: torch.dtype
    sizes: dict[str, int]

    @classmethod
    def parse(cls, line: str) -> Shape:
        """From a line of op, mode, dtype and sizes as NAME=NUMBER."""
        op, mode, dtype, *sizes = line.split()
        pairs = (size.split("=") for size in sizes)
        return cls(op, mode, getattr(torch, dtype), {name: int(size) for name, size in pairs})

    def __getitem__(self, names: str) -> tuple[int, ...]:
        """Sizes by their names: shape["B R k"]."""
        return tuple(self.sizes[name] for name in names.split())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"{self.op} {self.mode} {self.dtype_name} {sizes}"


def shapes(table: str) -> list[Shape]:
    return [Shape.parse(line) for line in table.strip().splitlines()]


@dataclass(frozen=True)
class Case:
    """What is timed for a shape, and how results are checked.

    Args:
        inputs: () -> a fresh set of inputs.
        providers: name -> (set of inputs) -> result; names that begin with "ours" are ours.
        check: (name, set of inputs, result) -> what is wrong with the result, or "".
        size: bytes that the op must read and write. operations: FLOPs that it must do.
    """

    shape: Shape
    inputs: Callable[[], Any]
    providers: dict[str, Provider]
    check: Callable[[str, Any, Any], str]
    size: int
    operations: int = 0

    @property
    def baseline(self) -> str:
        """The first provider that is not ours."""
        return next(name for name in self.providers if not name.startswith("ours"))


def impls(op: str, device: torch.device, call: Callable[..., Any]) -> dict[str, Provider]:
    """`ours`, as a user gets it, and the other fast implementations.

    Args:
        call: (set of inputs, impl=name or None) -> result.
    """
    table = _dispatch.TABLES[op]
    # What another device uses, and what `ours` is here.
    hidden = {"reference", "numba", "triton"}
    if device.type != "cuda" and "numba" not in table:
        hidden.add("torch")
    others = {f"ours:{name}": partial(call, impl=name) for name in table if name not in hidden}
    return {"ours": partial(call, impl=None)} | others


def compiled(
    device: torch.device, name: str, provider: Provider, autotune: bool = False
) -> dict[str, Provider]:
    """A provider under torch.compile, on CUDA alone: compiling for a CPU takes too long."""
    if device.type != "cuda":
        return {}
    found = {f"{name} (compile)": torch.compile(provider, dynamic=False)}
    if autotune:
        mode = "max-autotune-no-cudagraphs"
        tuned = torch.compile(provider, dynamic=False, mode=mode)
        found[f"{name}, max-autotune (compile)"] = tuned
    return found


def captured(device: torch.device, name: str, provider: Provider) -> dict[str, Provider]:
    """A provider as a CUDA graph for each input set: captured at the first call, then replayed."""
    if device.type != "cuda":
        return {}
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}

    def replay(given: Any) -> Any:
        if id(given) not in graphs:
            provider(given)  # compiles and allocates outside the graph
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = provider(given)
            graphs[id(given)] = graph, result
        graph, result = graphs[id(given)]
        graph.replay()
        return result

    return {f"{name} (graph)": replay}


def normal(shape: Shape, device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=device, dtype=torch.float32).to(shape.dtype)


def distinct(batch: int, neurons: int, k: int, device: torch.device) -> Tensor:
    """[B, k] int64 neurons, no two equal in a row: equal steps from a random start."""
    start = torch.randint(neurons, (batch, 1), device=device)
    return (start + torch.arange(k, device=device) * (neurons // k)) % neurons
