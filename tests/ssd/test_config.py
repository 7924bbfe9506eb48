"""Settings: what is refused, and what the presets hold."""

import hashlib
import json
from dataclasses import fields, replace
from inspect import signature
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssd.config import (
    EVERYDAY,
    EVERYDAY_EPOCHS,
    PENALTIES,
    PRESETS,
    PROTOCOLS,
    TYPICAL_SAMPLES,
    Config,
    hints,
    option,
    penalty_settings,
    preset,
    resolve,
)
from ssd.data import SOURCES, Dataset
from ssd.errors import UserError
from ssd.storage import run_folder
from ssd.storage.files import dumps

# Training samples of the first task in class order, at least.
SAMPLES = {
    "mnist": 12_665,
    "fashion-mnist": 12_000,
    "mnist-5k": 800,
    "cifar10": 10_000,
    "cifar100": 1_000,
    "features": 10_000,
}


def test_defaults_and_presets_are_valid() -> None:
    Config().validate()
    for name in PRESETS:
        for dataset in PROTOCOLS:
            samples = SAMPLES[dataset] * SOURCES[dataset].tasks
            config = resolve({"preset": name, "dataset": dataset}, samples)
            config.validate()
            assert hints(config, SAMPLES[dataset]) == []


def test_the_everyday_preset_goes_by_the_samples_of_a_task() -> None:
    def sized(samples: int, **given: Any) -> tuple[int, int, int]:
        found = resolve({"dataset": "features", "features": "f.npz", **given}, samples)
        return found.epochs, found.anneal_samples, found.eval_every

    least, most = EVERYDAY_EPOCHS
    assert sized(5 * 12_800) == (6, 38_400, 3)  # 600 steps of 128 samples; half of 6 x 12,800
    assert sized(5 * 1_280) == (60, 38_400, 30)
    assert sized(5 * 1_280, validation=0.5) == (most, 32_000, most // 2)
    assert sized(5_000_000) == (least, 1_500_000, 1)
    assert sized(10) == (most, most, most // 2)
    assert sized(10 * 12_800, tasks=10, batch_size=256) == (12, 76_800, 6)
    assert sized(5 * 800, epochs=5) == (5, 2_000, 2)
    assert sized(5 * 800, anneal_samples=7, eval_every=9) == (96, 7, 9)
    assert resolve({}) == resolve({"preset": EVERYDAY}, 5 * TYPICAL_SAMPLES)
    assert resolve({"preset": "paper-1k"}, 10) == resolve({"preset": "paper-1k"})
    assert resolve({"k": 0}).k == 0  # validate() refuses it


@pytest.mark.parametrize(
    ("name", "epochs", "neurons", "k"),
    [
        ("paper-1k", 2000, 1_000, 10),
        ("paper-10k", 2000, 10_000, 10),
        ("paper-1k-k1", 2000, 1_000, 1),
        ("paper-10k-k1", 2000, 10_000, 1),
        ("sdmlp-1k", 500, 1_000, 10),
        ("sdmlp-10k", 500, 10_000, 10),
        ("sdmlp-1k-k1", 500, 1_000, 1),
        ("sdmlp-10k-k1", 500, 10_000, 1),
    ],
)
def test_full_protocols(name: str, epochs: int, neurons: int, k: int) -> None:
    for dataset in PROTOCOLS:
        config = resolve({"preset": name, "dataset": dataset})
        assert config.epochs == (epochs if "mnist" in dataset else 2000)
        assert (config.neurons, config.k) == (neurons, k)
        assert config.subnetwork == (2 if k == 1 else 1)
    switch = resolve({"preset": name}).anneal_samples
    assert switch == (500_000 if k == 1 else 5_000_000)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != EVERYDAY])
def test_feature_file_of_50_tasks_is_cifar100(name: str) -> None:
    given = {"preset": name, "features": "cifar100.npz", "tasks": 50}
    assert resolve(given) == replace(
        resolve({"preset": name, "dataset": "cifar100"}),
        dataset="features",
        features="cifar100.npz",
    )
    five = resolve({**given, "tasks": 5})
    assert five == resolve({"preset": name, "features": "cifar100.npz"})
    assert five.anneal_samples >= resolve(given).anneal_samples


def test_hints() -> None:
    one = Config(k=1)
    assert hints(one, 12_000) == [
        "a subnetwork of one neuron has nothing to distil; use --subnetwork 2"
    ]
    for fine in ({"subnetwork": 2.0}, {"lam": 0.0}, {"method": "lwf"}, {"k": 2}):
        assert hints(replace(one, **fine), 12_000) == []
    early = Config(epochs=20, anneal_samples=100_000)
    assert hints(early, 5_000) == []
    for schedule in ("gaba", "linear"):
        [line] = hints(replace(early, schedule=schedule), 4_999)
        assert "--anneal-samples 100,000 is more than the 99,980 that the first task" in line
        assert "\n" not in line
    for flat in ({"schedule": "flat"}, {"method": "relu-mlp"}, {"method": "topk-mlp"}):
        assert hints(replace(early, **flat), 4_999) == []


BAD: dict[str, list[object]] = {
    "epochs": [0, 2**31, "20", 1.5],
    "batch_size": [-1],
    "tasks": [0],
    "neurons": [0],
    "k": [0, 1001],
    "lr": [0.0, nan, inf, "fast"],
    "alpha": [1.1, -0.1],
    "lam": [nan],
    "temperature": [0.0],
    "momentum": [1.0],
    "validation": [1.0],
    "ewc_coefficient": [-1.0, inf],
    "ewc_beta": [nan],
    "mas_coefficient": [-0.5],
    "si_coefficient": [nan],
    "si_beta": [inf],
    "l2_coefficient": [-1.0],
    "seed": [-1, 2**63, True, None],
    "order_seed": [-1, 2**63, True, "3", 1.5],
    "weight_seed": [-1, 2**63, False],
    "subnetwork": [0.5, 101.0, nan],
    "anneal_samples": [0],
    "eval_every": [0],
    "method": ["sgd", None],
    "kl": ["both"],
    "features": [3],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_bad_value(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        replace(Config(), **{name: value}).validate()
    assert str(caught.value).startswith(f"{option(name)} {value} must be ")


def test_edges_are_allowed() -> None:
    for changes in (
        {"k": 1000, "subnetwork": 1.0},
        {"alpha": 0.0, "lam": 1.0},
        {"subnetwork": 100.0},
        {"seed": 2**63 - 1, "order_seed": 0, "weight_seed": 2**63 - 1},
        {"lr": 1},
    ):
        replace(Config(), **changes).validate()


def test_parts() -> None:
    assert Config(method="sdmlp").parts == frozenset()
    assert Config(method="ssd+ewc").parts == {"ssd", "ewc"}


def test_what_acts_on_the_gradients() -> None:
    assert Config(method="ssd+l2+ewc").penalties == ["ewc", "l2"]
    assert Config(method="ssd+ewc", protection="use").penalties == ["ewc", "metaplasticity"]
    assert Config(method="ssd+metaplasticity", protection="use").penalties == ["metaplasticity"]
    for method in ("sdmlp", "lwf", "ewc"):
        assert "metaplasticity" not in Config(method=method, protection="use").penalties


def test_unknown_preset_and_dataset() -> None:
    with pytest.raises(UserError, match="--preset fast is unknown"):
        preset("fast", "mnist")
    with pytest.raises(UserError, match="--dataset mnits is unknown"):
        preset("everyday", "mnits")


SAME = [
    ({"lr": 1}, {"lr": 1.0}),
    ({"momentum": -0.0}, {"momentum": 0}),
    ({"method": "ewc+ssd"}, {"method": "ssd+ewc"}),
    ({"method": "ssd+sdmlp"}, {"method": "ssd"}),
    ({"method": "naive"}, {"method": "relu-mlp"}),
    ({"method": "joint+sdmlp"}, {"method": "joint"}),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_settings_are_written_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Folders of runs are named by the text of their settings."""
    texts = [json.dumps(Config(**given).to_dict()) for given in (one, other)]
    assert texts[0] == texts[1]
    assert Config(**one) == Config(**other) == replace(Config(**one), seed=0)


def test_what_is_no_method_stays_as_it_was_written() -> None:
    for method in ("ewc+sgd", "ewc+ewc", "", "+ssd"):
        config = Config(method=method)
        assert config.method == method
        with pytest.raises(UserError, match="--method"):
            config.validate()
    for value in (10**400, -(10**400)):
        with pytest.raises(UserError, match="--lr"):
            Config(lr=value).validate()


def test_a_dense_network_has_no_layer_to_distil() -> None:
    for part in ("ssd", "lwf"):
        with pytest.raises(UserError, match="ssd and lwf distil its layer"):
            Config(method=f"relu-mlp+{part}").validate()
        Config(method=f"topk-mlp+{part}").validate()


def test_settings_of_a_penalty_are_arguments_of_its_class() -> None:
    assert penalty_settings("ewc") == ["ewc_coefficient", "ewc_beta"]
    for name, penalty in PENALTIES.items():
        arguments = {setting.removeprefix(f"{name}_") for setting in penalty_settings(name)}
        assert arguments <= set(signature(penalty).parameters)


def test_a_new_setting_leaves_runs_from_before_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, declare the new setting with later=True."""
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    described = run_folder.describe(Config(), Dataset("ones", x, y, x, y))
    known = run_folder.identity(described)
    digest = hashlib.sha256(dumps(known, sort_keys=True).encode()).hexdigest()
    assert digest[:10] == "860124ddea"
    added = SimpleNamespace(name="drift", default=0.1, metadata={"later": True})
    monkeypatch.setattr(run_folder, "fields", lambda config: (*fields(config), added))
    for value, same in ((0.1, True), (0.2, False)):
        now = {**described, "config": described["config"] | {"drift": value}}
        assert (run_folder.identity(now) == known) is same
