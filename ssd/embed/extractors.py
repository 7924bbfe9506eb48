"""Frozen networks that turn images into features."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ssd.activations import evaluating
from ssd.data import Unavailable, downloading
from ssd.errors import UserError

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Extractor:
    """A frozen network. function: features [B, F] of images [B, channels, H, W], uint8."""

    function: Callable[[Tensor], Tensor]
    channels: int
    crc32: str  # of its weights


def freeze(
    model: nn.Module, function: Callable[[Tensor], Tensor], channels: int, device: torch.device
) -> Extractor:
    """An extractor made of a network: evaluation mode, no gradients, bf16 autocast on CUDA."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)

    def extract(images: Tensor) -> Tensor:
        bf16 = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
        with evaluating(model), torch.inference_mode(), bf16:
            return function(images.expand(-1, channels, -1, -1)).float()

    return Extractor(extract, channels, f"{crc:08x}")


def torchvision_model(name: str) -> Any:
    """The default weights of a torchvision classifier; UserError for an unknown one."""
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        close = get_close_matches(name, names) or ["resnet18", "vit_b_16", "convnext_tiny"]
        raise UserError(
            f"--extractor {TORCHVISION}{name} is unknown; try {TORCHVISION}"
            + f" or {TORCHVISION}".join(close)
        )
    return models.get_model_weights(name).DEFAULT


def load_torchvision(name: str, device: torch.device, progress: bool) -> Extractor:
    """A torchvision classifier with its default weights and preprocessing, without its last Linear.

    Raises:
        UserError: its weights cannot be downloaded, or its end is no Linear over the classes.
    """
    from torchvision import models

    weights = torchvision_model(name)
    try:
        with downloading(), torch.device("cpu"):
            model = models.get_model(name, weights=weights, progress=progress)
    except Unavailable as reason:
        raise UserError(
            f"the weights of {TORCHVISION}{name} are neither in {torch.hub.get_dir()}/checkpoints "
            f"nor to be downloaded from {weights.url} ({reason}); put them there"
        ) from reason
    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linear or linear[-1][1].out_features != len(weights.meta["categories"]):
        raise UserError(
            f"--extractor {TORCHVISION}{name} does not end in a linear layer over its classes; "
            "use another model"
        )
    model.set_submodule(linear[-1][0], nn.Identity())
    model.to(device).to(memory_format=torch.channels_last)
    preprocess = weights.transforms()
    return freeze(model, lambda images: model(preprocess(images)), 3, device)
