"""The seeds of class order, initial weights and batch order, each on its own."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from kill_resume import write_features
from torch import Tensor

from ssd.config import Config
from ssd.data import Dataset, class_order, load, shuffled
from ssd.learner import Learner
from ssd.models import NETWORKS
from ssd.runs import RunOptions, make_learner, make_tasks, run
from ssd.storage.run_folder import METRICS
from ssd.study import Evaluation, Run
from ssd.trainer import Trainer

CPU = RunOptions(torch.device("cpu"), checkpoint_every=1e9)
SMALL = Config(
    dataset="features",
    method="ssd+ewc",
    tasks=2,
    epochs=2,
    batch_size=32,
    neurons=32,
    k=3,
    anneal_samples=300,
    eval_every=1,
    seed=1,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four classes of one size, so that the batch order does not depend on the class order."""
    path = tmp_path_factory.mktemp("features") / "f.npz"
    write_features(path, 256)
    return load("features", path.parent, path)


def learner_of(config: Config, data: Dataset) -> Learner:
    config.validate()
    return make_learner(config, make_tasks(config, data), data.classes, CPU.device)


def aspects(config: Config, data: Dataset) -> dict[str, list[Tensor]]:
    """What the seeds decide."""
    learner = learner_of(config, data)
    places = [(task, epoch) for task in range(2) for epoch in (-1, 0, 1)]
    return {
        "classes": [torch.tensor(task.classes) for task in learner.tasks],
        "weights": [p.detach() for p in learner.parameters],
        "batches": [learner.order(*place) for place in places],
    }


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["ssd", "relu-mlp"])
@pytest.mark.parametrize(
    ("changes", "changed"),
    [
        ({"order_seed": 3}, "classes"),
        ({"weight_seed": 3}, "weights"),
        ({"seed": 3, "order_seed": 1, "weight_seed": 1}, "batches"),
    ],
)
def test_a_seed_changes_its_own_aspect_alone(
    data: Dataset, method: str, changes: dict[str, int], changed: str
) -> None:
    config = replace(SMALL, method=method)
    before, after = aspects(config, data), aspects(replace(config, **changes), data)
    assert [name for name in before if not equal(before[name], after[name])] == [changed]


def test_seed_decides_what_is_not_given(data: Dataset) -> None:
    found = aspects(SMALL, data)
    drawn = NETWORKS["sdmlp"].build(
        in_features=16,
        classes=4,
        generator=torch.Generator().manual_seed(1),
        **{name: getattr(SMALL, name) for name in NETWORKS["sdmlp"].settings},
    )
    assert torch.cat(found["classes"]).tolist() == class_order(4, 1)
    assert equal(found["weights"], [p.detach() for p in drawn.parameters()])
    assert torch.equal(found["batches"][1], shuffled(128, 1, 0, 1, device=CPU.device))
    assert make_tasks(replace(SMALL, order_seed=0), data)[0].classes == (0, 1)


def test_results_follow_the_seeds_whether_given_or_not(tmp_path: Path, data: Dataset) -> None:
    given = replace(SMALL, order_seed=1, weight_seed=1)
    other = replace(given, order_seed=3)
    summaries = [run(c, data, tmp_path / str(n), CPU) for n, c in enumerate((SMALL, given, other))]
    logs = [(tmp_path / str(n) / METRICS).read_bytes() for n in range(3)]
    assert logs[0] == logs[1] != logs[2]
    assert summaries[0]["structure"] == summaries[1]["structure"] != summaries[2]["structure"]
    shown = [list(chain(*summary["classes_per_task"])) for summary in summaries]
    assert shown == [class_order(4, 1), class_order(4, 1), class_order(4, 3)]
    assert summaries[2]["config"]["order_seed"] == 3


def test_side_by_side_as_alone(data: Dataset) -> None:
    configs = [SMALL, *(replace(SMALL, order_seed=o, weight_seed=w) for o, w in ((3, 1), (0, 3)))]
    ends = []
    for group in (configs, *([config] for config in configs)):
        trainer = Trainer([learner_of(config, data) for config in group])
        for _ in trainer.run():
            pass
        ends += [[p.detach() for p in learner.parameters] for learner in trainer.learners]
    for side_by_side, alone in zip(ends[:3], ends[3:], strict=True):
        assert equal(side_by_side, alone)
    assert not equal(ends[0], ends[1])


def test_a_run_of_another_kind_has_a_folder_for_each_class_order(
    tmp_path: Path, data: Dataset
) -> None:
    peer = Evaluation("peer", lambda tasks: torch.eye(2), 0, {}, 1, trains=False)
    configs = [SMALL, replace(SMALL, order_seed=3), replace(SMALL, order_seed=2)]
    folders = {Run("", config, data, tmp_path, peer).folder for config in configs}
    assert len(folders) == 3
