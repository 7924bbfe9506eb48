"""The command line: features of images, written, refused, interrupted and resumed."""

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from kill_resume import crash_at_every_write
from safetensors import safe_open
from small_images import TEST, TRAIN, make
from torch import nn
from torchvision import models

from ssd import data, train
from ssd.data import load
from ssd.embed import __main__ as embed
from ssd.embed import convmixer, embedding

SMALL = "--device cpu --batch-size"
CONVMIXER = f"--dataset cifar10 --extractor convmixer --out f.npz --epochs 1 {SMALL} 16".split()
RESNET = f"--dataset mnist --extractor torchvision:resnet18 --out r.npz {SMALL} 10".split()
StopAfter = Callable[[int], None]


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """ssd.data.load makes small sets but still reads files; ConvMixer is a tiny one."""
    load = data.load

    def load_small(name: str, root: Path, features: Path | None = None, **options: object):
        return load(name, root, features) if name == "features" else make(name)

    monkeypatch.setattr(data, "load", load_small)
    monkeypatch.setattr(convmixer, "FEATURES", 8)
    monkeypatch.setattr(convmixer, "DEPTH", 2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_images: None) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torchvision's models with weights drawn from a seed in place of the downloaded ones."""
    get_model, drawn = models.get_model, {"seed": 0}

    def without_weights(name: str, weights: object, progress: bool) -> nn.Module:
        torch.manual_seed(drawn["seed"])
        return get_model(name)

    monkeypatch.setattr(models, "get_model", without_weights)
    return drawn


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> StopAfter:
    """Makes Ctrl-C come before the command asks for it the n-th time."""

    def prepare(count: int) -> None:
        asked = itertools.count(1)
        stopped = nullcontext(lambda: next(asked) >= count)
        monkeypatch.setattr(embed, "stop_on_interrupt", lambda: stopped)

    return prepare


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def digests() -> dict[str, bytes | str]:
    """The files; in place of a safetensors file, whose header has no fixed order, its checksum."""
    found: dict[str, bytes | str] = {**files()}
    for path in Path().glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = file.metadata()["sha256"]
    return found


def written_and_removed(arguments: list[str]) -> dict[str, bytes | str]:
    assert embed.main(arguments) == 0
    expected = digests()
    for name in expected:
        os.unlink(name)
    return expected


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which a command line is refused, leaving everything as it was."""
    before = files()
    capsys.readouterr()
    assert embed.main(arguments) == 2
    assert files() == before
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert said.endswith("\n")
    return said


def test_convmixer_features_are_those_of_its_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main([*CONVMIXER, "--quiet"]) == 0
    line = f"cifar10 by convmixer: {TRAIN} + {TEST} samples of 8 features -> f.npz\n"
    assert capsys.readouterr().out == line
    assert set(files()) == {"f.npz", "f.convmixer.safetensors"}
    with np.load("f.npz") as archive:
        assert archive["x_train"].dtype == archive["x_test"].dtype == np.float32
        assert archive["y_train"].dtype == archive["y_test"].dtype == np.int64
        origin = json.loads(str(archive["origin"]))
    assert origin["pretraining"]["data"] == "cifar100"
    model, _ = convmixer.load_weights(Path("f.convmixer.safetensors"), torch.device("cpu"))
    images = make("cifar10")
    written = load("features", Path(), Path("f.npz"))
    for part in ("train", "test"):
        x = getattr(images, f"x_{part}").view(-1, 3, 32, 32)
        with torch.inference_mode():
            expected = model.eval().embed((x * 255).round().byte())
        torch.testing.assert_close(getattr(written, f"x_{part}"), expected)
        assert torch.equal(getattr(written, f"y_{part}"), getattr(images, f"y_{part}"))


def test_train_accepts_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embed.main(CONVMIXER) == 0
    monkeypatch.setattr(train, "draw", lambda folder: None)
    options = "--features f.npz --tasks 2 --neurons 16 -k 2 --epochs 1 --device cpu --out run"
    assert train.main(options.split()) == 0


def test_weights_give_the_same_features_without_pretraining() -> None:
    assert embed.main(CONVMIXER) == 0
    again = [*CONVMIXER[:4], "--weights", "f.convmixer.safetensors", "--out", "g.npz"]
    assert embed.main([*again, "--batch-size", "16", "--device", "cpu"]) == 0
    with np.load("f.npz") as f, np.load("g.npz") as g:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            np.testing.assert_array_equal(f[name], g[name])
    assert "g.convmixer.safetensors" not in files()


def test_grey_images_by_an_extractor_for_colours() -> None:
    assert embed.main([*CONVMIXER, "--dataset", "mnist", "--pretrain", "cifar10"]) == 0
    assert load("features", Path(), Path("f.npz")).x_train.shape == (TRAIN, 8)


def test_interrupt_anywhere_and_resume(
    stop_after: StopAfter, capsys: pytest.CaptureFixture[str]
) -> None:
    """At every step of pretraining and every batch of embedding, one process after another."""
    arguments = [*CONVMIXER, "--epochs", "2"]
    expected = written_and_removed(arguments)
    stop_after(1)
    stops, status = 0, embed.main(arguments)
    while status == 130:
        stops += 1
        line = capsys.readouterr().err
        shown = line.split("go on with: python -m ssd.embed ")[1].split()
        assert shown == [*arguments, "--resume"]
        stop_after(1)
        status = embed.main(shown)
    assert status == 0
    # 2 epochs of 2 steps, 52 images in batches of 16; nothing is left to resume after the last.
    assert stops == 3 + 3
    assert digests() == expected


def test_crash_at_every_write(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*CONVMIXER, "--checkpoint-every", "0"]
    expected = written_and_removed(arguments)

    def work() -> None:
        assert embed.main([*arguments, "--resume"]) == 0

    crashes = crash_at_every_write(monkeypatch, work, 3)
    assert crashes > 3
    assert digests() == expected


def test_resume_of_what_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main(CONVMIXER) == 0
    before = files()
    assert embed.main([*CONVMIXER, "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert files() == before
    changed = refused(capsys, [*CONVMIXER, "--resume", "--batch-size", "8"])
    assert "f.npz is of another command (batch_size 16, now 8; " in changed
    os.unlink("f.npz")
    assert "is of another pretraining (" in refused(capsys, [*CONVMIXER, "--resume", "--lr", "0.1"])
    np.savez("f.npz", x_train=np.zeros(3))
    assert "was not written by this command" in refused(capsys, [*CONVMIXER, "--resume"])


def test_partial_features_of_something_else(
    stop_after: StopAfter, no_download: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2)
    assert embed.main(RESNET) == 130
    assert set(files()) == {"r.partial.safetensors"}
    other = [*RESNET, "--resume", "--extractor", "torchvision:resnet34"]
    assert "is of another command (extractor " in refused(capsys, other)
    no_download["seed"] = 1
    assert "is of another command (weights_crc32 " in refused(capsys, [*RESNET, "--resume"])
    no_download["seed"] = 0
    assert "r.partial.safetensors exists already" in refused(capsys, RESNET)
    whole = Path("r.partial.safetensors").read_bytes()
    Path("r.partial.safetensors").write_bytes(whole[:-1])
    assert "is damaged" in refused(capsys, [*RESNET, "--resume"])
    Path("r.partial.safetensors").write_bytes(whole)
    stop_after(1000)
    assert embed.main([*RESNET, "--resume"]) == 0
    assert set(files()) == {"r.npz"}


def test_torchvision_features(no_download: dict[str, int]) -> None:
    assert embed.main(RESNET) == 0
    written, images = load("features", Path(), Path("r.npz")), make("mnist")
    weights = models.ResNet18_Weights.DEFAULT
    torch.manual_seed(0)
    model = models.resnet18().eval()
    model.fc = nn.Identity()
    x = (images.x_test * 255).round().byte().view(-1, 1, 28, 28).repeat(1, 3, 1, 1)
    with torch.inference_mode():
        expected = model(weights.transforms()(x))
    torch.testing.assert_close(written.x_test, expected, rtol=1e-4, atol=1e-5)
    assert written.x_train.shape == (TRAIN, 512)
    assert torch.equal(written.y_train, images.y_train)


def test_data_set_without_another_to_pretrain_on(
    no_download: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(embedding.PRETRAIN, "mnist", "")
    said = refused(capsys, [*CONVMIXER, "--dataset", "mnist"])
    assert "--dataset mnist has no data set to pretrain on" in said
    assert embed.main(RESNET) == 0


def test_pretrain_folder(capsys: pytest.CaptureFixture[str]) -> None:
    from torchvision.transforms.functional import to_pil_image

    for number in range(24):
        place = Path("images") / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.rand(3, 32, 40)).save(place / f"{number}.png")
    arguments = [*CONVMIXER, "--pretrain-folder", "images"]
    assert embed.main(arguments) == 0
    with np.load("f.npz") as archive:
        assert json.loads(str(archive["origin"]))["pretraining"]["data"] == "folder images"
    _, state = convmixer.read(Path("f.convmixer.safetensors"), torch.device("cpu"))
    assert state["shape"]["classes"] == 3
    Path("images/class1/1.png").write_bytes(b"no image")
    said = refused(capsys, [*arguments, "--out", "g.npz"])
    assert "1.png cannot be read; remove it" in said


def pairs(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = make(name)
    return [(images.x_train, images.y_train), (images.x_test, images.y_test)]


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_convert(layout: str) -> None:
    train_part, test_part = pairs("mnist")
    source = Path("cached.pt" if layout == "file" else "CIFAR10")
    if layout == "file":
        torch.save((train_part, test_part), source)
    else:
        source.mkdir()
        torch.save(train_part, source / "all_data_train.pt")
        torch.save(test_part, source / "all_data_test.pt")
    assert embed.main(["--convert", str(source), "--out", "f.npz"]) == 0
    assert load("features", Path(), Path("f.npz")).checksum() == make("mnist").checksum()
    with np.load("f.npz") as archive:
        assert archive["x_test"].dtype == np.float32
        assert archive["y_test"].dtype == np.int64


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_convert_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", "f.npz"]
    torch.save(pairs("mnist")[0], "half.pt")
    assert "--convert half.pt must hold ((x" in refused(capsys, ["--convert", "half.pt", *out])
    torch.save(((Malicious(), torch.zeros(1)), pairs("mnist")[0]), "bad.pt")
    assert "other than tensors" in refused(capsys, ["--convert", "bad.pt", *out])
    assert not Path("executed").exists()
    assert "--convert absent.pt is not a file" in refused(capsys, ["--convert", "absent.pt", *out])
    assert "without all_data_train.pt and" in refused(capsys, ["--convert", ".", *out])
    assert "--resume does not go with" in refused(capsys, ["--convert", ".", "--resume", *out])
    Path("f.npz").touch()
    assert "f.npz exists already" in refused(capsys, ["--convert", "half.pt", *out])


UNTRAINED = "--dataset cifar10 --extractor convmixer --out f.npz"
OPTIONS = [
    ("--dataset cifar10 --extractor convmixer", "--out is missing"),
    ("--extractor convmixer --out f.npz", "--dataset is missing"),
    ("--dataset cifar10 --out f.npz", "--extractor is missing"),
    ("convmixer --dataset cifar", "--dataset cifar is unknown; choose"),
    ("convmixer --extractor resnet18", "resnet18 is unknown; use one of convmixer, "),
    ("convmixer --extractor torchvision", "torchvision is unknown; use"),
    ("convmixer --extractor efficientnet-lite0:b", "efficientnet-lite0:b is unknown; use"),
    ("convmixer --extractor timm:resnet18", "--epochs does not go with --extractor timm:resnet18"),
    ("resnet --extractor torchvision:resnt18", "torchvision:resnet18"),
    ("resnet --extractor torchvision:?", "torchvision:vit_b_16"),
    ("convmixer --out f.pt", "--out f.pt must end in .npz"),
    ("convmixer --out a/f.npz", "there is no folder a; make it"),
    ("convmixer --out folder.npz", "is a folder; name a file"),
    ("convmixer --out there.npz", "there.npz exists already; add --resume"),
    ("convmixer --pretrain cifar10", "must not have seen the labels"),
    ("convmixer --dataset mnist --pretrain mnist-5k", "must not have seen the labels"),
    ("convmixer --pretrain imagenet", "--pretrain imagenet is unknown"),
    ("convmixer --pretrain mnist", "images of 1 channel, cifar10 of 3"),
    ("convmixer --pretrain mnist --pretrain-folder .", "--pretrain does not go with --pretrain-fo"),
    ("convmixer --pretrain-folder a", "a is not a folder"),
    ("convmixer --pretrain-folder folder.npz", "--pretrain-folder folder.npz"),
    (f"{UNTRAINED} --weights a", "--weights a is not a file"),
    (f"{UNTRAINED} --weights there.npz", "there.npz is damaged or"),
    ("convmixer --weights a", "--epochs does not go with --weights"),
    ("resnet --epochs 3", "--epochs does not go with --extractor"),
    ("convmixer --epochs 0", "--epochs 0 must be at least 1"),
    ("convmixer --batch-size 0", "--batch-size 0 must be at least 1"),
    ("convmixer --lr nan", "--lr nan must be in 0..1, not 0"),
    ("convmixer --lr 1.1", "--lr 1.1 must be in 0..1, not 0"),
    ("convmixer --seed -1", "--seed -1 must be in 0..2^32-1"),
    ("convmixer --checkpoint-every nan", "--checkpoint-every nan must be"),
    ("convmixer --device cuda:99", "--device cuda:99 is not on this machine"),
    ("convmixer --overwrite", "unrecognized arguments: --overwrite"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_bad_option(
    folder: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    (folder / "folder.npz").mkdir()
    (folder / "there.npz").touch()
    start, *more = options.split()
    base = {"convmixer": CONVMIXER, "resnet": RESNET}.get(start, [start])
    assert message in refused(capsys, [*base, *more])


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc to fail to write to")
def test_unwritable_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/proc cannot be written to" in refused(capsys, [*CONVMIXER, "--out", "/proc/f.npz"])


def test_data_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the images to embed nor those to pretrain on; no subset stands in for MNIST."""
    small = data.load
    for absent in ("mnist", "fashion-mnist"):

        def load_or_fail(name: str, root: Path, strict: bool, absent: str = absent):
            assert strict
            if name == absent:
                raise data.UserError(f"{name} is neither in {root} nor to be downloaded")
            return small(name, root)

        monkeypatch.setattr(data, "load", load_or_fail)
        said = refused(capsys, [*CONVMIXER, "--dataset", "mnist"])
        assert f"{absent} is neither in" in said


def test_weights_that_know_the_labels_or_are_unfinished(
    stop_after: StopAfter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(CONVMIXER) == 0
    weights = ["--weights", "f.convmixer.safetensors", "--out", "g.npz", "--extractor", "convmixer"]
    said = refused(capsys, [*weights, "--dataset", "cifar100"])
    assert "must not have seen the labels" in said
    stop_after(1)
    assert embed.main([*CONVMIXER, "--out", "h.npz"]) == 130
    said = refused(capsys, [*CONVMIXER[:4], "--weights", "h.convmixer.safetensors", *weights[2:4]])
    assert "unfinished pretraining" in said


def test_divergence_and_features_that_are_not_finite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = torch.tensor(float("nan")), torch.tensor(0)
    with monkeypatch.context() as patch:
        patch.setattr(convmixer.Pretrainer, "_train", lambda self, *arguments: nan)
        assert "--lr 0.01 makes the loss nan" in refused(capsys, CONVMIXER)
    monkeypatch.setattr(
        convmixer.ConvMixer, "embed", lambda self, x: torch.full((len(x), 8), torch.inf)
    )
    monkeypatch.setattr(convmixer.Pretrainer, "run", lambda self, *arguments: self.model)
    assert "not finite" in refused(capsys, CONVMIXER)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_too_little_memory(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object, *arguments: object) -> None:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(convmixer.Pretrainer, "run", fail)
    assert "--batch-size 16 does not fit into the memory of cpu" in refused(capsys, CONVMIXER)


def test_signal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A real Ctrl-C during pretraining, with the arguments of the process."""
    step = convmixer.Pretrainer._train

    def interrupt(self: convmixer.Pretrainer, *arguments: torch.Tensor):
        if self.step == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(convmixer.Pretrainer, "_train", interrupt)
    monkeypatch.setattr(sys, "argv", ["embed", *CONVMIXER, "--epochs", "3"])
    assert embed.main() == 130
    assert "--epochs 3 --resume" in capsys.readouterr().err
    _, state = convmixer.read(Path("f.convmixer.safetensors"), torch.device("cpu"))
    assert state["step"] == 2
    assert not state["finished"]


@pytest.mark.cuda
def test_cuda() -> None:
    """Features of bf16 autocast are near those of fp32, by the same weights."""
    assert embed.main(CONVMIXER) == 0
    weights = [*CONVMIXER[:4], "--weights", "f.convmixer.safetensors", "--out", "g.npz"]
    assert embed.main([*weights, "--device", "cuda"]) == 0
    cpu, cuda = (load("features", Path(), Path(name)) for name in ("f.npz", "g.npz"))
    torch.testing.assert_close(cuda.x_train, cpu.x_train, rtol=0.05, atol=0.05)
    assert embed.main([*CONVMIXER, "--out", "h.npz", "--device", "cuda"]) == 0


def test_what_another_version_left_is_not_gone_on_with(
    stop_after: StopAfter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(1)
    assert embed.main(CONVMIXER) == 130
    stop_after(1000)
    with monkeypatch.context() as patch:
        patch.setattr(convmixer, "ALGORITHM", 0)
        said = refused(capsys, [*CONVMIXER, "--resume"])
        assert "is of another pretraining (algorithm 1, now 0)" in said
    assert embed.main([*CONVMIXER, "--resume"]) == 0
    monkeypatch.setattr(embedding, "ALGORITHM", 0)
    assert "is of another command (algorithm 1, now 0" in refused(capsys, [*CONVMIXER, "--resume"])


def test_other_weights_of_the_same_description(capsys: pytest.CaptureFixture[str]) -> None:
    """A file of weights is known by its content."""
    assert embed.main(CONVMIXER) == 0
    weights = ["--weights", "f.convmixer.safetensors", "--out", "g.npz", "--device", "cpu"]
    again = [*CONVMIXER[:4], *weights, "--batch-size", "16"]
    assert embed.main(again) == 0
    path = Path("f.convmixer.safetensors")
    tensors, state = convmixer.read(path, torch.device("cpu"))
    tensors["model.classifier.bias"] += 1
    convmixer.save_checkpoint(path, tensors, state)
    assert "is of another command (weights_crc32 " in refused(capsys, [*again, "--resume"])
