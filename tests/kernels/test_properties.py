"""The drawn cases of tests/kernels/properties.py, and that it sees what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_kernels import _dispatch, reference
from ssd_kernels._graded_code import ActiveNeurons
from ssd_kernels.topk import MAX_K
from tests.kernels import properties
from tests.kernels.conftest import INTERPRETED, triton_only
from tests.kernels.property_bounds import Bounds, Ranking
from tests.kernels.property_cases import Case

SEED = 0
KERNELS = triton_only("kernels").marks  # type: ignore[attr-defined]
SERVED_BY = ["plain", pytest.param("kernels", id="triton", marks=KERNELS)]


def drawn(impl: str, numbers: range) -> None:
    """Fails with every wrong case and how to run it alone."""
    wrong = {number: properties.run(number, SEED, impl) for number in numbers}
    lines = [
        "\n  ".join([f"case {number}: {properties.described(number, SEED)}", *problems])
        for number, problems in wrong.items()
        if problems
    ]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("impl", SERVED_BY)
def test_500_cases(impl: str, part: int) -> None:
    count = 4 if INTERPRETED else 25  # there one takes a tenth of a second or more
    drawn(impl, range(part * count, (part + 1) * count))


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(40))
@pytest.mark.parametrize("impl", SERVED_BY)
def test_10_000_cases(impl: str, part: int) -> None:
    drawn(impl, range(part * 250, (part + 1) * 250))


Serve = Callable[..., Any]
Mutation = Callable[[Serve], Serve]


def last_of_equals(serve: Serve) -> Serve:
    """Ties to the higher index."""

    def flipped(scores: Tensor, k: int, **options: Tensor | None) -> reference.TopKOutput:
        options = {n: None if t is None else t.flip(0) for n, t in options.items()}
        values, indices, *_ = serve(scores.flip(-1), k, **options)
        return reference.TopKOutput(values, scores.shape[-1] - 1 - indices)

    return flipped


def without_the_last_column(serve: Serve) -> Serve:
    def short(scores: Tensor, k: int, **options: Tensor | None) -> Any:
        if scores.shape[-1] == k:
            return serve(scores, k, **options)
        options = {n: None if t is None else t[:-1] for n, t in options.items()}
        return serve(scores[..., :-1], k, **options)

    return short


def with_output(change: Callable[[Any], Any]) -> Mutation:
    """Changes what is returned."""
    return lambda serve: lambda *args, **options: change(serve(*args, **options))


def with_options(**changed: Any) -> Mutation:
    """Ignores what the caller asked for."""
    return lambda serve: lambda *args, **options: serve(*args, **options | changed)


def with_settings(**changed: Any) -> Mutation:
    """Ignores what the caller asked for in the tuple of settings, the last argument."""
    return with_arguments(lambda *args: (*args[:-1], args[-1]._replace(**changed)))


def with_arguments(change: Callable[..., tuple[Any, ...]]) -> Mutation:
    """Changes the positional arguments."""
    return lambda serve: lambda *args, **options: serve(*change(*args), **options)


def one_more(serve: Serve) -> Serve:
    """counts are too high for the first neuron."""

    def count(values: Tensor, indices: Tensor, counts: Tensor, *rest: Any) -> None:
        serve(values, indices, counts, *rest)
        counts[:1] += 1

    return count


def modifying(serve: Serve) -> Serve:
    def careless(scores: Tensor, k: int, **options: Any) -> Any:
        out = serve(scores, k, **options)
        scores.detach()[..., :1] = 7
        return out

    return careless


def unsteady(serve: Serve) -> Serve:
    """The last bit depends on the call."""
    calls = []

    def noisy(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        out: Tensor = serve(*args, **options)
        return out * (1 + len(calls) % 2 * torch.finfo(out.dtype).eps)

    return noisy


def nameless(serve: Serve) -> Serve:
    def late(*args: Any, **options: Any) -> Any:
        serve(*args, **options)
        raise ValueError("something does not fit")

    return late


def dropping_bias(x: Tensor, weight: Tensor, k: int, bias: Tensor | None) -> tuple[Any, ...]:
    return x, weight, k, None if bias is None else bias.detach()


def a_neuron_less(out: ActiveNeurons) -> ActiveNeurons:
    if out.neurons is None:
        return out
    return ActiveNeurons(out.values[:, 1:], out.neurons[1:], out.gate[:, 1:])


def always_open(out: ActiveNeurons) -> ActiveNeurons:
    return out._replace(gate=torch.ones_like(out.gate))


MUTATIONS: dict[str, tuple[str, Mutation, str]] = {
    "ties": ("topk", last_of_equals, "indices: "),
    "last column": ("topk", without_the_last_column, "indices: "),
    "modified input": ("topk", modifying, "scores has been modified"),
    "unnamed error": ("topk", nameless, "ValueError: something"),
    "sign of the gradient": (
        "linear_topk",
        with_output(lambda out: out._replace(values=2 * out.values.detach() - out.values)),
        "gradient of weight: ",
    ),
    "no gradient of the bias": ("linear_topk", with_arguments(dropping_bias), "gradient of bias: "),
    "threshold left out": ("linear_topk", with_options(threshold=False), "outputs values, indices"),
    "blocks unlike": ("linear_topk", with_options(inhibition="mask"), "values: "),
    "dtype": (
        "linear_topk",
        with_output(lambda out: out._replace(values=out.values.double())),
        "values is torch.float64",
    ),
    "the k-th inhibits": (
        "linear_inhibit",
        with_arguments(lambda x, weight, k, *rest: (x, weight, max(k - 1, 1), *rest)),
        "h: ",
    ),
    "a neuron less": ("linear_active", with_output(a_neuron_less), "h: "),
    "a gate that is open": ("linear_active", with_output(always_open), "the gradient passes"),
    "never wider": (
        "linear_code",
        with_output(lambda out: (out[0], torch.zeros_like(out[1]))),
        "wider is ",
    ),
    "a slot less": (
        "sparse_linear",
        with_arguments(lambda values, indices, *rest: (values[..., :-1], indices[..., :-1], *rest)),
        "out: ",
    ),
    "unsteady": ("sparse_linear", unsteady, "out: other bits"),
    "the next sample": (
        "row_gradient",
        with_arguments(lambda c, inputs, *rest: (c, inputs.roll(1, 0), *rest)),
        "out: ",
    ),
    "no clip": ("row_update", with_settings(max_norm=None), "weights[0]: "),
    "no momentum": ("row_update", with_settings(momentum=0.0), "buffers[0]: "),
    "one too many": ("count_active", one_more, "counts: "),
    "the next label": (
        "code_gram",
        with_arguments(lambda *args: (*args[:4], None if args[4] is None else args[4].roll(1, 0))),
        "cross: ",
    ),
    "all columns": ("distill", with_settings(columns=None), "grad_logits: "),
    "the other divergence": ("distill", with_settings(kl="reverse"), "loss: "),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_implementation_is_seen(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, mutate, sign = MUTATIONS[mutation]

    def seen(impl: str) -> int:
        """Cases of the op, among the first of all, with this kind of problem."""
        numbers = [n for n in range(1000) if properties.op_of(n).name == op]
        return sum(
            any(problem.startswith(f"{impl} on cpu: {sign}") for problem in problems)
            for problems in (properties.run(n, SEED, impl) for n in numbers)
        )

    table = _dispatch.TABLES[op]
    monkeypatch.setitem(table, "torch", mutate(table["reference"]))
    assert seen("torch") > 1
    assert seen("reference") == 0


def test_a_case_is_the_same_every_time() -> None:
    for number in range(30):
        first, second = properties.draw(3, number), properties.draw(3, number)
        assert first.fault == second.fault
        for one, other in ((first.arguments, second.arguments), (first.upstream, second.upstream)):
            found, again = properties.tensors(one), properties.tensors(other)
            assert found.keys() == again.keys()
            for name, tensor in found.items():
                assert tensor.stride() == again[name].stride()
                torch.testing.assert_close(tensor, again[name], rtol=0, atol=0, equal_nan=True)


def first(case: Case) -> Tensor:
    """The tensor whose rows are the samples."""
    names = ("scores", "x", "values", "logits", "coefficients")
    found = next(case[name] for name in names if case[name] is not None)
    return found[0] if isinstance(found, list) else found


def of_some(holds: Callable[[Tensor], Any]) -> Callable[[Case], bool]:
    """Whether it holds of a floating argument."""
    return lambda case: any(
        bool(holds(t.double()))
        for t in properties.tensors(case.arguments).values()
        if t.is_floating_point()
    )


def laid_out(holds: Callable[[Tensor], bool]) -> Callable[[Case], bool]:
    return lambda case: any(holds(t) for t in properties.tensors(case.arguments).values())


KINDS: dict[str, Callable[[Case], bool]] = {
    "stride 0": laid_out(lambda t: 0 in t.stride() and t.numel() > 1),
    "transposed": laid_out(lambda t: t.dim() > 1 and t.stride(0) < t.stride(-1)),
    "every second": laid_out(lambda t: t.dim() > 0 and t.stride(-1) == 2),
    "an offset": laid_out(lambda t: t.storage_offset() > 0 and t.is_contiguous()),
    "NaN": of_some(lambda t: t.isnan().any()),
    "inf": of_some(lambda t: t.isinf().any()),
    "huge": of_some(lambda t: (t.isfinite() & (t.abs() > 1e25)).any()),
    "tiny": of_some(lambda t: ((t != 0) & (t.abs() < 1e-25)).any()),
    "negative zero": of_some(lambda t: (t.signbit() & (t == 0)).any()),
    "no sample": lambda case: 0 in first(case).shape[:-1],
    "a vector": lambda case: first(case).dim() == 1,
    "three dimensions": lambda case: first(case).dim() > 2,
    "d = 0": lambda case: case["x"] is not None and case["x"].shape[-1] == 0,
    "d = 1": lambda case: case["x"] is not None and case["x"].shape[-1] == 1,
    "R = 1": lambda case: case["weight"] is not None and case["weight"].shape[0] == 1,
    "R > 4,096": lambda case: case["weight"] is not None and case["weight"].shape[0] > 4096,
    "C = 0": lambda case: "out" in case.upstream and case.upstream["out"].shape[-1] == 0,
    "k = R": lambda case: case["scores"] is not None and case["k"] == case["scores"].shape[-1],
    "k >= MAX_K": lambda case: isinstance(case["k"], int) and case["k"] >= MAX_K,
    "networks": lambda case: (case["networks"] or 1) > 1,
    "gradients": lambda case: case.grad and bool(case.wants),
    "no gradients": lambda case: not case.grad and bool(case.wants),
    "infinite gradients": lambda case: any(bool(t.isinf().any()) for t in case.upstream.values()),
    **{
        str(dtype): lambda case, dtype=dtype: case.dtype == dtype  # type: ignore[misc]
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
}


def test_every_kind_is_drawn() -> None:
    drawn = [properties.draw(SEED, number) for number in range(1000)]
    cases = [case for case in drawn if case.fault is None]
    assert 50 < len(drawn) - len(cases) < 250
    seen = {kind: sum(holds(case) for case in cases) for kind, holds in KINDS.items()}
    assert {kind: count for kind, count in seen.items() if count < 3} == {}


def test_selection_within_the_rounding_of_the_scores() -> None:
    exact = torch.tensor([[3.0, 1.0, 3.0, 2.0]]).double()
    certain = Ranking(Bounds.around(exact, torch.zeros_like(exact)))
    for indices, right in (([0, 2, 3], True), ([2, 0, 3], False), ([0, 3, 1], False)):
        assert (certain.wrong(torch.tensor([indices])) is None) == right
    rounded = Ranking(Bounds.around(exact, torch.full_like(exact, 0.4)))
    for indices, right in (([2, 0, 3], True), ([0, 3, 2], False), ([0, 2, 2], False)):
        assert (rounded.wrong(torch.tensor([indices])) is None) == right
    free = Ranking(Bounds.around(exact, torch.full_like(exact, torch.inf)))
    assert free.wrong(torch.tensor([[1, 3, 0]])) is None
    assert free.wrong(torch.tensor([[1, 3, 4]])) is not None


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert properties.main(["--cases", "2", "--only", "count_active", "--impl", "torch"]) == 0
    assert capsys.readouterr().out.endswith("2 cases, 0 wrong\n")
    table = _dispatch.TABLES["count_active"]
    monkeypatch.setitem(table, "torch", one_more(table["reference"]))
    assert properties.main(["--cases", "2", "--only", "count_active", "--impl", "torch"]) == 1
    out = capsys.readouterr().out
    assert out.endswith("2 cases, 2 wrong\n")
    assert "properties.py --seed 0 --case 8\n" in out
    assert properties.main(["--case", "8", "--impl", "torch"]) == 1
    assert "counts, strides (1,)" in capsys.readouterr().out
