"""Results do not depend on torch's default device: factories name theirs."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd import data as datasets
from ssd.config import Config
from ssd.data import Dataset, class_order, hold_out, split
from ssd.embed.convmixer import Pretrainer, Settings, load_weights
from ssd.embed.images import Images
from ssd.learner import Learner, build_model
from ssd.peers import learners
from ssd.runs import RunOptions, run
from ssd.trainer import Trainer

CPU = torch.device("cpu")


def make_data() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(80, device="cpu") % 4
    x = torch.rand(80, 9, generator=draw, device="cpu") + torch.eye(4, 9, device="cpu")[y]
    return Dataset("blobs", x, y, x, y)


CONFIG = Config(
    neurons=300,
    k=3,
    tasks=2,
    epochs=3,
    batch_size=20,
    anneal_samples=40,
    lr=0.3,
    seed=5,
)


def trained(**settings: object) -> Iterable[Tensor]:
    config, data = replace(CONFIG, **settings), make_data()
    tasks = split(hold_out(data, 0.2), 2, class_order(4, config.seed))
    trainer = Trainer([Learner(config, tasks, build_model(config, 9, 4))])
    for _ in trainer.run():
        pass
    return trainer.state()[0].values()


def evaluated(name: str) -> Iterable[Tensor]:
    data = make_data()
    (entry,) = (e for e in learners.entries(9, 40) if e.name == name)
    learner = entry.make(9, 4, 40, 0, entry.early[0])
    return [learners.evaluate_stream(learner, split(data, 2, class_order(4, 1)))]


def pretrained(folder: Path) -> Iterable[Tensor]:
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (8, 1, 8, 8), generator=draw, dtype=torch.uint8, device="cpu")
    images = Images("noise", pixels, torch.arange(8, device="cpu") % 2, flip=True)
    path = folder / "weights"
    Pretrainer(images, Settings(epochs=1, batch_size=4), CPU, path).run(60.0)
    return load_weights(path, CPU)[0].state_dict().values()


def equal_elsewhere(make: Callable[[], Iterable[Tensor]]) -> None:
    expected = list(make())
    with torch.device("meta"):
        found = list(make())
    assert expected
    for a, b in zip(expected, found, strict=True):
        assert b.device == CPU
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ssd+ewc+si"},
        {"method": "ssd+mas+l2", "schedule": "linear", "inhibition": "mask", "momentum": 0.9},
        {"method": "ssd", "schedule": "flat", "logits": "seen", "hidden": "before"},
        {"method": "topk-mlp+lwf"},
        {"method": "naive+ewc"},
    ],
    ids=str,
)
def test_training(settings: dict[str, object]) -> None:
    equal_elsewhere(lambda: trained(**settings))


@pytest.mark.parametrize("name", [entry.name for entry in learners.entries(9, 40)])
def test_peers(name: str) -> None:
    equal_elsewhere(lambda: evaluated(name))


def test_pretraining(tmp_path: Path) -> None:
    folders = iter((tmp_path / "here", tmp_path / "elsewhere"))

    def make() -> Iterable[Tensor]:
        folder = next(folders)
        folder.mkdir()
        return pretrained(folder)

    equal_elsewhere(make)


def test_a_run_and_its_data(tmp_path: Path) -> None:
    data = make_data()
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "f.npz", **{name: getattr(data, name).numpy() for name in names})
    folders = iter((tmp_path / "here", tmp_path / "elsewhere"))

    def make() -> Iterable[Tensor]:
        config = replace(CONFIG, dataset="features", features=str(tmp_path / "f.npz"))
        loaded = datasets.load("features", tmp_path, tmp_path / "f.npz")
        summary = run(config, loaded, next(folders), RunOptions(CPU))
        return [loaded.x_train, torch.tensor(summary["accuracy_matrix"], device="cpu")]

    equal_elsewhere(make)
