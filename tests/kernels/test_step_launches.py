"""How many nodes the CUDA graph of a step has, counted without a GPU.

The learners live on the meta device, as in tests/kernels/test_launches.py: a node is a launch of a
Triton kernel, or a torch operator that neither views nor only allocates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import launches
import pytest
import torch
from torch import Tensor

from ssd.config import Config
from ssd.cuda_graph import DENSE, EXACT, GRADED, GraphedEpochs
from ssd.data import Task
from ssd.learner import Learner, build_model
from ssd.models import SDMLP
from ssd.regularizers import Quadratic
from ssd_kernels import _dispatch
from tests.kernels.test_launches import Count

pytestmark = [
    pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(
        _dispatch.interpreted(), reason="Triton's interpreter launches nothing in this process"
    ),
]
B, D, R, K, C, N = 128, 256, 10_000, 10, 10, 1000
BASE = Config(
    dataset="features",
    features="none",
    tasks=2,
    epochs=1,
    batch_size=B,
    neurons=R,
    k=K,
    anneal_samples=1000,
)
DRAW, TALLY = "_draw_kernel", "_tally_kernel"
FLAT = "_halve_kernel _keys_kernel _code_kernel _distill_code_kernel"
CODED = "_halve_kernel _keys_kernel _graded_kernel _distill_code_kernel"
ROWS = "_rank_kernel segment_kernel segment_kernel sum _apply_kernel _apply_kernel"
GRADIENTS = "_rank_kernel segment_kernel segment_kernel"  # of all rows
PULL = "sub addcmul_ sub addcmul_"  # of a penalty, on both matrices
MOVE = "_squares_kernel _dense_apply_kernel _dense_apply_kernel"
# Few rows are ranked in two launches, many in one.
RANK = {1: "_select_kernel _select_kernel", 10: "_select_kernel"}
SCORES = {1: "mm", 10: "bmm"}
STEPS = {
    "flat": (EXACT, {}, f"{DRAW} {FLAT} {ROWS} {TALLY}"),
    "graded": (GRADED, {}, f"{DRAW} {CODED} {ROWS} {TALLY}"),
    "excited": (
        DENSE,
        {},
        f"{DRAW} [scores] [rank] _inhibit_kernel bmm gather _distill_kernel bmm _gate_kernel "
        f"bmm bmm {MOVE} {TALLY}",
    ),
    "no teacher": (EXACT, {"method": "sdmlp"}, f"{DRAW} {FLAT} {ROWS} {TALLY}"),
    "penalty": (EXACT, {"method": "ssd+ewc"}, f"{DRAW} {FLAT} {GRADIENTS} {PULL} {MOVE} {TALLY}"),
    "momentum": (EXACT, {"momentum": 0.9}, f"{DRAW} {FLAT} {GRADIENTS} {MOVE} {TALLY}"),
}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def make_epochs(learners: int, **settings: Any) -> GraphedEpochs:
    """In a task with a teacher."""
    config = replace(BASE, **settings)
    x, y = meta(N, D), meta(N, dtype=torch.int64)
    made = []
    for seed in range(learners):
        own = replace(config, seed=seed)
        task = Task((0, 1), x, y, x, y)
        learner = Learner(own, [task, task], build_model(own, D, C).to("meta"))
        learner.inputs, learner.labels = x, y
        if learner.distiller is not None:
            learner.distiller.neurons = {SDMLP.layer: meta(K, dtype=torch.int64)}
            learner.distiller.teacher_logits = meta(N, C)
            learner.distiller.teacher_hidden = {SDMLP.layer: meta(N, K)}
        for regularizer in learner.regularizers:
            regularizer.tasks = 1
        made.append(learner)
    epochs = GraphedEpochs(made)
    epochs.load_task()
    return epochs


def nodes(epochs: GraphedEpochs, form: str) -> list[str]:
    names: list[str] = []
    with launches.named("sm90", names), Count(names):
        epochs.body(form)
    return names


@pytest.mark.parametrize("learners", [1, 10])
@pytest.mark.parametrize("step", STEPS)
def test_nodes_of_a_step(step: str, learners: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quadratic, "_find_rows", lambda _: None)  # looks at values
    form, settings, expected = STEPS[step]
    if step == "penalty" and learners > 1:
        expected = expected.replace(PULL, " ".join([PULL] * learners))  # each has its own
    if step in ("penalty", "momentum") and learners > 1:
        expected = expected.replace("_rank_kernel", "_rank_kernel _offsets_kernel")
    expected = expected.replace("[rank]", RANK[learners]).replace("[scores]", SCORES[learners])
    assert nodes(make_epochs(learners, **settings), form) == expected.split()


@pytest.mark.parametrize("learners", [1, 10])
@pytest.mark.parametrize(("form", "most"), [(EXACT, 12), (GRADED, 12), (DENSE, 16)])
def test_a_step_of_ssd_is_a_dozen_launches(form: str, most: int, learners: int) -> None:
    assert len(nodes(make_epochs(learners), form)) <= most
