"""The network, its statistics and augmentation, and pretraining that learns and resumes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_images import make
from torch import nn

from ssd.embed import convmixer
from ssd.embed.convmixer import (
    PADDING,
    ConvMixer,
    Pretrainer,
    Settings,
    augment,
    load_weights,
    read,
    statistics,
)
from ssd.embed.images import Images, pixels
from ssd.errors import Diverged, UserError
from ssd.runs import Interrupted

CPU = torch.device("cpu")
SETTINGS = Settings(epochs=3, batch_size=16)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """A small set, and a small network for it."""
    monkeypatch.setattr(convmixer, "FEATURES", 8)
    monkeypatch.setattr(convmixer, "DEPTH", 2)
    small = make("cifar100")
    return Images("small", pixels(small.x_train, (3, 32, 32)), small.y_train, flip=True)


def trainer(images: Images, path: Path, settings: Settings = SETTINGS) -> Pretrainer:
    return Pretrainer(images, settings, CPU, path)


def test_network_as_the_paper_writes_it() -> None:
    """z_0 = BN(GELU(conv)); z' = BN(GELU(depthwise z)) + z; z = BN(GELU(pointwise z'))."""
    torch.manual_seed(3)
    model = ConvMixer(3, 10, features=6, depth=2, kernel=3, patch=4).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    model.mean.fill_(0.4)
    model.std.fill_(0.3)
    state = model.state_dict()

    def normed_gelu(x: torch.Tensor, name: str) -> torch.Tensor:
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        mean, var = (state[f"{name}.running_{s}"].view(-1, 1, 1) for s in ("mean", "var"))
        weight, bias = (state[f"{name}.{s}"].view(-1, 1, 1) for s in ("weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    images = torch.randint(256, (2, 3, 16, 12), dtype=torch.uint8)
    x = (images.double() / 255 - 0.4) / 0.3
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)  # [B, 3, 4, 3, 4, 4]
    z = torch.einsum("bchwij,fcij->bfhw", patches, state["body.0.weight"])
    z = normed_gelu(z + state["body.0.bias"].view(-1, 1, 1), "body.2")
    for layer in ("body.3", "body.4"):
        padded = nn.functional.pad(z, [1] * 4).unfold(2, 3, 1).unfold(3, 3, 1)
        y = torch.einsum("bfhwij,fij->bfhw", padded, state[f"{layer}.places.0.weight"][:, 0])
        y = y + state[f"{layer}.places.0.bias"].view(-1, 1, 1)
        z = z + normed_gelu(y, f"{layer}.places.2")
        y = torch.einsum("bfhw,gf->bghw", z, state[f"{layer}.channels.0.weight"][:, :, 0, 0])
        y = y + state[f"{layer}.channels.0.bias"].view(-1, 1, 1)
        z = normed_gelu(y, f"{layer}.channels.2")
    features = model.embed(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, z.mean((2, 3)).float(), rtol=1e-4, atol=1e-5)


def test_size_of_the_network() -> None:
    """256 features, and the number of weights that the architecture has on paper."""
    model = ConvMixer(3, 100, convmixer.FEATURES, convmixer.DEPTH, convmixer.KERNEL, 2)
    assert model.embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 256)
    norm, layer = 2 * 256, 256 * (5 * 5 + 1) + 256 * (256 + 1)
    expected = 256 * (3 * 2 * 2 + 1) + norm + 8 * (layer + 2 * norm) + 100 * 257
    assert sum(p.numel() for p in model.parameters()) == expected


def test_statistics() -> None:
    images = torch.randint(256, (50, 3, 5, 7), dtype=torch.uint8)
    images[:, 2] = 17
    mean, std = statistics(images)
    x = images.double() / 255
    torch.testing.assert_close(mean.flatten().double(), x.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = x[:, :2].std((0, 2, 3), correction=0)
    torch.testing.assert_close(std[:2].flatten().double(), expected, rtol=1e-6, atol=0)
    assert std[2] == pytest.approx(1 / 255)


def test_augment_one_by_one() -> None:
    images = torch.randint(256, (30, 2, 6, 5), dtype=torch.uint8)
    shifts = torch.randint(2 * PADDING + 1, (30, 2))
    flips = torch.rand(30) < 0.5
    result = augment(images, shifts, flips)
    assert result.shape == images.shape
    for number in range(30):
        padded = nn.functional.pad(images[number], [PADDING] * 4)
        row, column = shifts[number].tolist()
        expected = padded[:, row : row + 6, column : column + 5]
        expected = expected.flip(2) if flips[number] else expected
        assert torch.equal(result[number], expected)
    still = torch.full((30, 2), PADDING)
    assert torch.equal(augment(images, still, torch.zeros(30, dtype=torch.bool)), images)


def test_it_learns(images: Images, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = replace(SETTINGS, epochs=30)
    model = trainer(images, tmp_path / "w", settings).run(
        1e9, lambda text, done, total, milestone: lines.append(text) if milestone else None
    )
    assert len(lines) == 30
    loss = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert loss[0] > 1.0
    assert loss[-1] < 0.7
    with torch.inference_mode():
        right = model.eval()(images.pixels).argmax(1) == images.labels
    assert right.float().mean() > 0.9


def test_learning_rate_rises_and_falls(images: Images, tmp_path: Path) -> None:
    pretrainer = trainer(images, tmp_path / "w", replace(SETTINGS, epochs=10, lr=0.5))
    rates: list[float] = []
    pretrainer.optimizer.step = lambda: rates.append(pretrainer.optimizer.param_groups[0]["lr"])
    pretrainer.run(1e9)
    expected = [0.5 * s / 4 for s in range(1, 5)] + [0.5 * s / 16 for s in range(16, 0, -1)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("stop", range(1, 6))
def test_resume_bit_for_bit(images: Images, tmp_path: Path, stop: int) -> None:
    expected = trainer(images, tmp_path / "whole").run(1e9)
    calls = iter(range(1, 100))
    with pytest.raises(Interrupted):
        trainer(images, tmp_path / "part").run(1e9, stopped=lambda: next(calls) == stop)
    torch.manual_seed(99)
    resumed = trainer(images, tmp_path / "part")
    resumed.restore()
    assert resumed.step == stop
    found = resumed.run(1e9)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_seed_decides(images: Images, tmp_path: Path) -> None:
    weights = [
        trainer(images, tmp_path / str(number), replace(SETTINGS, seed=seed)).run(1e9).state_dict()
        for number, seed in enumerate((0, 0, 1))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["body.0.weight"], weights[2]["body.0.weight"])


def test_the_generator_of_others_is_left_alone(images: Images, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    trainer(images, tmp_path / "w").run(1e9)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_digits_are_not_mirrored(images: Images, tmp_path: Path) -> None:
    digits = Images("digits", images.pixels, images.labels, flip=False)
    assert not trainer(digits, tmp_path / "w")._draw(0)[2].any()
    flips = trainer(images, tmp_path / "w")._draw(0)[2]
    assert 0 < flips.sum() < len(flips)


def test_fewer_images_than_a_batch(images: Images, tmp_path: Path) -> None:
    few = Images("few", images.pixels[:6], images.labels[:6], flip=True)
    pretrainer = trainer(few, tmp_path / "w")
    pretrainer.run(1e9)
    assert pretrainer.step == pretrainer.total == 3


def test_weights_are_those_of_the_end(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "w"
    model = trainer(images, path).run(0.0)
    tensors, state = read(path, CPU)
    assert state["finished"]
    assert not [name for name in tensors if name.startswith("optimizer.")]
    loaded, pretraining = load_weights(path, CPU)
    assert pretraining["data"] == "small"
    assert torch.equal(loaded.eval()(images.pixels), model.eval()(images.pixels))
    again = trainer(images, path)
    again.restore()
    assert torch.equal(again.run(1e9).eval()(images.pixels), model(images.pixels))


def test_checkpoint_of_other_data_or_settings(images: Images, tmp_path: Path) -> None:
    trainer(images, tmp_path / "w").run(1e9)
    other = Images("small", images.pixels.flip(0), images.labels, flip=True)
    for changed, what in (
        (trainer(other, tmp_path / "w"), "data_crc32"),
        (trainer(images, tmp_path / "w", replace(SETTINGS, lr=0.02)), "lr 0.01, now 0.02"),
    ):
        with pytest.raises(UserError, match=what):
            changed.restore()


def test_weights_of_another_version(images: Images, tmp_path: Path) -> None:
    path = tmp_path / "w"
    pretrainer = trainer(images, path)
    pretrainer.run(1e9)
    pretrainer.described["shape"]["stride"] = 2
    pretrainer.save()
    with pytest.raises(UserError, match="holds no ConvMixer of this version"):
        load_weights(path, CPU)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="is damaged or was not written by"):
        load_weights(path, CPU)


@pytest.mark.parametrize("spoiled", [1, 2, 3])
def test_a_checkpoint_is_from_before_a_divergence(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: int
) -> None:
    original = Pretrainer._train

    def train(self: Pretrainer, *batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result = original(self, *batch)
        if self.step == spoiled:
            next(self.model.parameters()).data[:] = torch.nan
        return result

    monkeypatch.setattr(Pretrainer, "_train", train)
    with pytest.raises(Diverged, match=rf"--lr 0\.01 makes a weight not finite.*{spoiled + 1}"):
        trainer(images, tmp_path / "c.safetensors").run(every=0.0)
    tensors, state = read(tmp_path / "c.safetensors", CPU)
    assert state["step"] == spoiled
    assert all(t.isfinite().all() for t in tensors.values())
