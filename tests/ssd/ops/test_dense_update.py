"""dense_update against torch.optim.SGD with clip_grad_norm_, network by network in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from ssd.ops.dense_update import dense_update
from ssd.ops.reference import Update
from tests.kernels.conftest import same, triton_only

IMPLS = ["reference", "torch", triton_only("triton")]
NETWORKS, NEURONS = 3, 7


def problem(
    device: str, *widths: int, dtype: torch.dtype = torch.float32, networks: int = NETWORKS
) -> dict[str, Any]:
    """Weights and buffers that are parts of wider matrices, buffers that hold something."""
    rows = networks * NEURONS

    def matrices(scale: float) -> list[Tensor]:
        drawn = [scale * torch.randn(rows, width + 4, dtype=dtype) for width in widths]
        return [m.to(device)[:, : m.shape[1] - 4] for m in drawn]

    weights = matrices(1.0)
    weights[0][3] = 0
    gradients = [m.contiguous() for m in matrices(1.0)]
    gradients[0][3] = 0
    gradients[0][5] = 1e4 * weights[0][5]  # all of it is clamped, or turned around
    return {"weights": weights, "gradients": gradients, "buffers": matrices(0.3)}


def expected(
    given: dict[str, Any],
    lr: list[float],
    max_norm: list[float] | None,
    nonnegative: bool,
    normalize: list[bool],
    momentum: float,
    samples: list[int],
) -> list[Tensor]:
    """Weights, and the buffers if there is momentum."""
    state = [t.double().clone() for t in given["weights"]]
    buffers = [t.double().clone() for t in given["buffers"]]
    for network, count in enumerate(samples):
        if count == 0:
            continue
        own = slice(network * NEURONS, (network + 1) * NEURONS)
        parameters = [torch.nn.Parameter(t[own].clone()) for t in state]
        optimizer = torch.optim.SGD(parameters, lr=lr[network], momentum=momentum)
        for parameter, buffer, gradient in zip(
            parameters, buffers, given["gradients"], strict=True
        ):
            parameter.grad = gradient[own].double()
            if momentum:
                optimizer.state[parameter]["momentum_buffer"] = buffer[own]  # in place
        if max_norm is not None:
            clip_grad_norm_(parameters, max_norm[network])
        optimizer.step()
        for whole, parameter, normalized in zip(state, parameters, normalize, strict=True):
            moved = parameter.detach().clamp(min=0) if nonnegative else parameter.detach()
            if normalized:
                moved = torch.nn.functional.normalize(moved, dim=1, eps=1e-300)
            whole[own] = moved
    return state + buffers if momentum else state


def copied(given: dict[str, Any]) -> dict[str, Any]:
    def copy(t: Tensor) -> Tensor:
        empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        return empty.copy_(t)

    return {name: [copy(t) for t in tensors] for name, tensors in given.items()}


def run(given: dict[str, Any], momentum: float, impl: str, **options: Any) -> list[Tensor]:
    ours = copied(given)
    buffers = {"buffers": ours["buffers"], "momentum": momentum} if momentum else {}
    dense_update(Update(ours["weights"], ours["gradients"], **buffers, **options), impl=impl)
    for gradient, before in zip(ours["gradients"], given["gradients"], strict=True):
        torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)
    return [*ours["weights"], *(ours["buffers"] if momentum else ())]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("max_norm", [None, [2.0, 1e9, 2.0]])
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("samples", [None, [4, 0, 1]])
def test_is_the_step_of_every_network(
    impl: str,
    dtype: torch.dtype,
    momentum: float,
    max_norm: list[float] | None,
    project: bool,
    samples: list[int] | None,
    device: str,
) -> None:
    given, lr = problem(device, 9, 3, dtype=dtype), [0.1, 0.01, 0.5]
    if samples is not None:
        given["gradients"][1][NEURONS] = torch.nan  # of a network that rests
    got = run(
        given,
        momentum,
        lr=torch.tensor(lr, dtype=dtype, device=device),
        max_norm=None if max_norm is None else torch.tensor(max_norm, dtype=dtype, device=device),
        nonnegative=project,
        normalize=[project, False],
        samples=None if samples is None else torch.tensor(samples, device=device),
        networks=NETWORKS,
        impl=impl,
    )
    numbers = samples or [1] * NETWORKS
    want = expected(given, lr, max_norm, project, [project, False], momentum, numbers)
    # The 1e-6 of clip_grad_norm_ counts in units of max_norm here.
    precision = 1e-12 if max_norm is None and dtype == torch.float64 else 1e-5
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=precision, atol=precision)
    if samples is not None:
        rest = slice(NEURONS, 2 * NEURONS)
        for ours, before in zip(got, [*given["weights"], *given["buffers"]], strict=False):
            assert torch.equal(ours[rest], before[rest])


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_exact_in_fp64(impl: str, device: str) -> None:
    given = problem(device, 9, 3, dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 0.5, "nonnegative": True}
    options |= {"normalize": [True, False], "networks": NETWORKS}
    for momentum in (0.0, 0.9):
        got, want = (run(given, momentum, **options, impl=name) for name in (impl, "reference"))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 16, 257, 1025, 4100])
def test_widths(impl: str, width: int, device: str) -> None:
    given = problem(device, width, 2, networks=1)
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "normalize": [True, True]}
    got = run(given, 0.9, **options, nonnegative=True, impl=impl)
    want = expected(given, [0.1], [1.0], True, [True, True], 0.9, [1])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    lengths = got[0].double().norm(dim=1)
    assert bool((((lengths - 1).abs() < 1e-6) | (lengths == 0)).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_network_does_not_see_the_others(impl: str, device: str) -> None:
    given = problem(device, 40, 3)
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "normalize": [True, False]}
    together = run(given, 0.0, **options, networks=NETWORKS, impl=impl)
    for network in range(NETWORKS):
        own = slice(network * NEURONS, (network + 1) * NEURONS)
        alone = {name: [t[own] for t in tensors] for name, tensors in given.items()}
        for ours, theirs in zip(run(alone, 0.0, **options, impl=impl), together, strict=True):
            same(ours, theirs[own])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-26, 1e30])
def test_gradients_of_any_scale_are_clipped(impl: str, scale: float, device: str) -> None:
    """Squares leave the range of float32; the step is of length 1 / 2."""
    given = problem(device, 9, 3, networks=1)
    given["gradients"] = [g * scale for g in given["gradients"]]
    given["weights"] = [torch.zeros_like(w) for w in given["weights"]]
    moved = run(given, 0.0, lr=0.5 / scale, max_norm=scale, impl=impl)
    length = torch.stack([m.double().norm() for m in moved]).norm()
    assert length.item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_repeats_are_bit_equal(impl: str, device: str) -> None:
    given = problem(device, 300, 3)
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "normalize": [True, False]}
    first = run(given, 0.9, **options, networks=NETWORKS, impl=impl)
    for _ in range(20):
        again = run(given, 0.9, **options, networks=NETWORKS, impl=impl)
        assert all(map(torch.equal, first, again))
