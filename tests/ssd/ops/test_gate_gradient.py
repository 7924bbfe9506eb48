"""gate_gradient against a loop over entries, and against autograd through relu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssd.ops.gate_gradient import gate_gradient
from tests.kernels.conftest import NUMBA, triton_only

IMPLS = ["reference", "torch", triton_only("triton")]
LEARNERS, BATCH, NEURONS, SUBNETWORK = 2, 3, 11, 4
Given = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(
    device: str, dtype: torch.dtype = torch.float32, neurons: int = NEURONS, floating: bool = True
) -> Given:
    """gradient, gate, slopes and positions; some entries of the gate are 0, -0, NaN or infinite."""
    rows = LEARNERS * BATCH
    gate = torch.randn(rows, neurons, dtype=dtype).relu()
    gate[0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf])
    gradient = torch.randn(rows, neurons, dtype=dtype)
    gradient[1, gate[1] <= 0] = torch.nan  # what the gate does not let through
    positions = torch.full((LEARNERS, neurons), SUBNETWORK)
    for own in positions:
        own[torch.randperm(neurons)[:SUBNETWORK]] = torch.arange(SUBNETWORK)
    slopes = torch.randn(rows, SUBNETWORK, dtype=dtype)
    given = gradient, gate if floating else gate > 0, slopes, positions.flatten()
    a, b, c, d = (t.to(device) for t in given)
    return a, b, c, d


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("with_slopes", [True, False])
@pytest.mark.parametrize("turned", ["neither", "gradient", "both"])
def test_every_entry(
    impl: str,
    dtype: torch.dtype,
    gated: bool,
    floating: bool,
    with_slopes: bool,
    turned: str,
    device: str,
) -> None:
    gradient, gate, slopes, positions = problem(device, dtype, floating=floating)
    expected = gradient.clone()
    for b in range(LEARNERS * BATCH):
        for j in range(NEURONS):
            place = int(positions[b // BATCH * NEURONS + j])
            slope = slopes[b, place] if with_slopes and place < SUBNETWORK else 0.0
            is_open = bool(gate[b, j]) if not floating else not bool(gate[b, j] <= 0)
            before = slope if gated else 0.0
            expected[b, j] = gradient[b, j] + before if is_open else 0.0
            expected[b, j] += 0.0 if gated else slope
    if turned != "neither":
        gradient = transposed(gradient)
    if turned == "both":
        gate = transposed(gate)
    rest = (slopes, positions) if with_slopes else (None, None)
    gate_gradient(gradient, gate, *rest, gated=gated, impl=impl)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["torch", *NUMBA])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("with_slopes", [True, False])
def test_one_learner_as_it_lies_on_a_cpu(impl: str, gated: bool, with_slopes: bool) -> None:
    gradient, gate, slopes, positions = problem("cpu")
    gradient, gate = (transposed(t[:BATCH]) for t in (gradient, gate))
    rest = (slopes[:BATCH], positions[:NEURONS]) if with_slopes else (None, None)
    expected = gradient.clone()
    gate_gradient(expected, gate, *rest, gated=gated, impl="reference")
    gate_gradient(gradient, gate, *rest, gated=gated, impl=impl)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("neurons", [4, 1024, 2500])
def test_is_the_gradient_of_relu(impl: str, neurons: int, device: str) -> None:
    """Of a loss on the output and on a part of it; the layers are longer than a program."""
    gradient, _, slopes, positions = problem(device, neurons=neurons)
    gradient = torch.randn_like(gradient)
    scores = torch.randn_like(gradient).requires_grad_()
    hidden = scores.relu()
    by_learner = zip(hidden.chunk(LEARNERS), positions.chunk(LEARNERS), strict=True)
    part = torch.cat([own[:, places.argsort()[:SUBNETWORK]] for own, places in by_learner])
    (expected,) = torch.autograd.grad([hidden, part], scores, [gradient, slopes])
    gate_gradient(gradient, hidden.detach(), slopes, positions, impl=impl)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_wider_tensors(impl: str, device: str) -> None:
    gradient, gate, slopes, positions = problem(device)
    wide = torch.cat([gradient, gradient], 1)
    gate_gradient(wide[:, ::2], torch.cat([gate, gate], 1)[:, ::2], impl=impl)
    assert torch.equal(wide[:, 1::2].isnan(), torch.cat([gradient, gradient], 1)[:, 1::2].isnan())
    assert not bool(wide[1, ::2].isnan().any())
    empty = gradient[:0]
    gate_gradient(empty, gate[:0], slopes[:0], positions, impl=impl)
    assert empty.shape == (0, NEURONS)
