"""linear_topk against the specification in fp64, over every implementation."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import _encoder, reference
from ssd_kernels import linear_topk as op
from tests.kernels.conftest import INTERPRETED, same, triton_only

KERNELS = [triton_only("triton")]
FAST = ["torch", *KERNELS]
IMPLS = ["reference", *FAST]
# bfloat16 does not exist in Triton's interpreter.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# (B, R, d, k); 33 neurons are two groups, k = R has no threshold.
SHAPES = [(1, 1, 1, 1), (3, 33, 7, 33), (2, 65, 5, 64), (3, 300, 32, 1), (2, 299, 17, 5)]
LARGE = [(128, 10_000, 256, 10), (129, 4_099, 60, 32), (3, 300_003, 33, 64), (64, 8_192, 1024, 255)]


def layer(batch: int, neurons: int, features: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    sizes = [(batch, features), (neurons, features), (neurons,)]
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def spec(x: Tensor, weight: Tensor, k: int, bias: Tensor | None, **options: Any) -> Any:
    double = None if bias is None else bias.double()
    return reference.linear_topk(x.double(), weight.double(), k, double, **options)


def scale_of_rounding(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Largest error of native torch's fp32 scores, and an epsilon for another order of the sum."""
    scores = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    epsilon = 4 * torch.finfo(torch.float32).eps * max(1.0, exact.abs().max().item())
    return (scores - exact).abs().max().item() + epsilon


def close(got: Tensor, exact: Tensor, native_error: float) -> None:
    """Errors within those of native scores, and the rounding to the dtype of the output."""
    rounding = torch.finfo(got.dtype).eps * exact.abs() + torch.finfo(got.dtype).tiny
    assert ((got.double() - exact).abs() <= native_error + rounding).all()


def check(
    x: Tensor, weight: Tensor, k: int, bias: Tensor | None, impl: str, inhibition: str
) -> None:
    neurons = len(weight)
    counts = torch.full((neurons,), 3, dtype=torch.int64, device=x.device)
    got = op(x, weight, k, bias, inhibition=inhibition, threshold=True, counts=counts, impl=impl)
    exact = spec(x, weight, k, bias, inhibition=inhibition, threshold=True)
    error = scale_of_rounding(x, weight, bias)
    assert got.values.dtype == x.dtype
    assert got.values.shape == got.indices.shape == (*x.shape[:-1], k)
    close(got.values, exact.values, 2 * error)  # subtraction has the errors of two scores
    close(got.threshold, exact.threshold, error)
    # The chosen neurons have the k largest scores up to rounding, each once, in order.
    scores = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    best = scores.sort(dim=-1, descending=True).values[..., :k]
    assert (scores.gather(-1, got.indices) - best).abs().max() <= 2 * error
    assert (got.indices.sort(dim=-1).values.diff(dim=-1) > 0).all()
    expected = torch.full_like(counts, 3)
    reference.count_active(got.values, got.indices, expected)
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
def test_outputs(device: str, impl: str, shape: tuple[int, int, int, int], inhibition: str) -> None:
    batch, neurons, features, k = shape
    for dtype in DTYPES:
        x, weight, bias = layer(batch, neurons, features, dtype, device)
        check(x, weight, k, bias if inhibition == "mask" else None, impl, inhibition)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_large(
    device: str, impl: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch, neurons, features, k = shape
    x, weight, bias = layer(batch, neurons, features, dtype, device)
    check(x, weight, k, bias, impl, "mask")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["ties", "zero", "negative", "special"])
def test_equal_scores_go_to_the_lower_index(device: str, impl: str, kind: str) -> None:
    """Scores that every order of summation computes exactly: the same indices everywhere."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [0.0, -0.0]], device=device)
    weight = torch.randint(-2, 3, (130, 2), device=device).float()
    bias = None
    if kind == "zero":
        weight.zero_()
    elif kind == "negative":
        bias = torch.full((130,), -50.0, device=device)
    elif kind == "special":
        bias = torch.zeros(130, device=device)
        bias[::7], bias[3::11] = float("nan"), float("-inf")
        bias[5] = float("inf")
    for k in (1, 3, 40):
        expected = reference.linear_topk(x, weight, k, bias, threshold=True)
        got = op(x, weight, k, bias, threshold=True, impl=impl)
        assert torch.equal(got.indices, expected.indices)
        for a, b in zip(got[::2], expected[::2], strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def gradients(
    impl: str, inputs: list[Tensor], k: int, inhibition: str, double: bool
) -> list[Tensor]:
    x, weight, bias = (t.detach().to(torch.float64 if double else t.dtype) for t in inputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = op(x, weight, k, bias, inhibition=inhibition, threshold=True, impl=impl)
    ramp = torch.arange(1, out.values.numel() + 1, device=x.device).view_as(out.values)
    loss = (out.values * (ramp % 5 - 1.5)).sum() + (out.threshold * 0.75).sum()
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
def test_gradients(device: str, impl: str, inhibition: str) -> None:
    inputs = layer(4, 299, 16, torch.float32, device)
    exact = gradients("reference", inputs, 6, inhibition, double=True)
    native = gradients("reference", inputs, 6, inhibition, double=False)
    got = gradients(impl, inputs, 6, inhibition, double=False)
    for ours, theirs, truth in zip(got, native, exact, strict=True):
        epsilon = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + epsilon


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("wanted", range(3))
def test_each_gradient_alone(device: str, impl: str, wanted: int) -> None:
    inputs = layer(5, 70, 8, torch.float32, device)
    grads = []
    for name in (impl, "reference"):
        leaves = [t.detach().requires_grad_(n == wanted) for n, t in enumerate(inputs)]
        out = op(leaves[0], leaves[1], 4, leaves[2], impl=name)
        slopes = torch.arange(20.0, device=device).view(5, 4) - 9
        grads += torch.autograd.grad(out.values, leaves[wanted], slopes)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", FAST)
def test_loss_on_the_threshold_alone(device: str, impl: str) -> None:
    x, weight, bias = (t.requires_grad_() for t in layer(3, 99, 8, torch.float32, device))
    op(x, weight, 4, bias, threshold=True, impl=impl).threshold.sum().backward()
    expected = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    reference.linear_topk(
        expected[0], expected[1], 4, expected[2], threshold=True
    ).threshold.sum().backward()  # type: ignore[union-attr]
    for got, want in zip((x, weight, bias), expected, strict=True):
        assert want.grad is not None
        assert want.grad.any()
        torch.testing.assert_close(got.grad, want.grad)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
@pytest.mark.parametrize("networks", [1, 2])
def test_preactivations(device: str, impl: str, inhibition: str, networks: int) -> None:
    """Bit for bit the specification: the scores are the same and only their ranking differs."""
    leaves = layer(4, 50 * networks, 8, torch.float32, device)
    leaves[1][7] = leaves[1][3]  # two neurons that tie
    leaves[2][7] = leaves[2][3]
    options: dict[str, Any] = {"inhibition": inhibition, "threshold": True, "networks": networks}
    outputs, grads = [], []
    for name in (impl, "reference"):
        x, weight, bias = (t.clone().requires_grad_() for t in leaves)
        counts = torch.zeros(len(weight), dtype=torch.int64, device=device)
        out = op(x, weight, 4, bias, preactivations=True, counts=counts, impl=name, **options)
        outputs.append([t.clone() for t in (*out, counts)])
        loss = out.values.sum() + out.threshold.sum() + (0.5 * out.preactivations).sum()
        grads.append(torch.autograd.grad(loss, [x, weight, bias], retain_graph=True))
        for tensor in (out.values, out.threshold, out.preactivations):
            tensor.detach().zero_()
        again = torch.autograd.grad(out.values.sum(), bias)[0]
        assert (again != 0).sum() == (counts > 0).sum()
    for got, expected in zip([*outputs[0], *grads[0]], [*outputs[1], *grads[1]], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", [*FAST, "reference"])
@pytest.mark.parametrize("k", [3, 20])  # 20: all neurons, so that some slots are inactive
def test_no_gradient_reads_the_values(device: str, impl: str, k: int) -> None:
    """Users write into outputs: the gate of each slot is that of before."""
    x, weight, bias = (t.requires_grad_() for t in layer(6, 20, 8, torch.float32, device))
    out = op(x, weight, k, bias, impl=impl)
    assert (out.values == 0).any() == (k == 20)
    before = torch.autograd.grad(out.values.sum(), [x, weight, bias], retain_graph=True)
    for write in (Tensor.zero_, lambda t: t.add_(1)):
        write(out.values.detach())
        after = torch.autograd.grad(out.values.sum(), [x, weight, bias], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("impl", FAST)
def test_preactivations_sort_no_row(
    device: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = layer(3, 400, 8, torch.float32, device)
    expected = op(x, weight, 5, bias, preactivations=True, impl="reference")
    monkeypatch.setattr(torch, "sort", None)
    got = op(x, weight, 5, bias, preactivations=True, impl=impl)
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("impl", FAST)
def test_empty_batch_strides_and_leading_dimensions(device: str, impl: str) -> None:
    x, weight, bias = layer(6, 70, 8, torch.float32, device)
    empty = op(x[:0].requires_grad_(), weight, 3, bias, threshold=True, impl=impl)
    assert empty.values.shape == (0, 3)
    assert empty.threshold is not None
    assert empty.threshold.shape == (0,)
    expected = op(x, weight, 3, bias, impl="reference")
    turned = op(x.T.contiguous().T, weight.T.contiguous().T, 3, bias, impl=impl)
    folded = op(x.view(2, 3, 8), weight, 3, bias, impl=impl)
    assert torch.equal(turned.indices, expected.indices)
    assert torch.equal(folded.indices, expected.indices.view(2, 3, 3))


@pytest.mark.parametrize("impl", KERNELS)
def test_networks_of_rows_and_reused_memory(
    device: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at a time; what the kernels do not write would stay NaN."""
    monkeypatch.setattr(_encoder, "WORKSPACE", 2 * 8 * 512)  # buffers of 512 entries
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for dtype in DTYPES:
            x, weight, bias = layer(5, 200, 16, dtype, device)
            check(x, weight, 4, bias, impl, "subtract")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("impl", KERNELS)
def test_groups_grow_with_the_layer(
    device: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_encoder, "MAX_GROUPS", 4)
    for dtype in DTYPES:
        x, weight, bias = layer(2, 700, 8, dtype, device)
        check(x, weight, 3, bias, impl, "mask")


@pytest.mark.parametrize("impl", FAST)
def test_autocast_and_no_grad(device: str, impl: str) -> None:
    x, weight, bias = layer(2, 70, 8, torch.float32, device)
    with torch.no_grad():
        assert not op(x.requires_grad_(), weight, 3, bias, impl=impl).values.requires_grad
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(device, dtype=dtype):
        out = op(x, weight, 3, bias, impl=impl)
    assert out.values.dtype == dtype
    plain = op(x.to(dtype), weight.to(dtype), 3, bias.to(dtype), impl=impl)
    assert torch.equal(out.values, plain.values)


@hypothesis.given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 6), st.data())
def test_torch_path_on_any_shape(batch: int, neurons: int, features: int, data: Any) -> None:
    k = data.draw(st.integers(1, neurons))
    x = torch.randint(-3, 4, (batch, features)).double()
    weight = torch.randint(-3, 4, (neurons, features)).double()
    got = op(x, weight, k, threshold=True, impl="torch")
    expected = reference.linear_topk(x, weight, k, threshold=True)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.threshold, expected.threshold)  # type: ignore[arg-type]


@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
def test_gradcheck(inhibition: str) -> None:
    """I carries no gradient under "subtract", so there only the threshold is compared."""
    x, weight, bias = (t.requires_grad_() for t in layer(3, 12, 5, torch.float64, "cpu"))

    def run(*inputs: Tensor) -> Any:
        out = op(
            inputs[0], inputs[1], 4, inputs[2], inhibition=inhibition, threshold=True, impl="torch"
        )
        return (out.values, out.threshold) if inhibition == "mask" else out.threshold

    assert torch.autograd.gradcheck(run, (x, weight, bias))


def layers(
    count: int, batch: int, neurons: int, features: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Scores that differ in scale, so that what one network says shows in another's rows."""
    x, weight, bias = layer(count * batch, count * neurons, features, dtype, device)
    scale = 4.0 ** torch.arange(count, device=device).to(dtype).repeat_interleave(neurons)
    return [x, weight * scale[:, None], bias * scale]


def one_by_one(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None,
    networks: int,
    counts: Tensor,
    **more: Any,
) -> reference.TopKOutput:
    """The loop over networks that a call with several stands for."""
    neurons = len(weight) // networks
    parts = [
        op(own, rows, k, shift, threshold=True, counts=hits, **more)
        for own, rows, shift, hits in zip(
            x.chunk(networks),
            weight.chunk(networks),
            [None] * networks if bias is None else bias.chunk(networks),
            counts.chunk(networks),
            strict=True,
        )
    ]
    return reference.TopKOutput(
        torch.cat([p.values for p in parts]),
        torch.cat([p.indices + n * neurons for n, p in enumerate(parts)]),
        torch.cat([p.threshold for p in parts]),
    )


# (S, B, R, d, k): of each network.
NETWORKS = [(2, 1, 1, 1, 1), (3, 5, 63, 7, 4), (2, 3, 33, 8, 33)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", NETWORKS)
@pytest.mark.parametrize("workspace", [None, 1, 2**14])
def test_networks_equal_the_loop_over_networks(
    device: str,
    impl: str,
    shape: tuple[int, int, int, int, int],
    workspace: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows of each network at a time, one, and two."""
    if workspace is not None:
        monkeypatch.setattr(_encoder, "WORKSPACE", workspace)
    networks, batch, neurons, features, k = shape
    for inhibition, dtype in (("mask", torch.float32), ("subtract", torch.float64)):
        x, weight, bias = layers(networks, batch, neurons, features, dtype, device)
        shift = bias if inhibition == "mask" else None
        counts, expected_counts = torch.ones(
            2, networks * neurons, dtype=torch.int64, device=device
        )
        options: dict[str, Any] = {"inhibition": inhibition, "impl": impl}
        got = op(
            x,
            weight,
            k,
            shift,
            threshold=True,
            preactivations=impl == "reference",
            counts=counts,
            networks=networks,
            **options,
        )
        expected = one_by_one(x, weight, k, shift, networks, expected_counts, **options)
        for ours, theirs in zip(got[:3], expected[:3], strict=True):
            same(ours, theirs)  # type: ignore[arg-type]
        assert torch.equal(counts, expected_counts)
        assert (
            got.indices // neurons
            == torch.arange(networks, device=device).repeat_interleave(batch).unsqueeze(1)
        ).all()
        if got.preactivations is not None:
            assert got.preactivations.shape == (networks * batch, neurons)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("shape", [(10, 128, 10_000, 256, 10), (7, 40, 4_099, 1024, 32)])
def test_networks_large(device: str, impl: str, shape: tuple[int, int, int, int, int]) -> None:
    networks, batch, neurons, features, k = shape
    x, weight, bias = layers(networks, batch, neurons, features, torch.float32, device)
    got = op(x, weight, k, bias, impl=impl, networks=networks)
    for number, own in enumerate(x.chunk(networks)):
        rows = slice(number * batch, (number + 1) * batch)
        here = weight.chunk(networks)[number], bias.chunk(networks)[number]
        error = scale_of_rounding(own, *here)
        scores = F.linear(own.double(), here[0].double(), here[1].double())
        best = scores.topk(k).values
        chosen = scores.gather(1, got.indices[rows] - number * neurons)
        assert (chosen - best).abs().max() <= 2 * error
        close(got.values[rows], best.relu(), error)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_blocks(device: str, impl: str) -> None:
    leaves = layers(3, 5, 63, 7, torch.float32, device)
    grads = []
    for together in (True, False):
        x, weight, bias = (t.detach().clone().requires_grad_() for t in leaves)
        if together:
            out = op(x, weight, 6, bias, threshold=True, impl=impl, networks=3)
        else:
            counts = torch.zeros(len(weight), dtype=torch.int64, device=device)
            out = one_by_one(x, weight, 6, bias, 3, counts, impl=impl)
        ramp = torch.arange(1, out.values.numel() + 1, device=device).view_as(out.values)
        loss = (out.values * (ramp % 5 - 1.5)).sum() + (out.threshold * 0.75).sum()
        grads.append(torch.autograd.grad(loss, [x, weight, bias]))
    for got, expected in zip(*grads, strict=True):
        assert expected.any()
        same(got, expected)


@pytest.mark.parametrize("impl", FAST)
def test_networks_of_a_batch_with_leading_dimensions_or_none(device: str, impl: str) -> None:
    x, weight, bias = layers(2, 6, 40, 8, torch.float32, device)
    flat = op(x, weight, 3, bias, impl=impl, networks=2)
    folded = op(x.view(2, 3, 2, 8), weight, 3, bias, threshold=True, impl=impl, networks=2)
    assert torch.equal(folded.indices, flat.indices.view(2, 3, 2, 3))
    assert folded.threshold is not None
    assert folded.threshold.shape == (2, 3, 2)
    empty = op(x[:0].requires_grad_(), weight, 3, bias, impl=impl, networks=2)
    assert empty.indices.shape == (0, 3)
