"""What PyTorch's users expect of any operator: devices, tracing, transforms, in-place writes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import ssd_kernels as sk
from ssd.ops.code_gram import code_gram
from ssd_kernels import _dispatch
from ssd_kernels._graded_code import linear_active, linear_code
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.nn import KSparseMLP, SparseLinear, TopK, TopKLinear
from tests.kernels.cases import TINY, Draw, Results, Run, gradients
from tests.kernels.conftest import INTERPRETED, triton_only
from tests.kernels.ops import cases

BATCH, SLOTS, NEURONS, INPUTS, OUTPUTS = 6, 3, 17, 8, 5
IMPLS = ["reference", "torch", triton_only("triton")]
WITH_DEFAULT = [*IMPLS, None]  # None: numba, where it is and has the op
META = torch.device("meta")

Op = Callable[..., Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


ORDER = torch.rand(300, NEURONS, generator=torch.Generator().manual_seed(3)).argsort(1)


def indices(batch: int = BATCH) -> Tensor:
    return ORDER[:batch, :SLOTS]


def layer(**options: Any) -> Op:
    name = options.pop("output", "values")

    def run(x: Tensor, weight: Tensor, bias: Tensor, impl: str | None = None) -> Tensor:
        code = sk.linear_topk(x, weight, SLOTS, bias, impl=impl, **options)
        output: Tensor = getattr(code, name)
        return output

    return run


def inhibited(**options: Any) -> Op:
    def run(x: Tensor, weight: Tensor, bias: Tensor, impl: str | None = None) -> Tensor:
        return sk.linear_inhibit(x, weight, SLOTS, bias=bias, impl=impl, **options)

    return run


def masked(scores: Tensor, impl: str | None = None) -> Tensor:
    mask = torch.arange(NEURONS, device=scores.device) % 3 != 0
    return sk.topk(scores, SLOTS, mask=mask, impl=impl).values


SCORES = [(BATCH, NEURONS)]
LAYER = [(BATCH, INPUTS), (NEURONS, INPUTS), (NEURONS,)]
DECODER = [(BATCH, SLOTS), (NEURONS, OUTPUTS), (OUTPUTS,)]
# Differentiable functions of floating tensors, with the shapes of these.
DIFFERENTIABLE: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "topk": (lambda s, impl=None: sk.topk(s, SLOTS, impl=impl).values, SCORES),
    "topk mask": (masked, SCORES),
    "linear_topk": (layer(), LAYER),
    "linear_topk subtract": (layer(inhibition="subtract"), LAYER),
    "linear_topk threshold": (layer(threshold=True, output="threshold"), LAYER),
    "linear_topk scores": (layer(preactivations=True, output="preactivations"), LAYER),
    "linear_inhibit": (inhibited(), LAYER),
    "linear_inhibit mask": (inhibited(inhibition="mask"), LAYER),
    "sparse_linear": (
        lambda v, w, b, impl=None: sk.sparse_linear(v, indices().to(v.device), w, b, impl=impl),
        DECODER,
    ),
}
# Differentiable too, but with one implementation for that.
BY_REFERENCE: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "row_gradient": (
        lambda c, x: row_gradient(c, x, indices().to(c.device), NEURONS),
        [(BATCH, SLOTS), (BATCH, INPUTS)],
    )
}
ALL = DIFFERENTIABLE | BY_REFERENCE


def drawn(name: str) -> list[Tensor]:
    return [normal(*shape) for shape in ALL[name][1]]


@pytest.mark.parametrize("name", ALL)
def test_torch_func(name: str) -> None:
    op, arguments = ALL[name][0], drawn(name)
    positions = tuple(range(len(arguments)))

    def loss(*given: Tensor) -> Tensor:
        return op(*given).square().sum()

    leaves = [a.clone().requires_grad_() for a in arguments]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, want in zip(torch.func.grad(loss, positions)(*arguments), expected, strict=True):
        torch.testing.assert_close(got, want)
    jacobians = torch.autograd.functional.jacobian(op, tuple(arguments))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for got, want in zip(transform(op, positions)(*arguments), jacobians, strict=True):
            torch.testing.assert_close(got, want)
    stacks = [torch.stack([a, a.flip(0)]) for a in arguments]
    batched = torch.func.vmap(op)(*stacks)
    for number in range(2):
        torch.testing.assert_close(batched[number], op(*(stack[number] for stack in stacks)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batches_of_gradients_and_forward_mode(name: str) -> None:
    op, arguments = ALL[name][0], [a.requires_grad_() for a in drawn(name)]
    out = op(*arguments)
    upstream = torch.randn(2, *out.shape, dtype=out.dtype)
    kept: dict[str, Any] = {"retain_graph": True, "materialize_grads": True}
    batched = torch.autograd.grad(out, arguments, upstream, is_grads_batched=True, **kept)
    for number in range(2):
        single = torch.autograd.grad(out, arguments, upstream[number], **kept)
        for got, want in zip(batched, single, strict=True):
            torch.testing.assert_close(got[number], want)
    tangents = [torch.randn_like(a) for a in arguments]
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, arguments, tangents)
        tangent = forward_ad.unpack_dual(op(*duals)).tangent
    expected = torch.func.jvp(op, tuple(arguments), tuple(tangents))[1]
    torch.testing.assert_close(tangent, expected)


@pytest.mark.filterwarnings("ignore")  # tracing is deprecated
def test_a_trace_serves_any_batch() -> None:
    for model in (TopK(SLOTS), KSparseMLP(INPUTS, NEURONS, OUTPUTS, SLOTS)):
        traced = torch.jit.trace(model, (torch.randn(8, INPUTS),))
        for batch in (1, 5):
            x = torch.randn(batch, INPUTS)
            torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("bad", [-1, NEURONS])
def test_no_transform_or_trace_lets_a_wrong_index_through(bad: int) -> None:
    values, wrong, weight = normal(3, 1), torch.full((3, 1), bad), normal(NEURONS, OUTPUTS)

    def decode(values: Tensor, wrong: Tensor, weight: Tensor) -> Tensor:
        return sk.sparse_linear(values, wrong, weight)

    named: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda w: decode(values, wrong, w).sum())(weight),
        lambda: torch.func.vmap(lambda v, i: decode(v, i, weight))(values, wrong),
        lambda: torch.func.vmap(torch.func.grad(lambda v, i: decode(v, i, weight).sum()))(
            values, wrong
        ),
        lambda: torch.func.jvp(lambda v: decode(v, wrong, weight), (values,), (values,)),
    ]
    for run in named:
        with pytest.raises(ValueError, match=f"sparse_linear: indices run from {bad} to {bad}"):
            run()
    example = (values, wrong * 0, weight)
    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Decode(), example).module()
    for run in (compiled, exported):
        torch.testing.assert_close(run(*example), decode(*example))
        with pytest.raises(IndexError, match="out of range"):
            run(values, wrong, weight)


class Decode(nn.Module):
    """sparse_linear as a module."""

    def forward(self, values: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        return sk.sparse_linear(values, chosen, weight)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_gradients_of_each_sample(randomness: str) -> None:
    model = KSparseMLP(INPUTS, NEURONS, OUTPUTS, SLOTS, dtype=torch.float64)
    parameters, x = dict(model.named_parameters()), normal(BATCH, INPUTS)

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (sample,)).square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness=randomness)
    gradients = by_sample(parameters, x)
    for number in range(BATCH):
        model.zero_grad()
        loss(parameters, x[number]).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name][number], parameter.grad)


def test_an_update_in_place_inside_torch_func_is_refused_by_name() -> None:
    x, weight, counts = normal(BATCH, INPUTS), normal(NEURONS, INPUTS), torch.zeros(NEURONS).long()
    values = torch.rand(BATCH, SLOTS, dtype=torch.float64)

    def counting(op: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def run(given: Tensor) -> Tensor:
            op(given)
            return given.sum()

        return run

    refused: dict[str, Callable[[Tensor], Any]] = {
        "linear_topk": lambda v: sk.linear_topk(x, weight, SLOTS, counts=counts),
        "linear_inhibit": lambda v: sk.linear_inhibit(x, weight, SLOTS, counts=counts),
        "count_active": lambda v: sk.count_active(v, indices(), counts),
        "code_gram": lambda v: code_gram(v, indices(), torch.zeros(NEURONS, NEURONS)),
        "row_update": lambda v: sk.row_update([weight], [v], [x], indices(), lr=0.1),
    }
    for name, op in refused.items():
        with pytest.raises(RuntimeError, match=f"^{name}: cannot update .* torch.func"):
            torch.func.grad(counting(op))(values)


@pytest.mark.parametrize("name", ALL)
def test_second_derivatives(name: str) -> None:
    op, arguments = ALL[name][0], [a.requires_grad_() for a in drawn(name)]
    assert torch.autograd.gradgradcheck(op, tuple(arguments), atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_of_every_implementation(name: str, impl: str, device: str) -> None:
    def second(impl: str) -> list[Tensor]:
        op, arguments = DIFFERENTIABLE[name][0], [a.to(device, torch.float32) for a in start]
        leaves = [a.requires_grad_() for a in arguments]
        first = torch.autograd.grad(op(*leaves, impl=impl).sin().sum(), leaves, create_graph=True)
        penalty = sum((g.square().sum() for g in first), start=torch.zeros((), device=device))
        return list(torch.autograd.grad(penalty, leaves, materialize_grads=True))

    start = drawn(name)
    for got, want in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_a_large_decoder() -> None:
    """By F.embedding_bag, which has none."""
    weight = normal(NEURONS, 4096).requires_grad_()
    values = normal(40, SLOTS).requires_grad_()

    def penalty(impl: str) -> list[Tensor]:
        out = sk.sparse_linear(values, indices(40), weight, impl=impl)
        first = torch.autograd.grad(out.sin().sum(), (values, weight), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (values, weight)))  # type: ignore[arg-type]

    for got, want in zip(penalty("torch"), penalty("reference"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [(BATCH,), (2, 3), ()])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_users_may_write_into_outputs(
    name: str, batch: tuple[int, ...], dtype: torch.dtype, impl: str, device: str
) -> None:
    if impl == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("no bfloat16 in Triton's interpreter")
    op, shapes = DIFFERENTIABLE[name]
    wanted = [(*batch, *s[1:]) if n == 0 else s for n, s in enumerate(shapes)]
    if name == "sparse_linear":
        chosen = indices(6).to(device)
        chosen = chosen.reshape(*batch, SLOTS) if batch else chosen[0]

        def op(v: Tensor, w: Tensor, b: Tensor, impl: str | None = None) -> Tensor:
            return sk.sparse_linear(v, chosen, w, b, impl=impl)

    def ablated(write: Callable[[Tensor], Tensor]) -> list[Tensor]:
        arguments = [a.clone().requires_grad_() for a in start]
        output = op(*arguments, impl=impl)
        assert not output._is_view()
        output = write(output)
        grads = torch.autograd.grad(output.square().sum(), arguments, materialize_grads=True)
        return [output, *grads]

    def in_place(output: Tensor) -> Tensor:
        output[..., 0] = 0
        output += 1  # where the result was 0 the gradient stays 0
        return output

    def out_of_place(output: Tensor) -> Tensor:
        kept = torch.ones_like(output)
        kept[..., 0] = 0
        return output * kept + 1

    start = [normal(*s).to(device, dtype) for s in wanted]
    if name == "linear_topk threshold" and not batch:
        pytest.skip("0-d: no entry to write to")
    for got, want in zip(ablated(in_place), ablated(out_of_place), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ALL)
def test_shapes_without_data(name: str) -> None:
    op, arguments = ALL[name][0], drawn(name)
    want = op(*arguments)
    got = op(*(a.to(META) for a in arguments))
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, META)
    with FakeTensorMode() as mode:
        for device in ("cpu", "cuda"):
            fakes = [torch.empty(a.shape, dtype=a.dtype, device=device) for a in arguments]
            if "sparse" in name or "gradient" in name:
                continue  # they look at real indices; see below
            got = op(*fakes)
            assert (got.shape, got.device.type) == (want.shape, device)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert op(*map(mode.from_tensor, arguments)).shape == want.shape
        assert op(*arguments).shape == want.shape


CALLS = cases("calls")


def drawn_call(name: str, *given: Any, **sizes: int) -> Run:
    op, options = CALLS[name]
    return op.prepare(Draw(*given, **sizes), options)


@pytest.mark.parametrize("name", CALLS)
def test_results_without_data(name: str) -> None:
    """Of an op that asks for no values: the shapes and dtypes that it has with data."""
    want, got = (drawn_call(name, device, **TINY)(None) for device in ("cpu", META))
    for expected, have in zip(want, got, strict=True):
        if have is None or expected is None:
            assert have is expected
        else:
            assert (have.shape, have.dtype, have.device) == (expected.shape, expected.dtype, META)


def test_how_many_neurons_fire_depends_on_values() -> None:
    x, weight = torch.zeros(BATCH, INPUTS, device=META), torch.zeros(17, INPUTS, device=META)
    with pytest.raises(TypeError, match="linear_active: how many neurons fire depends on values"):
        linear_active(x, weight, 3)


@pytest.mark.parametrize("impl", ["torch", triton_only("triton"), None])
@pytest.mark.parametrize("name", CALLS)
def test_repeats_are_bit_equal(name: str, impl: str | None, device: str) -> None:
    """Of few neurons, each of many slots; and of as many as a CPU takes its shortcuts for."""
    if impl not in (None, *_dispatch.TABLES[name.split()[0]]):
        pytest.skip("the op has no such implementation")
    if INTERPRETED and name.endswith(("large", "unaligned", "parts")):
        pytest.skip("long in Triton's interpreter")
    op, given = CALLS[name]
    for neurons in (17,) if impl == "triton" else (17, 4100):
        draw = Draw(device, **TINY | {"B": 8, "R": neurons})
        run = op.prepare(draw, given)
        first, *others = (
            [*results, *gradients(results, draw.leaves)]
            for results in (run(impl) for _ in range(2 if INTERPRETED else 20))
        )
        for again in others:
            torch.testing.assert_close(again, first, rtol=0, atol=0)


@pytest.mark.parametrize("impl", WITH_DEFAULT)
@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_is_nobodys_business(name: str, impl: str | None, device: str) -> None:
    if device != "cpu" and impl == "triton":
        pytest.skip("tensors on the CPU; Triton serves CUDA here")
    if impl not in (None, *_dispatch.TABLES[name.split()[0]]):
        pytest.skip("the op has no such implementation")
    if impl == "triton" and name.endswith(("large", "unaligned", "parts")):
        pytest.skip("long in Triton's interpreter")
    neurons = 300 if impl == "triton" else 4100  # where a CPU takes its shortcuts

    def results() -> Results:
        torch.manual_seed(0)
        return drawn_call(name, R=neurons)(impl)

    want = results()
    with META:
        got = results()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


class Code(nn.Module):
    """topk, linear_topk and linear_inhibit of one input, as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TopKLinear(INPUTS, NEURONS, SLOTS)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        code = self.encoder(x)
        scores = x @ self.encoder.weight.T
        dense = sk.linear_inhibit(x, self.encoder.weight, SLOTS)
        return code.values, code.indices, sk.topk(scores, SLOTS).indices, dense


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(SLOTS),
        lambda: KSparseMLP(INPUTS, NEURONS, OUTPUTS, SLOTS),
        lambda: KSparseMLP(INPUTS, 20_000, OUTPUTS, SLOTS, inhibition="subtract"),
        Code,
    ],
    ids=["TopK", "KSparseMLP", "KSparseMLP wide", "ops"],
)
def test_export_with_a_dynamic_batch(make: Callable[[], nn.Module], strict: bool) -> None:
    model = make()
    sizes = ({0: torch.export.Dim("batch")},)
    example = (torch.randn(32, INPUTS),)
    exported = torch.export.export(model, example, dynamic_shapes=sizes, strict=strict).module()
    for batch in (2, 7, 300):
        x = torch.randn(batch, INPUTS)
        torch.testing.assert_close(exported(x), model(x))


def test_export_of_the_decoder() -> None:
    model = SparseLinear(NEURONS, 4096)
    batch = torch.export.Dim("batch")
    sizes = ({0: batch}, {0: batch})
    code = (torch.rand(32, SLOTS), indices(32))
    exported = torch.export.export(model, code, dynamic_shapes=sizes).module()
    for count in (2, 300):
        code = (torch.rand(count, SLOTS), indices(count))
        torch.testing.assert_close(exported(*code), model(*code))


@pytest.mark.parametrize(
    "make", [TopK, lambda k: TopKLinear(8, 17, k), lambda k: KSparseMLP(8, 17, 5, k)]
)
def test_modules_are_copied_and_saved(make: Callable[[int], nn.Module]) -> None:
    model, x = make(SLOTS), torch.randn(BATCH, INPUTS)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for twin in twins:
        torch.testing.assert_close(twin(x), model(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, "TopK: k=0 must be at least 1"),
        (lambda: TopK(5.0), TypeError, "TopK: k=5.0 must be an integer"),  # type: ignore[arg-type]
        (lambda: TopK(True), TypeError, "TopK: k=True must be an integer"),
        (lambda: TopKLinear(4, 8, 2.5), TypeError, "k=2.5"),  # type: ignore[arg-type]
        (lambda: TopKLinear(4, 8, True), TypeError, "k=True"),
        (lambda: TopKLinear(4, 8, 0), ValueError, r"k=0 must lie in 1\.\.8"),
        (lambda: TopKLinear(4, 8, 9), ValueError, r"k=9 must lie in 1\.\.8"),
        (lambda: TopKLinear(4, 0, 1), ValueError, "neurons=0 must be at least 1"),
        (lambda: TopKLinear(4.0, 8, 1), TypeError, "in_features=4.0"),  # type: ignore[arg-type]
        (lambda: TopKLinear(-1, 8, 1), ValueError, "in_features=-1"),
        (lambda: TopKLinear(4, 8, 1, inhibition="none"), ValueError, "inhibition='none'"),
        (lambda: SparseLinear(True, 3), TypeError, "neurons=True"),
        (lambda: SparseLinear(3, -1), ValueError, "out_features=-1"),
        (lambda: KSparseMLP(4, 8, 3, 2.0), TypeError, "k=2.0"),  # type: ignore[arg-type]
    ],
)
def test_constructors_check(
    make: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_sum_over(impl: str, device: str) -> None:
    """d = 0, C = 0 and K = 0: what the specification gives."""

    def run(impl: str) -> list[Tensor]:
        zeros = torch.zeros(BATCH, 0, device=device)
        bias = torch.linspace(-1, 1, NEURONS, device=device)
        weight = torch.zeros(NEURONS, 0, device=device, requires_grad=True)
        chosen, values = indices().to(device), torch.ones(BATCH, SLOTS, device=device)
        none = chosen[:, :0], values[:, :0]
        counts = torch.zeros(NEURONS, dtype=torch.int64, device=device)
        gram = torch.zeros(NEURONS, NEURONS, device=device)
        sk.count_active(none[1], none[0], counts, impl=impl)
        code_gram(none[1], none[0], gram, impl=impl)
        options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "impl": impl}
        return [
            *sk.linear_topk(zeros, weight, SLOTS, bias, threshold=True, impl=impl)[:3],  # type: ignore[list-item]
            sk.linear_inhibit(zeros, weight, SLOTS, None, bias, impl=impl),
            sk.sparse_linear(values, chosen, weight, impl=impl),
            sk.sparse_linear(none[1], none[0], torch.ones(NEURONS, 2, device=device), impl=impl),
            row_gradient(values, zeros, chosen, NEURONS, impl=impl),
            sk.row_update([weight.detach().clone()], [values], [zeros], chosen, **options),
            counts,
            gram,
        ]

    for got, want in zip(run(impl), run("reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_a_layer_without_inputs() -> None:
    assert TopKLinear(0, 8, 2)(torch.zeros(3, 0)).values.shape == (3, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_gradient_stops_where_nothing_passes(impl: str, device: str) -> None:
    """inf * 0 is not a number."""

    def run(impl: str) -> list[Tensor]:
        x = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
        weight = torch.tensor([[3.0, 0], [2.0, 0], [-1.0, 0], [-2.0, 0]], device=device)
        scores = torch.tensor([[3.0, 2.0, -1.0, -2.0]], device=device, requires_grad=True)
        mask = torch.tensor([True, True, False, False], device=device)
        code = sk.linear_topk(x, weight, 3, threshold=True, impl=impl)
        hidden = sk.linear_inhibit(x, weight, 2, impl=impl)
        chosen = sk.topk(scores, 3, mask=mask, impl=impl).values
        assert code.threshold is not None
        steep = torch.tensor([[1.0, 1.0, torch.inf]], device=device)
        return [
            *torch.autograd.grad(code.values, x, steep, retain_graph=True),
            *torch.autograd.grad(code.threshold, x, torch.full_like(code.threshold, torch.inf)),
            *torch.autograd.grad(hidden, x, torch.tensor([[1.0, 1, torch.inf, 1]], device=device)),
            *torch.autograd.grad(chosen, scores, steep),
        ]

    for got, want in zip(run(impl), run("reference"), strict=True):
        assert bool(want.isfinite().all())
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_coefficient_of_zero_passes_nothing(impl: str, device: str) -> None:
    code = torch.tensor([[0.0, 1.0]], device=device), torch.tensor([[0, 1]], device=device)
    x = torch.tensor([[torch.inf, 1.0]], device=device)
    gradient = row_gradient(code[0], x, code[1], 3, impl=impl)
    assert gradient.tolist() == [[0.0, 0.0], [torch.inf, 1.0], [0.0, 0.0]]
    weight = torch.ones(3, 2, device=device)
    silent = torch.zeros_like(code[0])
    assert sk.row_update([weight], [silent], [x], code[1], lr=0.1, max_norm=1.0, impl=impl) == 0
    assert bool((weight == 1).all())


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_a_number_passes_a_gradient(impl: str, device: str) -> None:
    bias = torch.tensor([torch.nan, 1.0, 0.5], device=device, requires_grad=True)
    x, weight = torch.zeros(1, 1, device=device), torch.ones(3, 1, device=device)
    code = sk.linear_topk(x, weight, 1, bias, threshold=True, impl=impl)
    assert code.threshold is not None
    total = code.values.sum() + code.threshold.sum()
    assert torch.autograd.grad(total, bias)[0].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("impl", WITH_DEFAULT)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
@pytest.mark.parametrize("large", [3e38, -3e38])
def test_scores_that_overflow(inhibition: str, large: float, impl: str | None, device: str) -> None:
    check_scores([[large, 0], [large, 0], [1.0, 0], [0.5, 0]], inhibition, impl, device)


@pytest.mark.parametrize("impl", WITH_DEFAULT)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
@pytest.mark.parametrize("first", [torch.nan, torch.inf, 1.0])
@pytest.mark.parametrize("second", [torch.nan, torch.inf, 1.0, -torch.inf])
def test_scores_that_are_no_numbers_or_tie(
    first: float, second: float, inhibition: str, impl: str | None, device: str
) -> None:
    rows = [[first, 0], [second, 0], [0.5, 0], [1.0, 0], [-1.0, 0]]
    check_scores(rows, inhibition, impl, device)


def check_scores(rows: list[list[float]], inhibition: str, impl: str | None, device: str) -> None:
    x = torch.tensor([[3.0, 1e-30]], device=device)
    weight = torch.tensor(rows, device=device)
    options: dict[str, Any] = {"inhibition": inhibition}
    for k in (1, 2, 3):
        want = sk.linear_inhibit(x, weight, k, impl="reference", **options)
        got = sk.linear_inhibit(x, weight, k, impl=impl, **options)
        torch.testing.assert_close(got, want, equal_nan=True)
        code = sk.linear_topk(x, weight, k, threshold=True, impl=impl, **options)
        specified = sk.linear_topk(x, weight, k, threshold=True, impl="reference", **options)
        for have, expected in zip(code[:3], specified[:3], strict=True):
            torch.testing.assert_close(have, expected, equal_nan=True)
        # A layer of many neurons takes the CPU's shortcuts.
        more = torch.zeros(9 if impl == "triton" else 2000, 2, device=device)
        for layer in (weight, torch.cat([weight, more])):
            for gaba in (None, torch.full((len(layer),), 0.5, device=device)):
                dense = sk.linear_inhibit(x, layer, k, gaba, impl="reference", **options)
                active = linear_active(x, layer, k, gaba, impl=impl, **options)
                spread, fires = active.values, int((~(dense <= 0)).sum())
                if active.neurons is not None:
                    spread = torch.zeros_like(dense).index_copy(1, active.neurons, spread)
                    assert len(active.neurons) == fires
                torch.testing.assert_close(spread, dense, equal_nan=True)
                short, wider = linear_code(x, layer, k, 4, gaba, impl=impl, **options)
                if not bool(dense.isfinite().all()):
                    assert bool(wider) or not bool(short.values.isfinite().all())
                    continue
                assert wider.tolist() == [fires > 4]
                spread = torch.zeros_like(dense).scatter_add(1, short.indices, short.values)
                torch.testing.assert_close(spread, dense)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
def test_a_value_that_rounds_to_zero_is_inactive(inhibition: str, impl: str, device: str) -> None:
    """Neither counted nor a way for the gradient."""
    x = torch.tensor([[1e-4]], dtype=torch.float16, device=device)
    rows = torch.tensor([[1e-1], [1e-4], [2e-5]], dtype=torch.float16, device=device)

    def run(op: Callable[..., Any], k: int) -> list[Tensor]:
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        weight = rows.clone().requires_grad_()
        out = op(x, weight, k, inhibition=inhibition, counts=counts, impl=impl)
        values = out if isinstance(out, Tensor) else out.values
        (gradient,) = torch.autograd.grad(values.sum(), weight)
        return [(values > 0).sum(), counts.sum(), (gradient != 0).sum()]

    for op in (sk.linear_topk, sk.linear_inhibit):
        for k in (1, 2, 3):
            active = [int(number) for number in run(op, k)]
            assert active == [1, 1, 1], (op.__name__, k)
