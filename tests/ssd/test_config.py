"""Settings: what is refused, and what the presets hold."""

from dataclasses import replace
from math import inf, nan

import pytest

from ssd.config import DATASETS, PRESETS, Config, option, preset
from ssd.errors import UserError


def test_defaults_and_presets_are_valid() -> None:
    Config().validate()
    for name in PRESETS:
        for dataset in DATASETS:
            Config(**{"dataset": dataset, **preset(name, dataset)}).validate()


BAD = [
    ("epochs", 0), ("epochs", 2**31), ("batch_size", -1), ("tasks", 0), ("neurons", 0), ("k", 0),
    ("k", 1001), ("lr", 0.0), ("lr", nan), ("lr", inf), ("alpha", 1.1), ("alpha", -0.1),
    ("lam", nan), ("temperature", 0.0), ("momentum", 1.0), ("validation", 1.0),
    ("ewc_coefficient", -1.0), ("ewc_coefficient", inf), ("ewc_beta", nan), ("seed", -1),
    ("seed", 2**63), ("subnetwork", 0.5), ("subnetwork", 101.0), ("subnetwork", nan),
    ("anneal_samples", 0), ("eval_every", 0), ("method", "sgd"), ("kl", "both"),
    ("epochs", "20"), ("epochs", 1.5), ("lr", "fast"), ("method", None), ("features", 3),
    ("seed", True), ("mas_coefficient", -0.5), ("si_coefficient", nan), ("si_beta", inf),
    ("l2_coefficient", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        replace(Config(), **{name: value}).validate()
    assert str(caught.value).startswith(f"{option(name)} {value} must be ")


def test_edges_are_allowed() -> None:
    for changes in (
        {"k": 1000, "subnetwork": 1.0},
        {"alpha": 0.0, "lam": 1.0},
        {"subnetwork": 100.0},
        {"seed": 2**63 - 1},
        {"lr": 1},
    ):
        replace(Config(), **changes).validate()


def test_parts() -> None:
    assert Config(method="sdmlp").parts == frozenset()
    assert Config(method="ssd+ewc").parts == {"ssd", "ewc"}


def test_unknown_preset_and_dataset() -> None:
    with pytest.raises(UserError, match="--preset fast is unknown"):
        preset("fast", "mnist")
    with pytest.raises(UserError, match="--dataset mnits is unknown"):
        preset("quick", "mnits")
