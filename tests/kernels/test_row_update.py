"""row_update against the specification in fp64, over every implementation."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from ssd_kernels import _tuning, row_update
from tests.kernels.conftest import INTERPRETED, NUMBA, triton_only

FAST = ["torch", *NUMBA, triton_only("triton")]
IMPLS = ["reference", *FAST]
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.5},
    {"max_norm": 1e6, "nonnegative": True},
    {"normalize": [True, False]},
    {"max_norm": 1.0, "nonnegative": True, "normalize": [True, True], "momentum": 0.9},
]


class Step:
    """One update's inputs; `run` works on copies and returns the norm and all it wrote."""

    def __init__(
        self, batch: int, slots: int, neurons: int, widths: list[int], device: str = "cpu"
    ) -> None:
        self.weights = [torch.rand(neurons, w, device=device) for w in widths]
        self.buffers = [torch.randn(neurons, w, device=device) for w in widths]
        self.inputs = [torch.randn(batch, w, device=device) for w in widths]
        self.indices = torch.randint(neurons, (batch, slots), device=device)
        # Some slots are idle, each for its own matrices.
        self.coefficients = [torch.randn(batch, slots, device=device).relu() for _ in widths]

    def run(self, impl: str, dtype: torch.dtype, **options: Any) -> list[Tensor]:
        weights = [w.to(dtype, copy=True) for w in self.weights]
        buffers = [b.to(dtype, copy=True) for b in self.buffers] if "momentum" in options else None
        coefficients = [c.to(dtype) for c in self.coefficients]
        inputs = [i.to(dtype) for i in self.inputs]
        norm = row_update(
            weights,
            coefficients,
            inputs,
            self.indices,
            buffers=buffers,
            impl=impl,
            **{"lr": 0.1, **options},
        )
        return [norm, *weights, *(buffers or [])]

    def round_to(self, dtype: torch.dtype) -> Step:
        for tensors in (self.weights, self.buffers, self.inputs, self.coefficients):
            tensors[:] = [t.to(dtype).to(t.dtype) for t in tensors]
        return self


def check_tolerance(step: Step, impl: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    step.round_to(dtype)
    exact = step.run("reference", torch.float64, **options)
    native = step.run("reference", dtype, **options)
    for ours, plain, truth in zip(step.run(impl, dtype, **options), native, exact, strict=True):
        assert ours.dtype == dtype
        epsilon = torch.finfo(dtype).eps * truth.abs().max().clamp(min=1)
        assert (ours - truth).abs().max() <= (plain - truth).abs().max() + epsilon


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_close_to_fp64(impl: str, dtype: torch.dtype, options: dict[str, Any], device: str) -> None:
    check_tolerance(Step(6, 4, 15, [20, 3], device), impl, dtype, options)


@pytest.mark.parametrize("impl", IMPLS)
def test_networks_are_steps_of_their_own(impl: str, device: str) -> None:
    """Three networks in one call, each with its rate and clip, equal three calls."""
    step, rates, bounds = Step(9, 4, 5, [20, 3], device), [0.1, 0.2, 0.05], [0.5, 1e6, 0.01]
    network = torch.arange(3, device=device).repeat_interleave(3)  # of each sample
    weights = [torch.rand(15, w, device=device) for w in (20, 3)]
    expected = [w.double() for w in weights]
    options = {"nonnegative": True, "normalize": [True, False]}
    norms = []
    for number in range(3):
        own = network == number
        norms.append(
            row_update(
                [w[5 * number : 5 * number + 5] for w in expected],
                [c[own].double() for c in step.coefficients],
                [i[own].double() for i in step.inputs],
                step.indices[own],
                lr=rates[number],
                max_norm=bounds[number],
                impl="reference",
                **options,
            )
        )
    norm = row_update(
        weights,
        step.coefficients,
        step.inputs,
        step.indices + 5 * network.unsqueeze(1),
        lr=torch.tensor(rates, device=device),
        max_norm=torch.tensor(bounds, device=device),
        networks=3,
        impl=impl,
        **options,
    )
    torch.testing.assert_close(norm.double(), torch.stack(norms), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("networks", "rows"), [(0, 15), (4, 15), (5, 2)])
def test_networks_must_divide_the_rows(networks: int, rows: int) -> None:
    step = Step(2, 2, 15, [4])
    with pytest.raises(ValueError, match=f"must divide the {rows} rows"):
        step.run("torch", torch.float32, networks=networks)


def test_samples_follow_one_another_as_their_networks_do() -> None:
    step = Step(2, 2, 6, [4])
    step.indices = torch.tensor([[0, 2], [3, 1]])
    with pytest.raises(ValueError, match=r"indices of network 1 hold 1; they must lie in 3\.\.5"):
        step.run("torch", torch.float32, networks=2)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("widths", [[1], [2100], [300, 5, 70]])
def test_widths(impl: str, widths: list[int], device: str) -> None:
    normalize = [True] * len(widths)
    options = {"max_norm": 1.0, "nonnegative": True, "normalize": normalize, "momentum": 0.5}
    check_tolerance(Step(3, 4, 9, widths, device), impl, torch.float32, options)


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("batch", "slots", "neurons", "widths"),
    [(128, 10, 10_000, [256, 10]), (1024, 64, 65_536, [1024, 300]), (600, 33, 1001, [4097, 1])],
)
def test_close_to_fp64_on_cuda(
    options: dict[str, Any], batch: int, slots: int, neurons: int, widths: list[int]
) -> None:
    check_tolerance(Step(batch, slots, neurons, widths, "cuda"), "triton", torch.float32, options)


@pytest.mark.parametrize("impl", IMPLS)
def test_hand_computed(impl: str, device: str) -> None:
    weight = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.5, 0.5], [7.0, 7.0]], device=device)
    norm = row_update(
        [weight],
        [torch.tensor([[1.0, 2.0], [1.0, 0.0]], device=device)],
        [torch.tensor([[3.0, 0.0], [0.0, 4.0]], device=device)],
        torch.tensor([[0, 1], [1, 3]], device=device),
        lr=0.5,
        nonnegative=True,
        impl=impl,
    )
    # Row 0 moves by (3, 0), row 1 by (6, 4); row 3 has only an idle slot.
    assert weight.tolist() == [[1.5, 4.0], [0.0, 0.0], [0.5, 0.5], [7.0, 7.0]]
    assert norm.shape == ()
    assert norm.item() == pytest.approx((9 + 36 + 16) ** 0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_untouched_rows_keep_their_bits(impl: str, device: str) -> None:
    step = Step(4, 3, 40, [10, 6], device)
    touched = torch.zeros(40, dtype=torch.bool, device=device)
    for coefficient in step.coefficients:
        touched[step.indices[coefficient != 0]] = True
    assert not touched.all()
    options = {"max_norm": 0.1, "nonnegative": True, "normalize": [True, True], "momentum": 0.9}
    # Negative entries and rows off the unit sphere: projecting them would show.
    step.weights = [w - 0.5 for w in step.weights]
    _, *written = step.run(impl, torch.float32, **options)
    for after, before in zip(written, step.weights + step.buffers, strict=True):
        assert torch.equal(after[~touched], before[~touched])
        assert (after[touched] != before[touched]).any(-1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_touched_through_one_matrix_moves_in_all(impl: str, device: str) -> None:
    weights = [torch.full((2, 3), 2.0, device=device) for _ in range(2)]
    row_update(
        weights,
        [torch.tensor([[1.0]], device=device), torch.tensor([[0.0]], device=device)],
        [torch.zeros(1, 3, device=device), torch.ones(1, 3, device=device)],
        torch.tensor([[1]], device=device),
        lr=1.0,
        normalize=[False, True],
        impl=impl,
    )
    torch.testing.assert_close(weights[1][1].norm().item(), 1.0)
    assert weights[1][0].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_all_zero_row_stays_zero(impl: str, device: str) -> None:
    weight = torch.ones(1, 3, device=device)
    row_update(
        [weight],
        [torch.ones(1, 1, device=device)],
        [torch.full((1, 3), 5.0, device=device)],
        torch.zeros(1, 1, dtype=torch.int64, device=device),
        lr=1.0,
        nonnegative=True,
        normalize=[True],
        impl=impl,
    )
    assert weight.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_active_changes_nothing(impl: str, batch: int, device: str) -> None:
    step = Step(batch, 3, 5, [4, 2], device)
    step.coefficients = [torch.zeros_like(c) for c in step.coefficients]
    norm, *written = step.run(impl, torch.float32, max_norm=1.0, normalize=[True, True])
    assert norm.item() == 0.0
    for after, before in zip(written, step.weights, strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_not_hidden(impl: str, device: str) -> None:
    step = Step(2, 2, 4, [3, 2], device)
    step.inputs[0][0, 0] = float("nan")
    step.coefficients[0][:] = 1.0
    norm, first, _ = step.run(impl, torch.float32, max_norm=1.0, nonnegative=True)
    assert norm.isnan()
    assert first[step.indices[0]].isnan().any()


# Powers of two near 1e30 and 1e300: to scale by them is exact.
SCALES = [(torch.float32, 100), (torch.float32, -100), (torch.float64, 1000), (torch.float64, -990)]


def scaled(tensors: list[Tensor], exponent: int, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) * 2.0**exponent for t in tensors]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=str)
@pytest.mark.parametrize("networks", [1, 3])
def test_clip_is_free_of_scale(
    impl: str, dtype: torch.dtype, exponent: int, networks: int, device: str
) -> None:
    """Gradients, weights and clip in other units give the same step in these units."""
    step = Step(6, 4, 15, [20, 3], device)
    if networks > 1:
        network = torch.arange(networks, device=device).repeat_interleave(6 // networks)
        step.indices = step.indices % (15 // networks) + 15 // networks * network.unsqueeze(1)
    for coefficients, inputs in ((0, exponent), (exponent, 0)):
        got, expected = [], []
        for unit, results in ((exponent, got), (0, expected)):
            weights = scaled(step.weights, unit, dtype)
            norm = row_update(
                weights,
                scaled(step.coefficients, coefficients and unit, dtype),
                scaled(step.inputs, inputs and unit, dtype),
                step.indices,
                lr=0.1,
                max_norm=0.5 * 2.0**unit,
                networks=networks,
                impl=impl,
            )
            results += scaled([norm, *weights], -unit, dtype)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "exponent"), SCALES, ids=str)
@pytest.mark.parametrize("width", [20, 2100])
def test_rows_of_any_scale_become_unit_rows(
    impl: str, dtype: torch.dtype, exponent: int, width: int, device: str
) -> None:
    step = Step(6, 4, 15, [width], device)
    rows = torch.tensor([0, exponent, 0], device=device).repeat(5)  # beside ordinary ones
    results = []
    for unit in (2.0 ** rows.double().unsqueeze(1), torch.ones(15, 1, device=device)):
        weight = (step.weights[0].double() * unit).to(dtype)
        row_update(
            [weight],
            [step.coefficients[0].to(dtype)],
            [0 * step.inputs[0].to(dtype)],
            step.indices,
            lr=0.1,
            nonnegative=True,
            normalize=[True],
            impl=impl,
        )
        results.append(weight)
    touched = step.indices[step.coefficients[0] > 0].unique()
    torch.testing.assert_close(results[0][touched], results[1][touched])
    lengths = results[0][touched].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("max_norm", [float("inf"), 3e38])
def test_a_bound_that_no_norm_reaches(impl: str, max_norm: float, device: str) -> None:
    step = Step(4, 3, 9, [6, 5], device)
    expected = step.run(impl, torch.float32)
    for bound in (max_norm, torch.tensor([max_norm], device=device)):
        for got, want in zip(step.run(impl, torch.float32, max_norm=bound), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", FAST)
def test_clip_equals_torch(impl: str, device: str) -> None:
    """At max_norm = 1 the factor is that of torch.nn.utils.clip_grad_norm_."""
    parameter = torch.nn.Parameter(torch.zeros(1, 3, device=device))
    parameter.grad = torch.tensor([[3.0, 4.0, 12.0]], device=device)
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    weight, one = torch.zeros(1, 3, device=device), torch.ones(1, 1, device=device)
    gradient = torch.tensor([[3.0, 4.0, 12.0]], device=device)
    row_update([weight], [one], [gradient], one.long() - 1, lr=1.0, max_norm=1.0, impl=impl)
    assert torch.equal(weight, -parameter.grad)


@pytest.mark.parametrize("impl", FAST)
def test_strided_weights(impl: str, device: str) -> None:
    step = Step(4, 3, 9, [6, 5], device)
    expected = step.run(impl, torch.float32, max_norm=0.5)
    padded = torch.zeros(9, 20, device=device)
    weights = [padded[:, 3:9], step.weights[1].t().contiguous().t()]
    for view, weight in zip(weights, step.weights, strict=True):
        view.copy_(weight)
    norm = row_update(
        weights, step.coefficients, step.inputs, step.indices, lr=0.1, max_norm=0.5, impl=impl
    )
    for got, want in zip([norm, *weights], expected, strict=True):
        torch.testing.assert_close(got, want)
    assert not padded[:, :3].any()
    assert not padded[:, 9:].any()


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_no_memory_is_read_before_it_is_written(
    impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(5, 3, 4, [300, 6], device)
    expected = step.run(impl, torch.float32, max_norm=0.5)

    def poisoned(*shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        fill = float("nan") if dtype.is_floating_point else 1
        return torch.full(shape, fill, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", poisoned)
    for got, want in zip(step.run(impl, torch.float32, max_norm=0.5), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_rows_longer_than_a_tile(impl: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (({}, {"BLOCK": 16, "num_warps": 1}),)
    monkeypatch.setitem(_tuning.TABLE, "row_update", {"default": rows})
    options = OPTIONS[-1]
    check_tolerance(Step(4, 3, 7, [50, 16], device), impl, torch.float32, options)


@hypothesis.given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.3]),
    st.integers(0, 999),
)
def test_torch_equals_the_specification(
    batch: int,
    slots: int,
    neurons: int,
    nonnegative: bool,
    normalize: bool,
    max_norm: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    step = Step(batch, slots, neurons, [3, 2])
    options = {"nonnegative": nonnegative, "normalize": [normalize] * 2, "max_norm": max_norm}
    expected = step.run("reference", torch.float64, **options)
    for got, want in zip(step.run("torch", torch.float64, **options), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.cuda
def test_cuda_graph_capture() -> None:
    step = Step(128, 10, 10_000, [256, 10], "cuda")
    expected = step.run("triton", torch.float32, max_norm=1.0, normalize=[True, False])
    weights = [w.clone() for w in step.weights]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = row_update(
            weights,
            step.coefficients,
            step.inputs,
            step.indices,
            lr=0.1,
            max_norm=1.0,
            normalize=[True, False],
            impl="triton",
        )
    graph.replay()
    for got, want in zip([norm, *weights], expected, strict=True):
        assert torch.equal(got, want)
