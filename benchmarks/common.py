"""What the cases of every op share: implementations by name, compiled variants, inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Provider, Shape
from ssd_kernels import _dispatch

# What serves CUDA tensors alone; an implementation that is not named is tried on CPU too.
CUDA_ONLY = {"triton"}


def implementations(op: str, device: torch.device) -> list[str]:
    """The names in the op's table, the specification left out: it is not meant to be fast."""
    hidden = {"reference"} | (set() if device.type == "cuda" else CUDA_ONLY)
    return [name for name in _dispatch.TABLES[op] if name not in hidden]


def impls(op: str, device: torch.device, call: Callable[..., Any]) -> dict[str, Provider]:
    """`ours`, as a user gets it, and the other implementations; call(set, impl=) -> result."""
    named: dict[str, Provider] = {"ours": partial(call, impl=None)}
    default = "triton" if device.type == "cuda" else "torch"
    for impl in implementations(op, device):
        if impl == default:
            continue
        named[f"ours:{impl}"] = partial(call, impl=impl)
    return named


def compiled(
    device: torch.device, name: str, provider: Provider, autotune: bool = False
) -> dict[str, Provider]:
    """torch.compile of a provider, on CUDA: on CPU its compile time alone breaks the minute."""
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
            provider(given)  # what is compiled and kept is not part of the graph
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
    """[B, k] int64: a random start a row and equal steps from there, so no neuron twice."""
    start = torch.randint(neurons, (batch, 1), device=device)
    return (start + torch.arange(k, device=device) * (neurons // k)) % neurons
