"""How a network's structure changes over tasks: subnetworks, their overlap, coverage.

    recorder = StructureRecorder(size=10)
    for x_train, y_train in tasks:
        ...  # training
        recorder.end_task(model, x, frequency)  # x: the same every time; frequency on x_train
    recorder.summary()  # JSON-able, one value per task
    recorder.save(folder / STRUCTURE)  # the figures read it

The measures are in ssd.metrics.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ssd import metrics
from ssd.activations import activations_of, count_activations, evaluating
from ssd.distillation import select_subnetwork
from ssd.errors import UserError, one_line
from ssd.models import SDMLP
from ssd.storage.files import write_atomically

RANK_SAMPLES = 500  # inputs for the effective rank, drawn without replacement with seed 0


@dataclass(frozen=True)
class Snapshot:
    """The structure of a network at the end of a task; tensors on the CPU."""

    neurons: Tensor  # [n] int64, ascending: the subnetwork
    addresses: Tensor  # [n, d], those of the subnetwork
    frequency: Tensor  # [R] float64, on the task's training set
    effective_rank: Tensor  # 0-d float64, of the inputs' code
    used_fraction: Tensor  # 0-d float64, on the inputs


def measure(model: SDMLP, x: Tensor, frequency: Tensor, size: int) -> Snapshot:
    """Measures a network's structure; leaves its counters and mode as they are.

    Args:
        model: the network.
        x: [N, d] inputs for coverage, N >= 1, on the model's device. The effective rank takes at
            most RANK_SAMPLES of them, and cannot exceed their number.
        frequency: [R] activation frequency of the task.
        size: n, the most frequent neurons are the subnetwork.

    Raises:
        ValueError: no inputs, a frequency of another length, or a size outside 1..R.
    """
    weight = model.encoder.weight.detach()
    if len(x) == 0:
        raise ValueError("the inputs for coverage are empty")
    if frequency.shape != weight.shape[:1]:
        raise ValueError(f"frequency {list(frequency.shape)} is not [{len(weight)}]")
    if not 1 <= size <= len(weight):
        raise ValueError(f"size={size} must lie in 1..{len(weight)}, the number of neurons")
    neurons = select_subnetwork(frequency.cpu(), size)
    counts = count_activations(model, ["encoder"], x)["encoder"]
    rank = _effective_rank(model, x, counts.nonzero()[:, 0])
    used = metrics.used_fraction(counts.double() / len(x))
    numbers = torch.tensor([rank, used], dtype=torch.float64, device="cpu")
    addresses = weight[neurons.to(weight.device)].cpu()
    return Snapshot(neurons, addresses, frequency.double().cpu(), *numbers)


def _effective_rank(model: SDMLP, x: Tensor, active: Tensor) -> float:
    """Of the code of a sample of x [N, d], on the neurons [m] that are active on x."""
    if len(active) == 0:
        return 0.0
    draw = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(x), generator=draw, device="cpu")[:RANK_SAMPLES]
    with evaluating(model):
        output = model.encoder(model.address(x[rows.to(x.device)]))
        return metrics.effective_rank(activations_of(output, active))


def compare(now: Snapshot, before: Snapshot) -> dict[str, float | None]:
    """How two structures of one network differ.

    Returns:
        jaccard: of the subnetworks.
        kl_bits: KL(now || before) of the frequencies.
        address_cosine: of the subnetworks' mean addresses.
        shared_address_cosine: mean cosine between the two addresses of a shared neuron; None
            where no neuron is shared.
    """
    shared = metrics.shared_address_cosine(
        now.neurons, now.addresses, before.neurons, before.addresses
    )
    return {
        "jaccard": metrics.jaccard(now.neurons, before.neurons),
        "kl_bits": metrics.kl_divergence(now.frequency, before.frequency),
        "address_cosine": metrics.address_cosine(now.addresses, before.addresses),
        "shared_address_cosine": shared.mean().item() if len(shared) else None,
    }


class StructureRecorder:
    """Takes a Snapshot after each task.

    Args:
        size: n, neurons in the subnetwork.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.snapshots: list[Snapshot] = []

    def end_task(self, model: SDMLP, x: Tensor, frequency: Tensor) -> None:
        """See measure(). x must be the same after every task: coverage grows with its length."""
        self.snapshots.append(measure(model, x, frequency, self.size))

    def summary(self) -> dict[str, Any]:
        """One value per task in JSON-able lists; comparisons are with the task before.

        mean_entropy_bits and dead_fraction describe the frequency; see Snapshot and compare() for
        the other keys. Comparisons of the first task are None.
        """
        first = dict.fromkeys(("jaccard", "kl_bits", "address_cosine", "shared_address_cosine"))
        compared = [first, *map(compare, self.snapshots[1:], self.snapshots[:-1])]
        return {
            "subnetwork_size": self.size,
            "mean_entropy_bits": [
                metrics.activation_entropy(s.frequency).mean().item() for s in self.snapshots
            ],
            "dead_fraction": [metrics.dead_fraction(s.frequency) for s in self.snapshots],
            "effective_rank": [s.effective_rank.item() for s in self.snapshots],
            "used_fraction": [s.used_fraction.item() for s in self.snapshots],
            **{name: [c[name] for c in compared[: len(self.snapshots)]] for name in first},
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The snapshots, stacked over tasks: {field of Snapshot: [T, ..]}; empty at the start."""
        if not self.snapshots:
            return {}
        return {
            f.name: torch.stack([getattr(s, f.name) for s in self.snapshots])
            for f in fields(Snapshot)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what state_dict returned.

        Raises:
            KeyError: a part is missing.
            ValueError: the subnetworks have another size.
        """
        if not state:
            self.snapshots = []
            return
        stacks = [state[f.name].cpu() for f in fields(Snapshot)]
        size = state["neurons"].shape[1]
        if size != self.size:
            raise ValueError(f"the record is of subnetworks of {size} neurons, not {self.size}")
        self.snapshots = [Snapshot(*parts) for parts in zip(*stacks, strict=True)]

    def save(self, path: Path) -> None:
        """Writes state_dict() as a compressed .npz."""
        stream = io.BytesIO()
        arrays = {name: tensor.numpy() for name, tensor in self.state_dict().items()}
        np.savez_compressed(stream, **cast(Any, arrays))
        write_atomically(path, stream.getvalue())


def load_structure(path: Path) -> StructureRecorder:
    """Reads what StructureRecorder.save wrote.

    Raises:
        UserError: the file is missing or damaged, or holds no task.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; train the run to its end with this version")
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: torch.from_numpy(file[name]) for name in file.files}
        sizes = [len(state[f.name]) for f in fields(Snapshot)]
        tasks, size = state["neurons"].shape
        if set(sizes) != {tasks} or tasks == 0 or state["addresses"].shape[:2] != (tasks, size):
            raise ValueError(f"its parts are of {sizes} tasks")
        recorder = StructureRecorder(size)
        recorder.load_state_dict(state)
    except Exception as error:  # a damaged archive raises nearly anything
        raise UserError(f"{path} is damaged ({one_line(error)}); train the run again") from error
    return recorder
