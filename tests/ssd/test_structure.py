"""Snapshots of a network made by hand, the recorder, and its file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssd import metrics
from ssd.errors import UserError
from ssd.models import SDMLP
from ssd.storage.checkpoint import load_checkpoint, save_checkpoint
from ssd.structure import RANK_SAMPLES, StructureRecorder, compare, load_structure, measure


def one_hot(neurons: int = 6, schedule: str = "flat") -> SDMLP:
    """Neuron j fires for input j alone."""
    model = SDMLP(neurons, neurons, 2, 1, schedule=schedule, anneal_samples=10**9)
    with torch.no_grad():
        model.encoder.weight.copy_(torch.eye(neurons))
    return model


def drawn(seed: int, schedule: str = "flat", neurons: int = 40) -> SDMLP:
    generator = torch.Generator().manual_seed(seed)
    return SDMLP(8, neurons, 3, 4, schedule=schedule, anneal_samples=50, generator=generator)


def record(seed: int, tasks: int, size: int = 5) -> StructureRecorder:
    recorder = StructureRecorder(size)
    for task in range(tasks):
        x = torch.rand(60, 8, generator=torch.Generator().manual_seed(seed + task))
        frequency = x.repeat(1, 5).mean(0) * (torch.arange(40) % (task + 2) > 0)
        recorder.end_task(drawn(seed + task), x, frequency)
    return recorder


def test_measure_by_hand() -> None:
    frequency = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.2, 0.0])
    x = torch.eye(6)[[2, 3, 4, 2, 3, 4]]
    snapshot = measure(one_hot(), x, frequency, 2)
    assert snapshot.neurons.tolist() == [2, 3]  # the tie of 3 and 4 goes to the lower
    assert torch.equal(snapshot.addresses, torch.eye(6)[[2, 3]])
    assert torch.equal(snapshot.frequency, frequency.double())
    assert snapshot.effective_rank.item() == pytest.approx(3)
    assert snapshot.used_fraction.item() == 0.5


def test_used_fraction_takes_in_every_input() -> None:
    rows = torch.zeros(4000, dtype=torch.int64)
    rows[:3], rows[3:7] = 1, 2  # neuron 1 is active for 3 of 4,000 inputs, neuron 2 for 4
    snapshot = measure(one_hot(), torch.eye(6)[rows], torch.ones(6), 1)
    assert snapshot.used_fraction.item() == pytest.approx(2 / 6)


@pytest.mark.parametrize("schedule", ["flat", "gaba"])
def test_effective_rank_is_that_of_the_whole_code(schedule: str) -> None:
    model, x = drawn(3, schedule), torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.encoder.counts.fill_(40)  # gaba: halfway, so the code is dense
        score = model.address(x) @ model.encoder.weight.T
        threshold = score.topk(5).values[:, -1:]
        response = 0.6 if schedule == "gaba" else 1.0
        code = (score - response * threshold).relu()
    snapshot = measure(model, x, torch.ones(40), 1)
    assert snapshot.effective_rank.item() == pytest.approx(metrics.effective_rank(code), rel=1e-5)


def test_effective_rank_of_many_inputs_is_of_a_fixed_sample() -> None:
    x = torch.rand(RANK_SAMPLES + 500, 8, generator=torch.Generator().manual_seed(0))
    model, rows = drawn(3), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    ranks = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the sample does not depend on it
        ranks.append(measure(model, x, torch.ones(40), 1).effective_rank.item())
    sample = measure(model, x[rows[:RANK_SAMPLES]], torch.ones(40), 1).effective_rank.item()
    assert ranks[0] == ranks[1] == pytest.approx(sample)


@pytest.mark.parametrize("schedule", ["flat", "gaba", "linear"])
@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(schedule: str, training: bool) -> None:
    model = drawn(0, schedule).train(training)
    model(torch.rand(20, 8))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    measure(model, torch.rand(30, 8, generator=torch.Generator().manual_seed(1)), torch.ones(40), 4)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_a_snapshot_outlives_training() -> None:
    model = drawn(0)
    snapshot = measure(model, torch.rand(5, 8), torch.ones(40), 40)
    before = snapshot.addresses.clone()
    with torch.no_grad():
        model.encoder.weight.zero_()
    assert torch.equal(snapshot.addresses, before)


def test_a_network_in_which_nothing_fires() -> None:
    snapshot = measure(one_hot(), torch.zeros(4, 6), torch.zeros(6), 2)
    assert snapshot.effective_rank == snapshot.used_fraction == 0


@pytest.mark.parametrize(
    ("x", "frequency", "size", "reason"),
    [
        (torch.zeros(0, 6), torch.ones(6), 2, "inputs for coverage are empty"),
        (torch.ones(2, 6), torch.ones(7), 2, r"frequency \[7\] is not \[6\]"),
        (torch.ones(2, 6), torch.ones(6), 0, r"size=0 must lie in 1\.\.6"),
        (torch.ones(2, 6), torch.ones(6), 7, r"size=7 must lie in 1\.\.6"),
    ],
)
def test_measure_refuses(x: Tensor, frequency: Tensor, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        measure(one_hot(), x, frequency, size)


def test_compare_by_hand() -> None:
    x = torch.eye(6)
    turned = one_hot()
    with torch.no_grad():
        turned.encoder.weight[2] = torch.tensor([0.0, 0.0, 0.6, 0.8, 0.0, 0.0])
    before = measure(one_hot(), x, torch.tensor([0.0, 0.5, 0.5, 0.0, 0.0, 0.0]), 2)  # 1, 2
    now = measure(turned, x, torch.tensor([0.0, 0.0, 0.5, 0.0, 0.5, 0.0]), 2)  # 2, 4
    found = compare(now, before)
    assert found["jaccard"] == pytest.approx(1 / 3)
    # Means (0, .5, .5, 0, 0, 0) and (0, 0, .3, .4, .5, 0).
    assert found["address_cosine"] == pytest.approx(0.15 / (0.5**0.5 * 0.5**0.5))
    assert found["shared_address_cosine"] == pytest.approx(0.6)  # neuron 2
    assert found["kl_bits"] == metrics.kl_divergence(now.frequency, before.frequency)
    apart = measure(one_hot(), x, torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0]), 2)
    assert compare(apart, before)["shared_address_cosine"] is None
    same = compare(before, before)
    assert same["jaccard"] == 1
    assert same["kl_bits"] == 0
    assert same["address_cosine"] == pytest.approx(1)
    assert same["shared_address_cosine"] == pytest.approx(1)


def test_summary_has_one_value_a_task() -> None:
    recorder = record(0, 3)
    summary = recorder.summary()
    assert summary.pop("subnetwork_size") == 5
    for values in summary.values():
        assert len(values) == 3
    for name in ("jaccard", "kl_bits", "address_cosine", "shared_address_cosine"):
        assert summary[name][0] is None
        for task in (1, 2):
            now, before = recorder.snapshots[task], recorder.snapshots[task - 1]
            assert summary[name][task] == compare(now, before)[name]
    frequency = torch.stack([s.frequency for s in recorder.snapshots])
    assert summary["mean_entropy_bits"] == pytest.approx(
        metrics.activation_entropy(frequency).mean(-1).tolist()
    )
    assert summary["dead_fraction"] == [20 / 40, 14 / 40, 10 / 40]
    assert json.loads(json.dumps(summary)) == summary


def test_summary_before_the_first_task() -> None:
    summary = StructureRecorder(5).summary()
    assert summary.pop("subnetwork_size") == 5
    assert all(values == [] for values in summary.values())


@pytest.mark.parametrize("tasks", [0, 1, 3])
def test_resumed_recorder_goes_on_as_if_never_stopped(tmp_path: Path, tasks: int) -> None:
    through = record(0, 4)
    save_checkpoint(tmp_path / "checkpoint", record(0, tasks).state_dict(), {})
    tensors, _ = load_checkpoint(tmp_path / "checkpoint", torch.device("cpu"))
    resumed = record(7, 2)  # what it held before is gone
    resumed.load_state_dict(tensors)
    assert len(resumed.snapshots) == tasks
    resumed.snapshots += through.snapshots[tasks:]
    assert resumed.summary() == through.summary()
    for name, stack in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], stack)
        assert resumed.state_dict()[name].dtype == stack.dtype


def test_load_refuses_another_size_and_missing_parts() -> None:
    state = record(0, 2).state_dict()
    with pytest.raises(ValueError, match="subnetworks of 5 neurons, not 6"):
        StructureRecorder(6).load_state_dict(state)
    del state["addresses"]
    with pytest.raises(KeyError, match="addresses"):
        StructureRecorder(5).load_state_dict(state)


def test_file_round_trip(tmp_path: Path) -> None:
    recorder, path = record(0, 3), tmp_path / "structure.npz"
    recorder.save(path)
    assert load_structure(path).summary() == recorder.summary()
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].shape for name in file.files} == {
            "neurons": (3, 5),
            "addresses": (3, 5, 8),
            "frequency": (3, 40),
            "effective_rank": (3,),
            "used_fraction": (3,),
        }


def test_a_missing_or_damaged_file_is_the_users(tmp_path: Path) -> None:
    path = tmp_path / "structure.npz"
    with pytest.raises(UserError, match="is missing"):
        load_structure(path)
    record(0, 2).save(path)
    content = path.read_bytes()
    for damaged in (b"", content[:-40], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_structure(path)
    np.savez(path, neurons=np.zeros((2, 5)))
    with pytest.raises(UserError, match="is damaged"):
        load_structure(path)
