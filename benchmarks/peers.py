"""Other libraries' kernels, each used only if it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import installed

# distribution on PyPI -> what is taken from it
PEERS = {
    "flashinfer-python": ("flashinfer", "top_k"),
    "quack-kernels": ("quack.topk", "topk"),
    "eai-sparsify": ("sparsify.fused_encoder", "fused_encoder"),
    "eai-sparsify decoder": ("sparsify.xformers", "xformers_embedding_bag"),
}


@cache
def load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """A peer's function, or None and why it is not there."""
    package = name.split()[0]
    if not (found := installed(package)):
        return None, f"{package}: not installed"
    module, function = PEERS[name]
    try:
        return getattr(importlib.import_module(module), function), f"{package} {found}"
    except Exception as error:  # a peer that cannot be imported must not end the run
        return None, f"{package} {found}: cannot be imported ({type(error).__name__}: {error})"


def report(device: torch.device) -> list[str]:
    """One line for each peer."""
    if device.type != "cuda":
        return [f"{name.split()[0]}: needs CUDA" for name in PEERS if " " not in name]
    return sorted({load(name)[1] for name in PEERS})


def topk(device: torch.device) -> dict[str, Callable[[int, Tensor], tuple[Tensor, Tensor]]]:
    """(k, scores) -> top-k: flashinfer.top_k(input, k, sorted=) and quack.topk.topk(x, k)."""
    found: dict[str, Callable[[int, Tensor], tuple[Tensor, Tensor]]] = {}
    if device.type != "cuda":
        return found
    if flashinfer := load("flashinfer-python")[0]:
        found["flashinfer"] = lambda k, scores: flashinfer(scores, k, sorted=True)
    if quack := load("quack-kernels")[0]:
        found["quack"] = lambda k, scores: quack(scores, k)
    return found


def encoder(device: torch.device) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """(k, x, W, b) -> top-k: fused_encoder(input, weight, bias, k, activation)."""
    fused = load("eai-sparsify")[0] if device.type == "cuda" else None
    if fused is None:
        return {}
    return {"eai-sparsify": lambda k, x, w, b: tuple(fused(x, w, b, k, "topk")[:2])}


def decoder(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """(values, indices, W, ..) -> out: xformers_embedding_bag(indices, weight, values)."""
    bag = load("eai-sparsify decoder")[0] if device.type == "cuda" else None
    return {} if bag is None else {"eai-sparsify": lambda given: bag(given[1], given[2], given[0])}
