"""sparse_linear and its gradients against the specification in fp64, over every implementation."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ssd_kernels import _dispatch, _segments, reference, sparse_linear
from ssd_kernels.sparse_linear import gather_triton, gradients_triton
from tests.kernels.conftest import INTERPRETED, triton_only

IMPLS = ["reference", "torch", triton_only("triton")]
FAST = ["torch", triton_only("triton")]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# B, K, R, C: one slot, more slots than a tile, repeated neurons, several column tiles.
SHAPES = [(1, 1, 1, 1), (5, 3, 7, 10), (4, 20, 5, 63), (3, 17, 1000, 300), (2, 2, 9, 2054)]
LARGE = [(128, 10, 10_000, 10), (1024, 64, 65_536, 512), (600, 33, 1001, 4097)]


def case(
    batch: int, slots: int, neurons: int, outputs: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """values, indices, weight, bias and the gradient of the output; indices may repeat."""
    floats = [(batch, slots), (neurons, outputs), (outputs,), (batch, outputs)]
    values, weight, bias, grad = (torch.randn(s).to(device, dtype) for s in floats)
    return values, torch.randint(neurons, (batch, slots)).to(device), weight, bias, grad


def results(given: tuple[Tensor, ...], impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradients of values, weight and bias."""
    values, indices, weight, bias, grad = given
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (values, weight, bias)]
    out = sparse_linear(leaves[0], indices, leaves[1], leaves[2], impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check_tolerance(given: tuple[Tensor, ...], impl: str) -> None:
    """No output is further from fp64 than plain torch in the same dtype, but for an epsilon."""
    exact = results(given, "reference", torch.float64)
    native = results(given, "torch")
    for ours, plain, truth in zip(results(given, impl), native, exact, strict=True):
        assert ours.dtype == plain.dtype
        epsilon = torch.finfo(ours.dtype).eps * truth.abs().max().clamp(min=1)
        error = (ours - truth).abs().max()
        assert error <= (plain - truth).abs().max() + epsilon


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_close_to_fp64(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int], device: str
) -> None:
    check_tolerance(case(*shape, dtype, device), impl)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", LARGE)
def test_close_to_fp64_on_cuda(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    check_tolerance(case(*shape, dtype, "cuda"), "triton")


@pytest.mark.cuda
def test_offsets_beyond_32_bits() -> None:
    neurons, outputs = 600_000, 4096
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    weight = torch.zeros(neurons, outputs, dtype=torch.bfloat16, device="cuda")
    weight[-1] = 3
    weight.requires_grad_()
    indices = torch.tensor([[0, neurons - 1]], device="cuda")
    values = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16, device="cuda", requires_grad=True)
    out = sparse_linear(values, indices, weight, impl="triton")
    out.sum().backward()
    assert torch.equal(out, torch.full_like(out, 6))
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 3.0 * outputs]]
    assert weight.grad is not None
    assert weight.grad[-1].unique().tolist() == [2.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_computed(impl: str, device: str) -> None:
    weight = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]], device=device)
    values = torch.tensor([[2.0, 3.0], [1.0, 1.0], [0.0, 0.0]], device=device)
    indices = torch.tensor([[0, 2], [1, 1], [0, 0]], device=device)
    bias = torch.tensor([0.5, -0.5], device=device)
    out = sparse_linear(values, indices, weight, bias, impl=impl)
    assert out.tolist() == [[302.5, 603.5], [20.5, 39.5], [0.5, -0.5]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_leading_dimensions(impl: str, batch: tuple[int, ...], device: str) -> None:
    values = torch.rand(*batch, 4, device=device, requires_grad=True)
    weight = torch.rand(9, 5, device=device, requires_grad=True)
    indices = torch.randint(9, (*batch, 4), device=device)
    out = sparse_linear(values, indices, weight, impl=impl)
    assert out.shape == (*batch, 5)
    out.sum().backward()
    assert values.grad is not None
    assert values.grad.shape == values.shape
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.sum(), 5 * values.detach().sum())


@pytest.mark.parametrize("impl", FAST)
def test_no_slots_give_the_bias(impl: str, device: str) -> None:
    empty = torch.zeros(2, 0, device=device)
    bias = torch.rand(3, device=device)
    out = sparse_linear(empty, empty.long(), torch.rand(4, 3, device=device), bias, impl=impl)
    assert torch.equal(out, bias.expand(2, 3))


@pytest.mark.parametrize("impl", FAST)
def test_strided_inputs(impl: str, device: str) -> None:
    values, indices, weight, bias, grad = case(6, 5, 8, 10, torch.float32, device)
    strided = (
        values.t().contiguous().t(),
        indices.t().contiguous().t(),
        weight.t().contiguous().t(),
        bias,
        grad,
    )
    for got, plain in zip(
        results(strided, impl), results((values, indices, weight, bias, grad), impl), strict=True
    ):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("impl", FAST)
def test_expanded_gradient(impl: str, device: str) -> None:
    values, indices, weight, bias, grad = case(6, 5, 8, 10, torch.float32, device)
    ones = torch.ones((), device=device)
    expanded = results((values, indices, weight, bias, ones.expand_as(grad)), impl)
    dense = results((values, indices, weight, bias, torch.ones_like(grad)), impl)
    for got, plain in zip(expanded, dense, strict=True):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(impl: str, wanted: int, device: str) -> None:
    given = case(4, 3, 6, 7, torch.float32, device)
    leaves = [given[0], given[2], given[3]]
    leaves[wanted] = leaves[wanted].clone().requires_grad_()
    out = sparse_linear(leaves[0], given[1], leaves[1], leaves[2], impl=impl)
    (alone,) = torch.autograd.grad(out, leaves[wanted], given[4])
    torch.testing.assert_close(alone, results(given, impl)[1 + wanted])


@pytest.mark.parametrize("impl", IMPLS)
def test_an_idle_slot_still_reads_its_row(impl: str, device: str) -> None:
    """0 * NaN is NaN: a diverged row shows wherever a code names it."""
    weight = torch.tensor([[float("nan")], [1.0]], device=device)
    values = torch.tensor([[0.0], [2.0]], device=device)
    out = sparse_linear(values, torch.tensor([[0], [1]], device=device), weight, impl=impl)
    assert out[0].isnan().all()
    assert out[1].item() == 2.0


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("outputs", [20, 2054])
def test_every_output_is_written(
    impl: str, outputs: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, new_empty = torch.empty, Tensor.new_empty

    def poisoned(*given: Any, **options: Any) -> Tensor:
        fresh = (new_empty if isinstance(given[0], Tensor) else empty)(*given, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -1)

    values, indices, weight, bias, grad = case(5, 3, 7, outputs, torch.float32, device)
    assert (_segments.tiles(outputs, weight.device) > 1) == (outputs == 2054)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert gather_triton(values, indices, weight, bias).isfinite().all()
    for gradient in gradients_triton(grad, values, indices, weight, True, True, ()):
        assert gradient is not None
        assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl: str) -> None:
    indices = torch.tensor([[0, 3], [3, 3], [2, 1]])
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (5, 4), (4,))
    ]
    assert torch.autograd.gradcheck(
        lambda v, w, b: sparse_linear(v, indices, w, b, impl=impl), leaves
    )


@hypothesis.given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 8), st.integers(1, 9), st.integers(0, 999)
)
def test_torch_equals_the_specification(
    batch: int, slots: int, neurons: int, outputs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    values, indices, weight, bias, _ = case(batch, slots, neurons, outputs, torch.float64, "cpu")
    got = sparse_linear(values, indices, weight, bias, impl="torch")
    torch.testing.assert_close(got, reference.sparse_linear(values, indices, weight, bias))


@pytest.mark.cuda
def test_cuda_graph_capture() -> None:
    values, indices, weight, bias, grad = case(128, 10, 10_000, 10, torch.float32, "cuda")
    graph = torch.cuda.CUDAGraph()
    results((values, indices, weight, bias, grad), "triton")  # compiles outside the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = gather_triton(values, indices, weight, bias)
        gradients = gradients_triton(grad, values, indices, weight, True, True, ())
    values.normal_()
    indices.random_(10_000)
    graph.replay()
    expected = results((values, indices, weight, bias, grad), "triton")
    for got, want in zip((out, *gradients), expected[:3], strict=True):
        assert got is not None
        assert torch.equal(got, want)


@pytest.mark.cuda
def test_cuda_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_dispatch.ENVIRONMENT, raising=False)
    values, indices, weight, bias, _ = case(8, 3, 20, 30, torch.float32, "cuda")
    chosen = sparse_linear(values, indices, weight, bias)
    assert torch.equal(chosen, sparse_linear(values, indices, weight, bias, impl="triton"))
