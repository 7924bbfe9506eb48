"""The encoder pipeline: bounds, groups, forms of the product, hard inputs, graded codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_kernels import _encoder, _encoder_kernels, _tuning, reference
from ssd_kernels import linear_topk as op
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_linear_topk import (
    DTYPES,
    FAST,
    KERNELS,
    layer,
    layers,
    scale_of_rounding,
    spec,
)


def test_sizes_of_groups() -> None:
    """They tell the best apart, a program can hold their keys, and a tile holds whole ones."""
    for neurons in (1, 33, 1000, 10_000, 131_072, 2**20, 2**24):
        for best in (1, 11, 33, 256):
            for estimate in (True, False):
                group = _encoder.group_size(neurons, best, estimate, 256)
                assert group in (8, 16, 32, 64, 128, 256)
                assert group <= 8 or neurons >= 4 * best * group
                assert group == 256 or neurons <= group * _encoder.MAX_GROUPS
    assert _encoder.group_size(131_072, 33, False, 256) == 64
    assert _encoder.group_size(65_536, 33, True, 256) == 32


def tile(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Products of other tiles, for tests that the interpreter runs."""
    row = {"TOGETHER": 2, "num_warps": 4, "num_stages": 1, **sizes}
    monkeypatch.setitem(_tuning.TABLE, "linear_topk", {"default": (({}, row),)})


@pytest.mark.skipif(not INTERPRETED, reason="on CUDA the tuning table decides")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("persistent", [0, 1])
@pytest.mark.parametrize("described", [0, 1])
def test_every_form_of_the_product(
    device: str, impl: str, persistent: int, described: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptors read zeros past the end of a row, and the next network's rows past a network."""
    tile(monkeypatch, DESCRIPTORS=described, PERSISTENT=persistent, BM=16, BN=64, BK=32)
    for dtype in DTYPES:
        x, weight, bias = layers(2, 37, 150, 40, dtype, device)
        got = op(x, weight, 3, bias, networks=2, impl=impl)
        expected = spec(x, weight, 3, bias, networks=2)
        assert torch.equal(got.indices, expected.indices)


@contextmanager
def scored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many neurons are scored in fp32, call by call."""
    seen: list[int] = []
    scores = _encoder_kernels._scores

    def spy(x: Any, weight: Any, neuron: Any, inside: Any, *rest: Any) -> Any:
        seen.append(int(inside.handle.data.sum()))
        return scores(x, weight, neuron, inside, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(_encoder_kernels, "_scores", spy)
        yield seen


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    ("features", "neurons", "k", "dtype"),
    [
        (256, 10_000, 10, torch.float32),
        (1024, 65_536, 32, torch.float32),
        (1024, 131_072, 32, torch.float16),
    ],
)
def test_few_neurons_are_scored_in_fp32(
    impl: str,
    features: int,
    neurons: int,
    k: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the benchmark's shapes: on average no more than 2 k + 100 a row."""
    tile(monkeypatch, DESCRIPTORS=0, PERSISTENT=0, BM=16, BN=4096, BK=256)
    monkeypatch.setattr(_encoder, "ENTRIES", 2**20)
    x, weight, _ = layer(12, neurons, features, dtype, "cpu")
    with scored(monkeypatch) as seen:
        got = op(x, weight, k, impl=impl)
    assert 0 < sum(seen) <= len(x) * (2 * k + 100)
    scores = x.double() @ weight.double().T
    best = scores.topk(k).values
    assert (scores.gather(1, got.indices) - best).abs().max() <= 2 * scale_of_rounding(
        x, weight, None
    )


def adverse(kind: str, device: str) -> tuple[Tensor, Tensor]:
    """x [3, 24] and weight [600, 24], for which few bounds separate the best from the rest."""
    x, weight, _ = layer(3, 600, 24, torch.float32, device)
    if kind == "sorted":
        weight = weight[(weight @ x[0]).argsort(descending=True)]
    elif kind == "duplicates":
        weight = weight[:6].repeat_interleave(100, dim=0)
    elif kind == "scattered duplicates":
        weight = weight[:6].repeat(100, 1)
    elif kind == "ties":
        weight = weight[:1].expand(600, -1).contiguous()
    elif kind == "zero":
        x, weight = torch.zeros_like(x), weight.abs()
    elif kind == "huge row":
        weight[417] *= 1e8
    elif kind == "near":
        base = 10 + torch.rand(24, device=device)
        x, weight = base + torch.rand_like(x), base + 1e-5 * torch.rand_like(weight)
    elif kind == "scales":
        weight *= 2.0 ** torch.randint(-60, 60, (600, 1), device=device)
        x *= 2.0 ** torch.randint(-60, 60, (3, 1), device=device)
    elif kind == "spread":
        weight *= 2.0 ** torch.randint(-30, 1, weight.shape, device=device)
    elif kind == "subnormal":
        x, weight = x * 2.0**-140, weight * 2.0**60
    return x, weight


ADVERSE = [
    "sorted",
    "duplicates",
    "scattered duplicates",
    "ties",
    "zero",
    "huge row",
    "near",
    "scales",
    "spread",
    "subnormal",
]


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("kind", ADVERSE)
def test_adverse_weights(device: str, impl: str, kind: str) -> None:
    x, weight = adverse(kind, device)
    for k in (1, 40):
        check_rows(x, weight, k, impl)


def check_rows(x: Tensor, weight: Tensor, k: int, impl: str) -> None:
    """Scores of the chosen neurons, within the rounding of each row's own scores."""
    got = op(x, weight, k, impl=impl)
    scores = x.double() @ weight.double().T
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    error = 4 * torch.finfo(torch.float32).eps * size + 2.0**-140
    best, order = scores.sort(dim=1, descending=True, stable=True)
    chosen = scores.gather(1, got.indices)
    slack = error.gather(1, got.indices) + error.gather(1, order[:, :k])
    assert ((chosen - best[:, :k]).abs() <= slack).all()
    assert (got.indices.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ((got.values.double() - chosen.relu()).abs() <= slack).all()


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("impl", KERNELS)
def test_a_huge_row_is_looked_at_alone(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group's bound is wide; the others keep theirs."""
    x, weight = adverse("huge row", "cpu")
    with scored(monkeypatch) as seen:
        op(x, weight, 3, impl=impl)
    assert sum(seen) <= len(x) * 3 * 32


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_of_zeros_is_not_scored(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ties all neurons, but those that are no numbers."""
    x, weight, _ = layer(2, 577, 24, dtype, "cpu")
    x[:] = 0
    for k in (1, 5, 577):
        with scored(monkeypatch) as seen:
            got = op(x, weight, k, threshold=True, impl=impl)
        assert torch.equal(got.indices, torch.arange(k).expand(2, k))
        assert not got.values.any()
        assert not got.threshold.any()
        assert sum(seen) <= 2 * (k + 2)
    weight[400, 3], weight[30, 1], weight[576, 0] = float("nan"), float("inf"), float("-inf")
    got = op(x, weight, 4, threshold=True, impl=impl)
    expected = reference.linear_topk(x, weight, 4, threshold=True)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.values, expected.values, equal_nan=True)


@pytest.mark.parametrize("impl", FAST)
def test_what_is_not_finite(device: str, impl: str) -> None:
    """NaN ranks first; an infinite or huge row of x or of weight bounds nothing."""
    x, weight, _ = layer(6, 300, 8, torch.float32, device)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 3e38
    weight[5], weight[70, 2], weight[90, 1], weight[200] = 1e36, float("inf"), float("nan"), 0.0
    for k in (1, 4, 20):
        got = op(x, weight, k, threshold=True, impl=impl)
        expected = reference.linear_topk(x, weight, k, threshold=True)
        for row in (0, 1, 2, 4, 5):  # sums of row 3 overflow, by the order of their terms
            assert torch.equal(got.indices[row], expected.indices[row]), row
            torch.testing.assert_close(got.values[row], expected.values[row], equal_nan=True)


@pytest.mark.parametrize("impl", FAST)
def test_an_estimate_that_overflows_halfway(device: str, impl: str) -> None:
    """x times the scaled row 77 of weight leaves fp32, their product does not: the largest."""
    x = torch.tensor([[2.0**113.5]], device=device)
    weight = -torch.ones(256, 1, device=device)
    weight[64:96], weight[77] = -1.2, -1.9 * 2.0**-60
    bias = torch.zeros(256, device=device)
    bias[77] = 2.0**60
    for shift in (None, bias):
        assert op(x, weight, 1, shift, impl=impl).indices.item() == 77


@pytest.mark.parametrize("impl", KERNELS)
def test_the_bound_on_an_estimate_holds(device: str, impl: str) -> None:
    """Where all rounding adds up, and where entries become subnormal; and it is not loose."""
    for scale in (2.0**-100, 2.0**-10, 1.0, 2.0**20):
        x = torch.full((3, 256), scale * (1 + 2.0**-11 - 2.0**-20), device=device)
        x[1, 1:] *= 2.0**-30
        x[2] = torch.rand(256, device=device)
        weight = torch.cat([x, scale * torch.randn(50, 256, device=device)])
        product = _encoder.Product(x, weight, None, None, 2, 2, 1)
        halves = product.halves[:, :256].double() * product.units.double().unsqueeze(1)
        error = (halves[:3] @ halves[3:].T - x.double() @ weight.double().T).abs()
        norms = product.norms.double()
        exact = torch.cat([x, weight]).double().norm(dim=1)
        assert ((exact <= norms) & (norms <= 1.0001 * exact)).all()
        bound = _encoder.relative_error(256) * norms[:3, None] * norms[3:]
        assert (error <= bound).all()
        assert (bound[0, 0] <= 1.5 * error[0, 0]).all()


@pytest.mark.parametrize("neurons", [131_072, 2**20])
def test_keys_are_a_small_share_of_the_logits(neurons: int) -> None:
    for estimate in (True, False):
        group = _encoder.group_size(neurons, 33, estimate, 256)
        rows = min(8192, _encoder.WORKSPACE // (8 * (neurons // group)))
        assert rows * 8 * neurons / group <= 0.05 * 8192 * neurons * (4 if estimate else 2)


@pytest.mark.parametrize("features", [1, 16, 1024])
def test_the_workspace_is_bounded(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers too, which outweigh the keys of few neurons."""
    monkeypatch.setattr(_encoder, "WORKSPACE", 2**16)
    x = torch.zeros(1, features, dtype=torch.float16).expand(1000, -1)
    for neurons, k in ((60, 2), (3000, 2), (3000, 255)):
        product = _encoder.Product(x, x[:1].expand(neurons, -1), None, None, k + 1, k + 1, 1)
        assert max(product.buffer.nbytes, product.group_keys.nbytes) <= 2**16
        assert product.rows >= 8


@pytest.mark.skipif(_encoder.TensorDescriptor is None, reason="no tensor descriptors")
def test_what_descriptors_describe() -> None:
    """Rows of whole 16 bytes that do not overlap."""
    wide = torch.zeros(9, 32, dtype=torch.float16)
    described = [wide, wide[:, :24], wide[1:, 8:]]
    others = [wide[:, 1:], wide[:, :30].contiguous(), wide[:1].expand(9, -1), wide[:, :0]]
    assert all(_encoder._aligned(x, wide) and _encoder._aligned(wide, x) for x in described)
    assert not any(_encoder._aligned(x, wide) or _encoder._aligned(wide, x) for x in others)


def graded(x: Tensor, weight: Tensor, k: int, gaba: Tensor, how: str, networks: int) -> Tensor:
    """The dense activations in fp64."""
    given = x.double(), weight.double(), k, gaba.double()
    return reference.linear_inhibit(*given, inhibition=how, networks=networks)


# (S, B, R, d, k, width); a few groups, many, and one network of several.
CODES = [(1, 3, 33, 7, 2, 8), (1, 3, 600, 24, 5, 20), (2, 2, 200, 16, 4, 40)]


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("how", ["mask", "subtract"])
@pytest.mark.parametrize("shape", CODES)
@pytest.mark.parametrize("rows", [None, 1])
def test_graded_codes(
    device: str,
    impl: str,
    how: str,
    shape: tuple[int, ...],
    rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neurons that hardly answer, some that do, all that do; too many for the code or not."""
    if rows is not None:
        monkeypatch.setattr(_encoder, "WORKSPACE", rows)
    networks, batch, neurons, features, k, width = shape
    x, weight, _ = layers(networks, batch, neurons, features, torch.float32, device)
    for least, positive in ((0.05, False), (0.6, True), (1.0, True)):
        gaba = least + (1 - least) * torch.rand(networks * neurons, device=device)
        given = (x.abs(), weight.abs()) if positive else (x, weight)
        values, indices, overflow = _encoder.graded_code(
            *given, k, width, gaba, how, None, networks
        )
        dense = graded(*given, k, gaba, how, networks)
        assert torch.equal(overflow, (dense > 0).sum(1) > width)
        expected, order = dense.sort(dim=1, descending=True, stable=True)
        error = 2e-6 * dense.abs().max() + scale_of_rounding(*given, None)
        assert ((values - expected[:, :width]).abs() <= error).all()
        own = reference.numbered_through(order[:, :width], neurons, networks)
        active = expected[:, :width] > error
        assert torch.equal(indices[active], own[active])
        first = torch.arange(networks, device=device).repeat_interleave(batch).unsqueeze(1)
        assert (indices // neurons == first).all()


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("kind", ["sorted", "ties", "zero", "huge row", "scales", "subnormal"])
def test_graded_codes_of_adverse_weights(device: str, impl: str, kind: str) -> None:
    x, weight = adverse(kind, device)
    gaba = 0.9 + 0.1 * torch.rand(len(weight), device=device)
    values, _, overflow = _encoder.graded_code(x, weight, 5, 40, gaba, "subtract", None, 1)
    dense = graded(x, weight, 5, gaba, "subtract", 1)
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max()
    error = 8 * torch.finfo(torch.float32).eps * size + 2.0**-140
    expected = dense.sort(dim=1, descending=True).values[:, :40]
    assert ((values - expected).abs() <= error).all()
    assert overflow[(dense > error).sum(1) > 40].all()


@pytest.mark.parametrize("impl", KERNELS)
def test_graded_codes_of_zeros(device: str, impl: str) -> None:
    x, weight, _ = layer(3, 300, 24, torch.float32, device)
    x[1] = 0
    gaba = 0.8 + 0.2 * torch.rand(300, device=device)
    values, _, overflow = _encoder.graded_code(x, weight, 5, 40, gaba, "mask", None, 1)
    assert not values[1].any()
    assert values[0].any()
    assert not overflow[1]
    weight[7, 3] = float("nan")
    values, indices, _ = _encoder.graded_code(x, weight, 5, 40, gaba, "mask", None, 1)
    assert values[1, 0].isnan()
    assert indices[1, 0] == 7


@pytest.mark.parametrize("impl", KERNELS)
def test_graded_codes_repeat(device: str, impl: str) -> None:
    x, weight, _ = layer(4, 300, 24, torch.float32, device)
    gaba = 0.8 + 0.2 * torch.rand(300, device=device)
    runs = [_encoder.graded_code(x, weight, 5, 40, gaba, "mask", None, 1) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("impl", KERNELS)
def test_a_graded_code_of_no_rows(device: str, impl: str) -> None:
    weight = torch.rand(60, 8, device=device)
    gaba = torch.ones(60, device=device)
    values, indices, overflow = _encoder.graded_code(
        weight[:0], weight, 5, 20, gaba, "mask", None, 2
    )
    assert values.shape == indices.shape == (0, 20)
    assert overflow.shape == (0,)
