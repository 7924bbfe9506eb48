"""row_gradient: the weight gradient of a k-sparse layer, against fp64 and dense autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssd_kernels import reference
from ssd_kernels._row_gradient import row_gradient
from tests.kernels.conftest import triton_only

IMPLS = ["torch", triton_only("triton")]


def problem(batch: int, slots: int, width: int, neurons: int, device: str) -> tuple[Tensor, ...]:
    indices = torch.randint(neurons, (batch, slots), device=device)
    coefficients = torch.randn(batch, slots, device=device).relu()
    return coefficients, torch.randn(batch, width, device=device), indices


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("batch", "slots", "width", "neurons"),
    [(7, 5, 12, 9), (1, 1, 1, 1), (40, 3, 63, 2), (6, 4, 300, 1000), (0, 3, 5, 4)],
)
def test_equals_the_specification(
    impl: str, batch: int, slots: int, width: int, neurons: int, device: str
) -> None:
    coefficients, inputs, indices = problem(batch, slots, width, neurons, device)
    found = row_gradient(coefficients, inputs, indices, neurons, impl=impl)
    exact = reference.row_gradient(coefficients.double(), inputs.double(), indices, neurons)
    native = reference.row_gradient(coefficients, inputs, indices, neurons)
    allowed = (native - exact).abs().amax() if batch else 0.0
    assert found.shape == (neurons, width)
    assert (found - exact).abs().max() <= allowed + 1e-6


def test_is_the_gradient_of_both_layers() -> None:
    """Encoder and decoder weight gradients of values picked from x W1^T, by autograd."""
    x, w1 = torch.randn(6, 5).double(), torch.randn(8, 5).double().requires_grad_()
    w2 = torch.randn(8, 3).double().requires_grad_()
    indices = torch.stack([torch.randperm(8)[:4] for _ in range(6)])
    values = (x @ w1.T).gather(1, indices)
    values.retain_grad()
    out = reference.sparse_linear(values, indices, w2)
    out.retain_grad()
    out.square().sum().backward()
    torch.testing.assert_close(row_gradient(values.grad, x, indices, 8), w1.grad)
    torch.testing.assert_close(row_gradient(values.detach(), out.grad, indices, 8), w2.grad)


@given(st.integers(0, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 7))
def test_any_shape(batch: int, slots: int, width: int, neurons: int) -> None:
    coefficients, inputs, indices = problem(batch, slots, width, neurons, "cpu")
    torch.testing.assert_close(
        row_gradient(coefficients, inputs, indices, neurons),
        reference.row_gradient(coefficients, inputs, indices, neurons),
    )
