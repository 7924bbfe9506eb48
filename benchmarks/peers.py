"""Kernels and encoders of other libraries, used on CUDA where they are installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ssd.storage.provenance import installed

# distribution on PyPI -> what is taken from it
PEERS = {
    "flashinfer-python": ("flashinfer", "top_k"),
    "flashinfer-python CCCL": ("flashinfer.topk", "can_use_cub_topk"),
    "quack-kernels": ("quack.topk", "topk"),
    "eai-sparsify": ("sparsify.fused_encoder", "fused_encoder"),
    "eai-sparsify decoder": ("sparsify.xformers", "xformers_embedding_bag"),
    "sae-lens": ("sae_lens", "TopKSAE"),
    "dictionary-learning": ("dictionary_learning.trainers.top_k", "AutoEncoderTopK"),
}
TopK = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@cache
def load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """A peer's function and version, or None and why it is missing."""
    package = name.split()[0]
    if not (found := installed(package)):
        return None, f"{package}: not installed"
    module, function = PEERS[name]
    try:
        return getattr(importlib.import_module(module), function), f"{package} {found}"
    except Exception as error:  # a peer that cannot be imported must not end the run
        return None, f"{name} {found}: cannot be imported ({type(error).__name__}: {error})"


def report(device: torch.device) -> list[str]:
    """One line for each peer."""
    if device.type != "cuda":
        return [f"{name}: needs CUDA" for name in PEERS if " " not in name]
    return sorted({load(name)[1] for name in PEERS})


def _taken(name: str, device: torch.device) -> Any:
    return load(name)[0] if device.type == "cuda" else None


def topk(device: torch.device) -> dict[str, TopK]:
    """(k, scores) -> top-k, in any order.

    flashinfer.top_k(input, k, sorted, deterministic, tie_break): "flashinfer" sorts, as torch.topk
    does; "same contract" also repeats bit by bit and gives ties to the lower index, as ours does;
    "unsorted" is its default. quack.topk.topk(x, k).
    """
    found: dict[str, TopK] = {}
    if flashinfer := _taken("flashinfer-python", device):
        same = {"sorted": True, "deterministic": True, "tie_break": 1}
        found["flashinfer"] = lambda k, scores: flashinfer(scores, k, sorted=True)
        found["flashinfer, same contract"] = lambda k, scores: flashinfer(scores, k, **same)
        found["flashinfer, unsorted"] = lambda k, scores: flashinfer(scores, k)
        if serves := _taken("flashinfer-python CCCL", device):
            found["CCCL by flashinfer, unsorted"] = partial(_cccl, flashinfer, serves)
    if quack := _taken("quack-kernels", device):
        found["quack"] = lambda k, scores: quack(scores, k)
    return found


def _cccl(
    flashinfer: Callable[..., Any], serves: Callable[..., bool], k: int, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """cub::DeviceBatchedTopK; where it does not serve, flashinfer would silently use another."""
    if not serves("cub", scores, 0, False):
        raise NotImplementedError("cub::DeviceBatchedTopK does not serve this shape here")
    os.environ["FLASHINFER_TOPK_ALGO"] = "cub"
    try:
        values, indices = flashinfer(scores, k)
    finally:
        del os.environ["FLASHINFER_TOPK_ALGO"]
    return values, indices


def encoder(device: torch.device) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """(k, x, W, b) -> top-k: fused_encoder(input, weight, bias, k, activation)."""
    if fused := _taken("eai-sparsify", device):
        return {"eai-sparsify": lambda k, x, w, b: tuple(fused(x, w, b, k, "topk")[:2])}
    return {}


def dense_encoder(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """(k, x, W, b) -> the dense code [B, R], by encode() of an autoencoder as released."""
    found: dict[str, Callable[..., Tensor]] = {}
    if sae := _taken("sae-lens", device):
        found["SAELens"] = partial(_sae_lens, sae)
    if autoencoder := _taken("dictionary-learning", device):
        found["dictionary_learning"] = partial(_dictionary_learning, autoencoder)
    return found


def _sae_lens(sae: Any, k: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    model = _sae_lens_model(sae, k, *weight.shape, x.dtype, x.device)
    model.W_enc.data, model.b_enc.data = weight.T, bias
    return model.encode(x)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _sae_lens_model(
    sae: Any, k: int, neurons: int, d: int, dtype: torch.dtype, device: torch.device
) -> Any:
    sizes = {"d_in": d, "d_sae": neurons, "k": k}
    kind = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)}
    return sae.from_dict({"architecture": "topk", **sizes, **kind}).requires_grad_(False)


def _dictionary_learning(
    autoencoder: Any, k: int, x: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    model = _dictionary_model(autoencoder, k, *weight.shape, x.dtype, x.device)
    model.encoder.weight.data, model.encoder.bias.data = weight, bias
    return model.encode(x)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _dictionary_model(
    autoencoder: Any, k: int, neurons: int, d: int, dtype: torch.dtype, device: torch.device
) -> Any:
    with device:
        return autoencoder(d, neurons, k).to(dtype).requires_grad_(False)


def decoder(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """(values, indices, W, ..) -> out: xformers_embedding_bag(indices, weight, values)."""
    bag = _taken("eai-sparsify decoder", device)
    return {} if bag is None else {"eai-sparsify": lambda given: bag(given[1], given[2], given[0])}
