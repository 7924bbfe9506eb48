"""count_active against hand-computed counts and the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssd_kernels import count_active, reference
from tests.kernels.conftest import INTERPRETED, triton_only

IMPLS = ["reference", "torch", triton_only("triton")]
INTEGERS = [torch.int64, torch.int32]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def code(batch: int, k: int, neurons: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    indices = torch.stack([torch.randperm(neurons)[:k] for _ in range(batch)])
    return torch.randn(batch, k).to(dtype), indices


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_facts(impl: str, integer: torch.dtype, on_device: bool, device: str) -> None:
    nan = float("nan")
    values = torch.tensor([[2.0, 0.0], [1.0, nan], [-1.0, 3.0]], device=device)
    indices = torch.tensor([[4, 1], [4, 2], [4, 0]], device=device)
    counts = torch.tensor([10, 0, 0, 0, 0], dtype=integer, device=device)
    last = torch.full((5,), -1, dtype=integer, device=device)
    step = torch.tensor(17, device=device) if on_device else 17
    count_active(values, indices, counts, last, step, impl=impl)
    assert counts.tolist() == [11, 0, 0, 0, 2]
    assert last.tolist() == [17, -1, -1, -1, 17]


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize(
    ("batch", "k", "neurons"), [(0, 3, 5), (1, 1, 1), (63, 10, 60), (130, 7, 1000)]
)
def test_agrees_with_the_specification(
    impl: str,
    batch: int,
    k: int,
    neurons: int,
    integer: torch.dtype,
    dtype: torch.dtype,
    device: str,
) -> None:
    values, indices = (
        code(batch, k, neurons, dtype)
        if batch
        else (torch.empty(0, k, dtype=dtype), torch.empty(0, k, dtype=torch.int64))
    )
    values, indices = values.to(device), indices.to(device)
    counts = torch.randint(100, (neurons,), dtype=integer, device=device)
    last = torch.zeros_like(counts)
    expected_counts, expected_last = counts.clone(), last.clone()
    for step in range(3):
        reference.count_active(values, indices, expected_counts, expected_last, step)
        count_active(values, indices, counts, last, step, impl=impl)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(last, expected_last)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_counters_and_codes(impl: str, device: str) -> None:
    values, indices = (t.to(device) for t in code(8, 6, 20, torch.float32))
    counts = torch.zeros(20, 2, dtype=torch.int64, device=device)
    last = torch.zeros(20, 3, dtype=torch.int64, device=device)
    count_active(values.T, indices.T, counts[:, 1], last[:, 2], 5, impl=impl)
    expected = torch.bincount(indices[values > 0], minlength=20)
    assert torch.equal(counts[:, 1], expected)
    assert not counts[:, 0].any()
    assert torch.equal(last[:, 2], (expected > 0) * 5)
    assert not last[:, :2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_counts_beyond_the_integers_of_fp32(impl: str, device: str) -> None:
    counts = torch.full((1,), 2**24, dtype=torch.int64, device=device)
    one = torch.ones(1, 1, device=device)
    count_active(one, torch.zeros(1, 1, dtype=torch.int64, device=device), counts, impl=impl)
    assert counts.item() == 2**24 + 1


@pytest.mark.cuda
def test_in_a_cuda_graph() -> None:
    values, indices = (t.cuda() for t in code(64, 8, 500, torch.float32))
    counts = torch.zeros(500, dtype=torch.int64, device="cuda")
    last, step = counts.clone(), torch.tensor(1, device="cuda")
    count_active(values, indices, counts, last, step)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count_active(values, indices, counts, last, step)
    once = counts.clone()
    step.fill_(9)
    graph.replay()
    assert torch.equal(counts, 2 * once)
    assert torch.equal(last, (once > 0) * 9)
