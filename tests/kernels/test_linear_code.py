"""linear_code: the firing neurons of a layer under graded inhibition, exactly."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels import reference
from ssd_kernels._graded_code import Shadow, linear_code
from tests.kernels.conftest import NUMBA

IMPLS = ["torch", *NUMBA]
SHADOWS = (torch.float32, torch.bfloat16)


def layer(neurons: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs near some neurons, so that few fire; gaba in 0.9..1."""
    weight = F.normalize(torch.rand(neurons, features, dtype=dtype) ** 4, dim=1)
    x = F.normalize(weight[:9] + 0.05 * torch.rand(9, features, dtype=dtype), dim=1)
    return x, weight, 0.9 + 0.1 * torch.rand(neurons, dtype=dtype)


def scatter(code: reference.TopKOutput, neurons: int) -> Tensor:
    dense = code.values.new_zeros(len(code.values), neurons)
    return dense.scatter_add(1, code.indices, code.values)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(("neurons", "width"), [(50, 20), (3001, 40), (4096, 64)])
@pytest.mark.parametrize("shadow_dtype", [None, *SHADOWS])
def test_equals_the_dense_layer(
    neurons: int,
    width: int,
    graded: bool,
    inhibition: str,
    shadow_dtype: torch.dtype | None,
    impl: str,
) -> None:
    x, weight, gaba = layer(neurons, 32, torch.float32)
    gaba = gaba if graded else None
    shadow = None if shadow_dtype is None else Shadow(weight, shadow_dtype)
    options: dict[str, Any] = {"inhibition": inhibition, "impl": impl}
    code, wider = linear_code(x, weight, 5, width, gaba, shadow=shadow, **options)
    expected = reference.linear_inhibit(
        x.double(),
        weight.double(),
        5,
        None if gaba is None else gaba.double(),
        inhibition=inhibition,
    )
    assert torch.equal(wider, (expected > 0).sum(1) > width)
    error = (scatter(code, neurons) - expected).abs()[~wider]
    native = (reference.linear_inhibit(x, weight, 5, gaba, inhibition=inhibition) - expected).abs()
    assert error.amax() <= native.max() + 1e-6
    assert (code.values.diff(dim=1) <= 0).all()
    if shadow is not None and (graded or impl == "torch"):
        plain, _ = linear_code(x, weight, 5, width, gaba, **options)
        assert torch.equal(code.values, plain.values)
        active = code.values > 0
        assert torch.equal(code.indices[active], plain.indices[active])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", SHADOWS)
def test_a_row_that_the_estimate_cannot_settle_is_still_exact(
    dtype: torch.dtype, impl: str
) -> None:
    """Hundreds of neurons within bfloat16 rounding of one another at the threshold."""
    base = F.normalize(torch.rand(1, 64), dim=1)
    length = 1 - 1e-6 * torch.randperm(4096)
    weight = base * length[:, None]
    code, wider = linear_code(base, weight, 10, 40, shadow=Shadow(weight, dtype), impl=impl)
    assert not wider
    best = length.sort(descending=True)
    assert code.indices[0, :10].tolist() == best.indices[:10].tolist()
    torch.testing.assert_close(code.values[0, :10], best.values[:10] - best.values[10])
    assert code.values[0, 10:].sum() == 0


@pytest.mark.parametrize("scale", [1.0, 1e-15, 4e-19])
@pytest.mark.parametrize("least", [0.1, 0.9, None])
@pytest.mark.parametrize("dtype", SHADOWS)
@pytest.mark.parametrize("width", [5, 40])
def test_the_filter_changes_no_bit(
    scale: float, least: float | None, dtype: torch.dtype, width: int
) -> None:
    """Scores that are zero, tiny, tied or graded by a few neurons that hardly respond."""
    for seed in range(20):
        torch.manual_seed(seed)
        weight = F.normalize(torch.rand(3001, 48) ** 4, dim=1)
        weight[torch.rand(3001) < 0.2] = 0
        weight[1500:1600] = weight[:100]
        gaba = None
        if least is not None:
            gaba = torch.ones(3001)
            gaba[torch.randint(3001, (10,))] = least
        x = F.normalize(weight[torch.randint(3001, (9,))] + 0.05 * torch.rand(9, 48), dim=1)
        x[3] = 0
        x[4, 1:] = 0
        x[5] *= 1e-20
        x, weight = x * scale, weight * scale
        shadow = Shadow(weight, dtype)
        for inhibition in ("subtract", "mask"):
            options: dict[str, Any] = {"inhibition": inhibition, "impl": "torch"}
            plain, wide = linear_code(x, weight, 5, width, gaba, **options)
            code, also = linear_code(x, weight, 5, width, gaba, shadow=shadow, **options)
            active = plain.values > 0
            assert torch.equal(code.values, plain.values)
            assert torch.equal(code.indices[active], plain.indices[active])
            assert torch.equal(wide, also)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", SHADOWS)
def test_not_a_number_stays_one(dtype: torch.dtype, impl: str) -> None:
    x, weight, _ = layer(4096, 32, torch.float32)
    shadow = Shadow(weight, dtype)
    clean, _ = linear_code(x, weight, 5, 40, shadow=shadow, impl=impl)
    x[2, 7] = torch.inf
    code, _ = linear_code(x, weight, 5, 40, shadow=shadow, impl=impl)
    others = torch.arange(9) != 2
    exact = {"rtol": 0.0, "atol": 0.0} if impl == "torch" else {}
    torch.testing.assert_close(code.values[others], clean.values[others], **exact)
    plain, _ = linear_code(x, weight, 5, 40, impl=impl)
    assert plain.values[2].isnan().any()
    assert torch.equal(code.values.isnan(), plain.values.isnan())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", SHADOWS)
def test_a_neuron_that_is_no_number_is_seen_by_every_sample(dtype: torch.dtype, impl: str) -> None:
    x, weight, _ = layer(4096, 32, torch.float32)
    shadow = Shadow(weight, dtype)
    weight[77] = torch.nan
    shadow.update(weight, torch.tensor([77]))
    for given in (shadow, None):
        code, _ = linear_code(x, weight, 5, 40, shadow=given, impl=impl)
        assert code.values[:, 0].isnan().all()
        assert (code.indices[:, 0] == 77).all()
        assert not code.values[:, 1:].isnan().any()


def adverse(name: str, k: int) -> tuple[Tensor, Tensor]:
    """x [9, 48] and a weight [3001, 48], not negative."""
    weight = F.normalize(torch.rand(3001, 48) ** 4, dim=1)
    x = F.normalize(weight[torch.randint(3001, (9,))] + 0.05 * torch.rand(9, 48), dim=1)
    if name == "duplicates":
        weight[1501:] = weight[:1500].clone()
    elif name == "equal":
        weight[:] = weight[0]
    elif name == "zeros":
        weight[torch.rand(3001) < 0.5] = 0
        x[::2] = 0
    elif name == "negative zeros":
        x[x < 0.1] = -0.0
        weight[weight < 0.01] = -0.0
    elif name == "few fire":
        weight[k:] = 0
    elif name == "lengths":
        weight *= 10 ** (30 * torch.rand(3001, 1) - 15)
        x *= 10 ** (30 * torch.rand(9, 1) - 15)
    elif name != "plain":
        scale = {"huge": 1e18, "tiny": 1e-18, "subnormal": 1e-39}[name]
        x, weight = x * scale, weight * (1 if name == "subnormal" else scale)
    return x, weight


@pytest.mark.skipif(not NUMBA, reason="numba does not serve here")
@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "duplicates",
        "equal",
        "zeros",
        "negative zeros",
        "few fire",
        "lengths",
        "huge",
        "tiny",
        "subnormal",
    ],
)
@pytest.mark.parametrize("k", [1, 10, 186, 187, 3001])  # of 188 groups
def test_loops_against_fp64(
    k: int, name: str, inhibition: str, shadow_dtype: torch.dtype | None
) -> None:
    """Where ties are exact the lower index fires; within rounding of the threshold either may."""
    x, weight = adverse(name, k)
    shadow = None if shadow_dtype is None else Shadow(weight, shadow_dtype)
    width, counts = min(k + 3, 3001), torch.zeros(3001, dtype=torch.int64)
    code, wider = linear_code(
        x, weight, k, width, inhibition=inhibition, shadow=shadow, counts=counts, impl="numba"
    )
    activation = (x.double() @ weight.double().T).relu()
    ordered = activation.sort(dim=1, descending=True).values
    cut = ordered[:, k : k + 1] if k < 3001 else 0.0
    rounding = 1e-5 * ordered[:, :1] + 48 * 2.0**-149
    surplus, hidden = activation - cut, scatter(code, 3001).double()
    fires, silent = surplus > rounding, surplus < -rounding
    expected = activation if inhibition == "mask" else surplus.relu()
    assert ((hidden - expected).abs() <= rounding)[fires].all()
    assert (hidden[silent] == 0).all()
    assert (((hidden - expected).abs() <= rounding) | (hidden == 0)).all()
    assert (code.values.diff(dim=1) <= 0).all()
    active = code.values > 0
    assert torch.equal(counts, torch.bincount(code.indices[active], minlength=3001))
    assert not wider.any()
    tied = (code.values.diff(dim=1) == 0) & active[:, 1:]
    assert (code.indices.diff(dim=1)[tied] > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_denormal_numbers_that_are_flushed(impl: str) -> None:
    """Zeros are ranked above what is negative all the same."""
    weight = torch.full((100, 4), -1.0)
    weight[60::3] = 0
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU flushes nothing")
    try:
        for x in (torch.rand(16, 4), torch.rand(5, 4)):
            code, _ = linear_code(x, weight, 3, 3, impl=impl)
            assert (code.indices == torch.tensor([60, 63, 66])).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(not NUMBA, reason="numba does not serve here")
@pytest.mark.parametrize(("spread", "served"), [(4.0, True), (0.0, False)])
def test_too_many_candidates_take_all_scores(spread: float, served: bool) -> None:
    from ssd_kernels import _loops

    weight = F.normalize(0.9 + 0.1 * torch.rand(3001, 48), dim=1)
    if spread:
        weight = F.normalize(torch.rand(3001, 48) ** spread, dim=1)
    x = F.normalize(weight[:9] + 0.05 * torch.rand(9, 48), dim=1)
    estimated = mock.Mock(side_effect=_loops.code_of_estimates)
    with (
        mock.patch.object(_loops, "code_of_estimates", estimated),
        mock.patch.object(_loops, "code", mock.Mock(side_effect=_loops.code)) as scored,
    ):
        linear_code(x, weight, 5, 8, shadow=Shadow(weight, torch.bfloat16), impl="numba")
    assert estimated.call_count == 1
    assert scored.call_count == (not served)


@pytest.mark.parametrize("shadowed", [False, True])
def test_too_many_active_neurons_are_reported(shadowed: bool) -> None:
    x, weight, _ = layer(4096, 32, torch.float32)
    x[3] = 0
    gaba = torch.full((4096,), 0.3)
    shadow = Shadow(weight) if shadowed else None
    wider = linear_code(x, weight, 5, 40, gaba, shadow=shadow)[1]
    assert wider.tolist() == [number != 3 for number in range(9)]


@pytest.mark.parametrize("dtype", SHADOWS)
def test_the_shadow_follows_the_rows_it_is_told_of(dtype: torch.dtype) -> None:
    _, weight, _ = layer(300, 16, torch.float32)
    shadow = Shadow(weight, dtype)
    assert not shadow.stale(weight)
    changed = torch.tensor([3, 200])
    weight[changed] *= 0.5
    assert shadow.stale(weight)
    shadow.update(weight, changed)
    assert not shadow.stale(weight)
    assert torch.equal(shadow.rows, weight.to(dtype))


def test_estimates_lie_within_their_bound() -> None:
    x, weight, gaba = layer(300, 64, torch.float32)
    exact = (weight.double() / gaba.double().unsqueeze(1)) @ x.double().T
    for dtype in SHADOWS:
        shadow = Shadow(weight, dtype)
        estimates = shadow.graded(shadow.estimates(x), gaba)[:300].double()
        error = ((estimates - exact).abs() / estimates).max()
        assert 0 < error <= shadow.relative_error()


def test_a_lowered_precision_of_products_widens_the_bound() -> None:
    shadow = Shadow(torch.rand(300, 16), torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert (
            shadow.relative_error() == Shadow(torch.rand(300, 16), torch.bfloat16).relative_error()
        )
    finally:
        torch.set_float32_matmul_precision(before)


def test_empty_batch_and_all_zero_rows() -> None:
    _, weight, gaba = layer(3000, 16, torch.float32)
    code, wider = linear_code(torch.zeros(0, 16), weight, 5, 20, gaba)
    assert code.values.shape == (0, 20)
    assert wider.shape == (0,)
    code, wider = linear_code(torch.zeros(3, 16), weight, 5, 20, gaba)
    assert wider.tolist() == [False] * 3
    assert code.values.abs().sum() == 0


def test_the_shadow_refuses_negative_numbers() -> None:
    weight = torch.rand(3000, 8)
    shadow = Shadow(weight)
    with pytest.raises(ValueError, match="negative"):
        linear_code(-torch.rand(2, 8), weight, 5, 20, shadow=shadow)
    with pytest.raises(ValueError, match="negative"):
        Shadow(-weight)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("graded", [False, True])
# Codes by way of all activations, of k slots, and by way of candidates.
@pytest.mark.parametrize(("neurons", "width"), [(63, 20), (63, 5), (3001, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_equal_the_loop_over_networks(
    impl: str, graded: bool, neurons: int, width: int, dtype: torch.dtype
) -> None:
    layers = [layer(neurons, 32, dtype) for _ in range(3)]
    x, weight, gaba = (torch.cat(parts) for parts in zip(*layers, strict=True))
    gaba[neurons : 2 * neurons] = 0.3  # the second network alone has too many active neurons
    response = gaba if graded else None
    code, wider = linear_code(x, weight, 5, width, response, impl=impl, networks=3)
    assert wider.shape == (27,)
    assert wider.view(3, 9).any(1).tolist() == [False, graded, False] or width == 5
    for number in range(3):
        rows = slice(number * 9, (number + 1) * 9)
        own = slice(number * neurons, (number + 1) * neurons)
        alone, also = linear_code(
            x[rows], weight[own], 5, width, gaba[own] if graded else None, impl=impl
        )
        assert torch.equal(wider[rows], also)
        assert torch.equal(code.values[rows], alone.values)
        assert torch.equal(code.indices[rows], alone.indices + number * neurons)


def test_networks_of_an_empty_batch() -> None:
    _, weight, gaba = layer(300, 16, torch.float32)
    for width, response in ((20, gaba), (5, None)):
        code, wider = linear_code(torch.zeros(0, 16), weight, 5, width, response, networks=3)
        assert code.indices.shape == (0, width)
        assert wider.shape == (0,)


def test_bad_networks() -> None:
    x, weight = torch.rand(6, 8), torch.rand(60, 8)
    with pytest.raises(ValueError, match=r"width=21 must lie in 5\.\.20"):
        linear_code(x, weight, 5, 21, networks=3)
    with pytest.raises(ValueError, match="a shadow serves one network"):
        linear_code(x, weight, 5, 20, shadow=Shadow(weight), networks=3)
