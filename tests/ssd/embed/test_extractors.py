"""Pretrained networks without their classifier; no weights are downloaded."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision import models

from ssd.embed.embedding import check
from ssd.embed.extractors import Extractor, find, freeze
from ssd.embed.request import Work
from ssd.errors import UserError
from ssd.progress import Display

CPU = torch.device("cpu")
WIDTHS = {
    "resnet18": 512,
    "vit_b_16": 768,
    "convnext_tiny": 768,
    "efficientnet_b0": 1280,
    "mobilenet_v3_small": 1024,
    "densenet121": 1024,
    "vgg11": 4096,
    "shufflenet_v2_x0_5": 1024,
}


def load(extractor: str) -> Extractor:
    """An extractor as the command builds it."""
    given = {"dataset": "mnist", "extractor": extractor, "out": Path("unused.npz"), "device": "cpu"}
    row, model = find(extractor)
    return row.prepare(model, Work(check(given), Display(Console(), quiet=True)))[1]()


@pytest.mark.parametrize("name", WIDTHS)
def test_last_linear_is_removed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Shapes alone: the network is built without memory."""
    build, made = models.get_model, []

    def build_on_meta(name: str, weights: object, progress: bool) -> nn.Module:
        with torch.device("meta"):
            made.append(build(name))
        return made[0]

    monkeypatch.setattr(models, "get_model", build_on_meta)
    monkeypatch.setattr("ssd.embed.extractors.freeze", lambda model, *others: model)
    model = load(f"torchvision:{name}").eval()
    assert model is made[0]
    with torch.inference_mode():
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, WIDTHS[name])


def test_model_without_linear_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, **options: build(name))
    with pytest.raises(UserError, match="does not end in a linear layer"):
        load("torchvision:squeezenet1_1")


def test_unknown_model() -> None:
    with pytest.raises(UserError, match=r"is no pretrained model; try .*torchvision:convnext_tiny"):
        load("torchvision:convnext_tinny")


@pytest.mark.parametrize("error", [URLError("no route\nto host"), RuntimeError("invalid hash")])
def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import socket

    def fail(*arguments: object, **options: object) -> None:
        assert socket.getdefaulttimeout() is not None
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(UserError, match="nor to be downloaded from https://") as caught:
        load("torchvision:resnet18")
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None


def test_frozen() -> None:
    """No gradients, evaluation mode, grey images in all channels, fp32, a checksum of weights."""
    model = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 1), nn.Flatten())
    extractor = freeze(model, lambda images: model(images.float()), 3, CPU)
    grey = torch.randint(256, (5, 1, 2, 2), dtype=torch.uint8)
    features = extractor.function(grey)
    assert not features.requires_grad
    assert torch.equal(features, extractor.function(grey.repeat(1, 3, 1, 1)))
    with torch.no_grad():
        model[1].bias[0] += 1
    assert freeze(model, model, 3, CPU).crc32 != extractor.crc32


def test_the_mode_of_the_network_neither_matters_nor_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Flatten()).train()
    extractor = freeze(model, lambda images: model(images.float()), 3, CPU)
    images = torch.randint(256, (5, 3, 2, 2), dtype=torch.uint8)
    before = model[0].running_mean.clone()
    features = extractor.function(images)
    assert model.training
    assert torch.equal(model[0].running_mean, before)
    assert torch.equal(features, model.eval()(images.float()))
