"""benchmarks/tune.py in Triton's interpreter: it times right results and reports wrong ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks import tune
from benchmarks.providers import shapes
from ssd_kernels import _tuning
from tests.kernels.conftest import INTERPRETED

PROBLEMS = [
    tune.problem_of(shape)
    for shape in shapes("""
        topk           forward  float32  B=3 R=1500 k=4
        linear_topk    forward  float32  B=3 d=24 R=300 k=4
        linear_topk    forward  float16  B=3 d=20 R=300 k=4
        sparse_linear  forward  float32  B=3 R=40 k=4 C=300
        sparse_linear  full     float32  B=3 R=40 k=4 C=300
    """)
]


def test_shipped_rows_are_candidates() -> None:
    """So that a sweep times the present row too."""
    for op in ("topk", "linear_topk"):
        tried = [c for p in tune.PROBLEMS if p.op == op for c in p.candidates]
        for family, rows in _tuning.TABLE[op].items():
            assert all(chosen in tried for _, chosen in rows), (op, family)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"triton-{problem.part}")
def test_configurations(problem: tune.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    monkeypatch.setitem(_tuning.TABLE, problem.op, _tuning.TABLE[problem.op])  # to be put back
    few = tune.Problem(**vars(problem) | {"candidates": problem.candidates[:2]})
    said: list[str] = []
    tune.tune(few, few.candidates[1], said.append)
    timed = [line for line in said if " ms " in line]
    assert len(timed) == len(said) == 2 + (problem.part == "topk")
    assert sum("(present row)" in line for line in timed) == 1

    real, calls = tune.run, []

    def wrong(problem: tune.Problem, chosen: object, given: object) -> tune.Results:
        first, *others = real(problem, chosen, given)  # type: ignore[arg-type]
        calls.append(chosen)
        return (first + len(calls), *others)  # type: ignore[operator]

    monkeypatch.setattr(tune, "run", wrong)
    said.clear()
    tune.tune(few, few.candidates[1], said.append)
    assert any(line.endswith("WRONG") for line in said)
