"""topk against hand-computed cases and the specification, over every implementation."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ssd_kernels import _cpu_groups, _dispatch, _tuning, reference
from ssd_kernels import topk as topk_op
from tests.kernels.cases.topk import fill
from tests.kernels.conftest import INTERPRETED, triton_only

INF, NAN = float("inf"), float("nan")
IMPLS = ["reference", "torch", triton_only("triton")]
FAST = ["torch", triton_only("triton")]
# bfloat16 does not exist in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# Tiles that a row fills or not, and rows that start at multiples of 16 bytes or not.
SHAPES = [
    *[(1, 1, 1), (2, 17, 17), (2, 63, 1), (3, 1000, 10), (1, 600, 256), (2, 2050, 64)],
    *[(2, 1024, 33), (2, 2064, 7)],
]
LARGE = [(512, 1024, 10), (64, 100_003, 128), (5, 131_072, 64), (2, 3_000_001, 200)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of many tiles and parts at a size that the interpreter can bear."""
    rows = (({}, {"TILE": 64, "PROGRAMS": 2, "num_warps": 1}),)
    monkeypatch.setitem(_tuning.TABLE, "topk", {"default": rows})


KINDS = ["normal", "zero", "negative", "ties", "sparse", "ascending", "special"]


def scores_of(kind: str, batch: int, neurons: int, dtype: torch.dtype) -> Tensor:
    return fill(kind, torch.randn(batch, neurons)).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=7), b.nan_to_num(nan=7)
    )


def agrees(scores: Tensor, k: int, impl: str, **options: Any) -> None:
    expected = reference.topk(scores, k, **options)
    got = topk_op(scores, k, impl=impl, **options)
    assert torch.equal(got.indices, expected.indices)
    assert same(got.values, expected.values)
    assert got.values.dtype == scores.dtype


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("row", "k", "indices"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 3, [0, 1, 2]),
        ([-0.0, 0.0, -0.0], 2, [0, 1]),
        ([1.0, NAN, INF, -NAN], 3, [1, 3, 2]),
        ([-INF, -INF, -5.0], 2, [2, 0]),
        ([-1e-40, 1e-40, 0.0], 3, [1, 2, 0]),
    ],
)
def test_facts(row: list[float], k: int, indices: list[int], impl: str, device: str) -> None:
    got = topk_op(torch.tensor([row], device=device), k, impl=impl)
    assert got.indices.tolist() == [indices]
    assert same(got.values.cpu(), torch.tensor([[row[i] for i in indices]]))


@pytest.mark.parametrize("impl", IMPLS)
def test_mask_facts(impl: str, device: str) -> None:
    scores = torch.tensor([[5.0, -INF, 7.0, 3.0]], device=device)
    mask = torch.tensor([False, True, False, True], device=device)
    got = topk_op(scores, 4, mask=mask, impl=impl)
    assert got.indices.tolist() == [[3, 1, 0, 2]]
    assert got.values.tolist() == [[3.0, -INF, 0.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_boost_facts(impl: str, device: str) -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0]], device=device)
    boost = torch.tensor([0.5, 1.0, 2.0], device=device)
    got = topk_op(scores, 2, boost=boost, impl=impl)
    assert got.indices.tolist() == [[2, 1]]
    assert got.values.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_specification_ranks_as_python_does(kind: str) -> None:
    scores = scores_of(kind, 3, 40, torch.float64)
    got = reference.topk(scores, 7)
    for row, chosen in zip(scores.tolist(), got.indices.tolist(), strict=True):
        assert chosen == sorted(range(40), key=lambda i: (-row[i], i))[:7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "neurons", "k"), SHAPES)
@pytest.mark.parametrize("impl", FAST)
def test_agrees_with_the_specification(
    impl: str, batch: int, neurons: int, k: int, kind: str, dtype: torch.dtype, device: str
) -> None:
    agrees(scores_of(kind, batch, neurons, dtype).to(device), k, impl)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "neurons", "k"), [(3, 997, 2), (9, 64, 7), (2, 4096, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_groups_agree_with_the_specification(
    batch: int, neurons: int, k: int, kind: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of groups, neurons left over, keys by rows and by neurons."""
    monkeypatch.setattr(_cpu_groups, "LEAST_KEYS", 0)
    monkeypatch.setattr(_cpu_groups, "LEAST_GROUPS", 1)
    scores = scores_of(kind, batch, neurons, torch.float32)
    agrees(scores.T.contiguous().T if turned else scores, k, "torch")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["normal", "zero", "ascending", "special"])
@pytest.mark.parametrize(("batch", "neurons", "k"), [(5, 400, 10), (1, 515, 33), (2, 576, 20)])
@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_many_tiles_and_parts(
    impl: str, batch: int, neurons: int, k: int, kind: str, device: str
) -> None:
    """5 rows stream through 4 programs; 1 or 2 are shared out, over short and empty parts too."""
    scores = scores_of(kind, batch, neurons, torch.float32).to(device)
    agrees(scores, k, impl)
    mask = torch.rand(neurons, device=device) < 0.05
    boost = torch.rand(neurons, device=device) - 0.3
    agrees(scores, k, impl, boost=boost)
    agrees(scores, k, impl, mask=mask, boost=boost)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("allowed", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("impl", FAST)
def test_mask_and_boost(impl: str, allowed: float, kind: str, device: str) -> None:
    scores = scores_of(kind, 2, 300, torch.float32).to(device)
    boost = torch.rand(300, device=device)
    mask = torch.rand(300, device=device) < allowed
    agrees(scores, 20, impl, mask=mask)
    agrees(scores, 20, impl, mask=mask, boost=boost)


@pytest.mark.parametrize("impl", FAST)
def test_layouts(impl: str, device: str) -> None:
    scores = torch.randn(2, 5, 40, device=device)
    agrees(scores, 5, impl)
    agrees(scores[:, 0], 5, impl)
    agrees(scores[..., ::2], 5, impl)
    agrees(scores[0, 0], 5, impl)
    agrees(scores.transpose(1, 2), 3, impl)
    agrees(scores[:, :0], 5, impl)


@pytest.mark.parametrize("impl", FAST)
def test_more_than_the_kernel_keeps(impl: str, device: str) -> None:
    agrees(scores_of("ties", 2, 700, torch.float32).to(device), 300, impl)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("option", ["plain", "mask", "boost"])
def test_gradient(impl: str, option: str, device: str) -> None:
    scores = scores_of("ties", 4, 200, torch.float32).to(device)
    options = {
        "plain": {},
        "mask": {"mask": torch.rand(200, device=device) < 0.05},
        "boost": {"boost": torch.rand(200, device=device)},
    }[option]
    weights = torch.randn(4, 15, device=device)
    grads = []
    for op, extra in ((reference.topk, {}), (topk_op, {"impl": impl})):
        leaf = scores.clone().requires_grad_()
        (op(leaf, 15, **options, **extra).values * weights).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl: str) -> None:
    scores = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: topk_op(s, 4, impl=impl).values, scores)


@pytest.mark.parametrize("impl", FAST)
def test_repeats_are_bit_equal_and_overwrite_poison(impl: str, device: str) -> None:
    scores = scores_of("ties", 2, 700, torch.float32).to(device).requires_grad_()
    expected = reference.topk(scores, 30)
    (expected_grad,) = torch.autograd.grad(expected.values.square().sum(), scores)
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        for _ in range(20):
            got = topk_op(scores, 30, impl=impl)
            (grad,) = torch.autograd.grad(got.values.square().sum(), scores)
            assert torch.equal(got.values, expected.values)
            assert torch.equal(got.indices, expected.indices)
            assert torch.equal(grad, expected_grad)
    finally:
        torch.use_deterministic_algorithms(False)


@hypothesis.given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(st.floats(width=32), min_size=width, max_size=width), min_size=1, max_size=4
        )
    ),
    data=st.data(),
)
def test_any_floats(rows: list[list[float]], data: st.DataObject) -> None:
    scores = torch.tensor(rows)
    agrees(scores, data.draw(st.integers(1, scores.shape[1])), "torch")


def test_triton_serves_cuda() -> None:
    """The table has the kernel wherever Triton is installed."""
    assert ("triton" in _dispatch.TABLES["topk"]) == _dispatch.TRITON


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "neurons", "k"), LARGE)
def test_large(batch: int, neurons: int, k: int, kind: str, dtype: torch.dtype) -> None:
    agrees(scores_of(kind, batch, neurons, dtype).cuda(), k, "triton")


@pytest.mark.cuda
def test_offsets_beyond_32_bits() -> None:
    batch, neurons = 20, 1 << 27  # 5 GiB of fp16, 2.7e9 elements
    scores = torch.zeros(batch, neurons, dtype=torch.float16, device="cuda")
    spots = torch.randint(neurons, (batch,), device="cuda")
    scores.scatter_(1, spots.unsqueeze(1), 2.0)
    got = topk_op(scores, 3, impl="triton")
    assert torch.equal(got.indices[:, 0], spots)
    assert got.values.tolist() == [[2.0, 0.0, 0.0]] * batch


def test_no_part_of_a_row_is_empty() -> None:
    """The kernel reads ahead from one part to the next; one without a tile would break that."""
    from importlib import import_module

    device, parts_of = torch.device("cpu"), import_module("ssd_kernels.topk")._parts
    for batch in (1, 2, 3):
        for neurons in range(4096, 40_000, 517):
            parts = parts_of(batch, neurons, 10, device)
            tiles = -(-neurons // _tuning.config("topk", device, neurons=neurons, k=10)["TILE"])
            assert (parts - 1) * -(-tiles // parts) < tiles


@pytest.mark.cuda
def test_in_a_cuda_graph() -> None:
    scores = torch.randn(64, 5000, device="cuda")
    topk_op(scores, 10)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = topk_op(scores, 10)
    scores.copy_(torch.randn_like(scores))
    graph.replay()
    assert torch.equal(got.indices, reference.topk(scores, 10).indices)
