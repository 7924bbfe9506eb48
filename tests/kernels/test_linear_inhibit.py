"""linear_inhibit against the specification in fp64, over every implementation."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import linear_inhibit as op
from ssd_kernels import linear_topk, reference
from tests.kernels.conftest import INTERPRETED, same, triton_only

MODULE = importlib.import_module("ssd_kernels.linear_inhibit")  # not the function
FAST = ["torch", triton_only("triton")]
IMPLS = ["reference", *FAST]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
SHAPES = [(1, 1, 1, 1), (3, 33, 7, 33), (2, 65, 5, 64), (2, 299, 17, 5)]
LARGE = [(128, 10_000, 256, 10), (300, 4_099, 60, 32), (64, 2_000, 64, 2_000)]


def layer(batch: int, neurons: int, features: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    sizes = [(batch, features), (neurons, features), (neurons,)]
    tensors = [torch.randn(size, device=device) for size in sizes]
    gaba = torch.rand(neurons, device=device) * 2 - 1
    gaba[::3] = 1
    return [t.to(dtype) for t in (*tensors, gaba)]


def check(
    x: Tensor, weight: Tensor, k: int, bias: Tensor | None, gaba: Tensor | None, impl: str, how: str
) -> None:
    counts = torch.full((len(weight),), 2, dtype=torch.int32, device=x.device)
    got = op(x, weight, k, gaba, bias, inhibition=how, counts=counts, impl=impl)
    assert got.dtype == x.dtype
    assert torch.equal(counts, 2 + (got > 0).sum(0).int())
    wide = [None if t is None else t.double() for t in (gaba, bias)]
    exact = reference.linear_inhibit(x.double(), weight.double(), k, *wide, inhibition=how)
    scores = F.linear(x.double(), weight.double(), wide[1])
    native = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    # The surplus has the errors of two scores.
    error = 2 * (native - scores).abs().max().item()
    error += 8 * torch.finfo(torch.float32).eps * max(1.0, scores.abs().max().item())
    rounding = torch.finfo(x.dtype).eps * exact.abs() + torch.finfo(x.dtype).tiny
    wrong = (got.double() - exact).abs() > error + rounding
    if how == "mask":  # a surplus within rounding of 0 may fall on either side
        cut = scores.relu().sort(dim=-1, descending=True).values
        inhibition = cut[:, k, None] if k < len(weight) else torch.zeros_like(cut[:, :1])
        surplus = scores.relu() - (1.0 if wide[0] is None else wide[0]) * inhibition
        wrong &= surplus.abs() > error
    assert not wrong.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["mask", "subtract"])
def test_output(device: str, impl: str, shape: tuple[int, int, int, int], how: str) -> None:
    batch, neurons, features, k = shape
    for dtype in DTYPES:
        x, weight, bias, gaba = layer(batch, neurons, features, dtype, device)
        check(x, weight, k, bias, gaba, impl, how)
    check(x, weight, k, None, None, impl, how)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_large(
    device: str, impl: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    batch, neurons, features, k = shape
    x, weight, bias, gaba = layer(batch, neurons, features, dtype, device)
    check(x, weight, k, bias, gaba, impl, "subtract")


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("how", ["mask", "subtract"])
def test_full_inhibition_is_the_scattered_code(device: str, impl: str, how: str) -> None:
    """Up to rounding: the two ops sum their products in orders of their own."""
    x, weight, bias, _ = layer(4, 150, 12, torch.float32, device)
    code = linear_topk(x, weight, 6, bias, inhibition=how, impl=impl)
    dense = x.new_zeros(4, 150).scatter_(1, code.indices, code.values)
    torch.testing.assert_close(op(x, weight, 6, None, bias, inhibition=how, impl=impl), dense)


def gradients(impl: str, inputs: list[Tensor], how: str, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, gaba = (t.detach().to(dtype) for t in inputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    hidden = op(x, weight, 6, gaba, bias, inhibition=how, impl=impl)
    ramp = torch.arange(hidden.numel(), device=x.device).view_as(hidden) % 7 - 2.5
    return list(torch.autograd.grad((hidden * ramp).sum(), leaves))


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("how", ["mask", "subtract"])
def test_gradients(device: str, impl: str, how: str) -> None:
    """Some gaba < 0: such neurons answer though a = 0, and then pass no gradient."""
    inputs = layer(4, 150, 12, torch.float32, device)
    exact = gradients("reference", inputs, how, torch.float64)
    native = gradients("reference", inputs, how, torch.float32)
    got = gradients(impl, inputs, how, torch.float32)
    for ours, theirs, truth in zip(got, native, exact, strict=True):
        epsilon = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + epsilon


@pytest.mark.parametrize("impl", FAST)
def test_gaba_may_learn(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(3, 60, 8, torch.float32, device)
    got = op(x, weight, 4, gaba.requires_grad_(), bias, impl=impl)
    expected = reference.linear_inhibit(x, weight, 4, gaba, bias)
    want = torch.autograd.grad(expected.sum(), gaba)[0]
    assert want.any()
    torch.testing.assert_close(torch.autograd.grad(got.sum(), gaba)[0], want)


@pytest.mark.parametrize("impl", FAST)
def test_shapes_and_strides(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(6, 70, 8, torch.float32, device)
    assert op(x[:0], weight, 3, gaba, bias, impl=impl).shape == (0, 70)
    expected = op(x, weight, 3, gaba, bias, impl="reference").view(2, 3, 70)
    got = op(x.T.contiguous().T.view(2, 3, 8), weight, 3, gaba, bias, impl=impl)
    torch.testing.assert_close(got, expected)
    counts = torch.zeros(70, dtype=torch.int64, device=device)
    torch.testing.assert_close(
        op(x[0], weight, 3, gaba, bias, counts=counts, impl=impl), expected[0, 0]
    )
    assert torch.equal(counts, (expected[0, 0] > 0).long())


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_many_slabs(device: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "slab_rows", lambda *_: 2)
    x, weight, bias, gaba = layer(5, 200, 16, torch.float16, device)
    check(x, weight, 4, bias, gaba, impl, "subtract")


@pytest.mark.parametrize("impl", FAST)
def test_autocast(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(2, 70, 8, torch.float32, device)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    with torch.autocast(device, dtype=dtype), torch.no_grad():
        got = op(x, weight, 3, gaba, bias, impl=impl)
    plain = op(x.to(dtype), weight.to(dtype), 3, gaba, bias.to(dtype), impl=impl)
    assert got.dtype == dtype
    assert torch.equal(got, plain)


@hypothesis.given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 6), st.data())
def test_torch_path_on_any_shape(batch: int, neurons: int, features: int, data: Any) -> None:
    k = data.draw(st.integers(1, neurons))
    how = data.draw(st.sampled_from(["mask", "subtract"]))
    x = torch.randint(-3, 4, (batch, features)).double()
    weight = torch.randint(-3, 4, (neurons, features)).double()
    gaba = torch.randint(-4, 5, (neurons,)).double() / 4
    got = op(x, weight, k, gaba, inhibition=how, impl="torch")
    assert torch.equal(got, reference.linear_inhibit(x, weight, k, gaba, inhibition=how))


def one_by_one(
    x: Tensor,
    weight: Tensor,
    k: int,
    gaba: Tensor | None,
    bias: Tensor | None,
    networks: int,
    counts: Tensor,
    **more: Any,
) -> Tensor:
    """The loop over networks that a call with several stands for."""
    shares = [
        [None] * networks if t is None else t.chunk(networks)
        for t in (x, weight, gaba, bias, counts)
    ]
    return torch.cat(
        [
            op(own, rows, k, response, shift, counts=hits, **more)
            for own, rows, response, shift, hits in zip(*shares, strict=True)
        ]
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1), (3, 5, 63, 7, 4), (2, 3, 33, 8, 33)])
@pytest.mark.parametrize("slab", [None, 2, 11])
def test_networks_equal_the_loop_over_networks(
    device: str,
    impl: str,
    shape: tuple[int, int, int, int, int],
    slab: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if slab is not None:
        monkeypatch.setattr(MODULE, "slab_rows", lambda *_: slab)
    networks, batch, neurons, features, k = shape
    for how, dtype in (("mask", torch.float32), ("subtract", torch.float64)):
        x, weight, bias, gaba = layer(networks * batch, networks * neurons, features, dtype, device)
        weight[neurons:] *= 4
        for response, shift in ((gaba, bias), (None, None)):
            counts, expected_counts = torch.ones(2, len(weight), dtype=torch.int64, device=device)
            options: dict[str, Any] = {"inhibition": how, "impl": impl}
            got = op(x, weight, k, response, shift, counts=counts, networks=networks, **options)
            expected = one_by_one(
                x, weight, k, response, shift, networks, expected_counts, **options
            )
            assert got.shape == (networks * batch, neurons)
            same(got, expected)
            assert torch.equal(counts, expected_counts)


@pytest.mark.cuda
@pytest.mark.parametrize("impl", FAST)
def test_networks_large(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(10 * 128, 10 * 10_000, 256, torch.float32, device)
    got = op(x, weight, 10, gaba, bias, impl=impl, networks=10)
    shares = (t.chunk(10) for t in (got, x, weight, gaba, bias))
    for own, inputs, rows, response, shift in zip(*shares, strict=True):
        wide = (t.double() for t in (inputs, rows))
        exact = reference.linear_inhibit(*wide, 10, response.double(), shift.double())
        assert (own - exact).abs().max() <= 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", ["mask", "subtract"])
def test_gradients_of_blocks(device: str, impl: str, how: str) -> None:
    """In fp32 the batched product of the kernels' backward may round in another order."""
    leaves = layer(3 * 5, 3 * 63, 7, torch.float32, device)
    grads = []
    for together in (True, False):
        x, weight, bias, gaba = (t.detach().clone() for t in leaves)
        inputs = [t.requires_grad_() for t in (x, weight, bias)]
        if together:
            hidden = op(x, weight, 6, gaba, bias, inhibition=how, impl=impl, networks=3)
        else:
            counts = torch.zeros(len(weight), dtype=torch.int64, device=device)
            hidden = one_by_one(x, weight, 6, gaba, bias, 3, counts, inhibition=how, impl=impl)
        ramp = torch.arange(hidden.numel(), device=device).view_as(hidden) % 7 - 2.5
        grads.append(torch.autograd.grad((hidden * ramp).sum(), inputs))
    for got, expected in zip(*grads, strict=True):
        assert expected.any()
        if impl == "triton":
            torch.testing.assert_close(got, expected)
        else:
            same(got, expected)


@pytest.mark.parametrize("impl", FAST)
def test_gaba_of_blocks_may_learn(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(2 * 3, 2 * 40, 8, torch.float32, device)
    gaba.requires_grad_()
    got = op(x, weight, 4, gaba, bias, impl=impl, networks=2)
    expected = reference.linear_inhibit(x, weight, 4, gaba, bias, networks=2)
    want = torch.autograd.grad(expected.sum(), gaba)[0]
    assert want.any()
    torch.testing.assert_close(torch.autograd.grad(got.sum(), gaba)[0], want)


@pytest.mark.parametrize("impl", FAST)
def test_shapes_of_blocks(device: str, impl: str) -> None:
    x, weight, bias, gaba = layer(6, 70, 8, torch.float32, device)
    assert op(x[:0], weight, 3, gaba, bias, impl=impl, networks=2).shape == (0, 35)
    flat = op(x, weight, 3, gaba, bias, impl=impl, networks=2)
    folded = op(x.view(3, 2, 8), weight, 3, gaba, bias, impl=impl, networks=2)
    assert torch.equal(folded, flat.view(3, 2, 35))
