"""torch.compile, autocast and no_grad of every public function; opcheck of the Triton operators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import ops as sk
from tests.kernels.conftest import INTERPRETED, triton_only
from tests.kernels.ops import PACKAGES

# Compiled on CPU, the traceable path serves; "triton" is operators.
IMPLS = [None, triton_only("triton")]
BATCH, SLOTS, NEURONS, OUTPUTS, INPUTS = 6, 3, 17, 5, 8

Run = Callable[[str | None], list[Tensor]]


def _topk(device: str) -> Run:
    scores = torch.randn(BATCH, NEURONS, device=device, requires_grad=True)
    boost = torch.rand(NEURONS, device=device)
    mask = torch.rand(NEURONS, device=device) > 0.3

    def run(impl: str | None) -> list[Tensor]:
        plain = sk.topk(scores, SLOTS, impl=impl)
        chosen = sk.topk(scores, SLOTS, boost=boost, mask=mask, impl=impl)
        # By name: torch.compile of torch 2.6 cannot slice a named tuple.
        return [plain.values, plain.indices, chosen.values, chosen.indices]

    return run


def _linear_topk(device: str) -> Run:
    x, weight, bias = _layer(device)

    def run(impl: str | None) -> list[Tensor]:
        counts = torch.zeros(NEURONS, dtype=torch.int64, device=device)
        out = sk.linear_topk(
            x,
            weight,
            SLOTS,
            bias,
            inhibition="subtract",
            threshold=True,
            counts=counts,
            impl=impl,
        )
        assert out.threshold is not None
        return [out.values, out.indices, out.threshold, counts]

    return run


def _linear_inhibit(device: str) -> Run:
    x, weight, bias = _layer(device)
    gaba = torch.rand(NEURONS, device=device)

    def run(impl: str | None) -> list[Tensor]:
        counts = torch.zeros(NEURONS, dtype=torch.int64, device=device)
        return [sk.linear_inhibit(x, weight, SLOTS, gaba, bias, counts=counts, impl=impl), counts]

    return run


def _linear_topk_blocks(device: str) -> Run:
    x, weight, bias = _layer(device, networks=3)

    def run(impl: str | None) -> list[Tensor]:
        counts = torch.zeros(3 * NEURONS, dtype=torch.int64, device=device)
        out = sk.linear_topk(
            x, weight, SLOTS, bias, threshold=True, counts=counts, blocks=3, impl=impl
        )
        assert out.threshold is not None
        return [out.values, out.indices, out.threshold, counts]

    return run


def _linear_topk_preactivations(device: str) -> Run:
    x, weight, bias = _layer(device)

    def run(impl: str | None) -> list[Tensor]:
        out = sk.linear_topk(x, weight, SLOTS, bias, preactivations=True, impl=impl)
        assert out.preactivations is not None
        return [out.values, out.indices, out.preactivations]

    return run


def _linear_inhibit_blocks(device: str) -> Run:
    x, weight, bias = _layer(device, networks=3)
    gaba = torch.rand(3 * NEURONS, device=device)

    def run(impl: str | None) -> list[Tensor]:
        counts = torch.zeros(3 * NEURONS, dtype=torch.int64, device=device)
        options: dict[str, Any] = {"counts": counts, "blocks": 3, "impl": impl}
        return [sk.linear_inhibit(x, weight, SLOTS, gaba, bias, **options), counts]

    return run


def _layer(device: str, networks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    neurons = networks * NEURONS
    shapes: list[tuple[int, ...]] = [(BATCH, INPUTS), (neurons, INPUTS), (neurons,)]
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    return x, weight, bias


def _code(device: str) -> tuple[Tensor, Tensor]:
    order = torch.rand(BATCH, NEURONS, device=device).argsort(dim=1)
    return torch.rand(BATCH, SLOTS, device=device, requires_grad=True), order[:, :SLOTS]


def _sparse_linear(device: str) -> Run:
    values, indices = _code(device)
    weight = torch.randn(NEURONS, OUTPUTS, device=device, requires_grad=True)
    bias = torch.randn(OUTPUTS, device=device, requires_grad=True)
    return lambda impl: [sk.sparse_linear(values, indices, weight, bias, impl=impl)]


def _count_active(device: str) -> Run:
    values, indices = _code(device)

    def run(impl: str | None) -> list[Tensor]:
        counts = torch.zeros(NEURONS, dtype=torch.int64, device=device)
        last = torch.full_like(counts, -1)
        sk.count_active(values, indices, counts, last, 4, impl=impl)
        sk.count_active(values, indices, counts, impl=impl)
        return [counts, last]

    return run


def _code_gram(device: str) -> Run:
    values, indices = _code(device)
    labels = torch.randint(OUTPUTS, (BATCH,), device=device)
    targets = torch.randn(BATCH, OUTPUTS, device=device)

    def run(impl: str | None) -> list[Tensor]:
        gram = torch.zeros(NEURONS, NEURONS, device=device)
        crosses = torch.zeros(2, NEURONS, OUTPUTS, device=device)
        sk.code_gram(values, indices, gram, crosses[0], labels, impl=impl)
        sk.code_gram(values, indices, gram, crosses[1], targets, impl=impl)
        sk.code_gram(values, indices, gram, impl=impl)
        return [gram, crosses]

    return run


def _row_update(device: str) -> Run:
    values, indices = _code(device)
    widths = (INPUTS, OUTPUTS)
    starts = [torch.rand(NEURONS, w, device=device) for w in widths]
    inputs = [torch.randn(BATCH, w, device=device) for w in widths]

    def run(impl: str | None) -> list[Tensor]:
        weights, buffers = [w.clone() for w in starts], [w + 1 for w in starts]
        settings: dict[str, Any] = {"lr": 0.1, "max_norm": 0.5, "normalize": [True, False]}
        norms = [
            sk.row_update(weights, [values, values], inputs, indices, impl=impl, **settings),
            sk.row_update(
                weights,
                [values, values],
                inputs,
                indices,
                momentum=0.9,
                buffers=buffers,
                impl=impl,
                **settings,
            ),
        ]
        return [*norms, *weights, *buffers]

    return run


def _distill(device: str) -> Run:
    logits, target = (torch.randn(BATCH, OUTPUTS, device=device) for _ in range(2))
    hidden, taught = (torch.randn(BATCH, SLOTS, device=device) for _ in range(2))
    weight = torch.rand(BATCH, device=device)
    labels = torch.randint(OUTPUTS, (BATCH,), device=device)

    def run(impl: str | None) -> list[Tensor]:
        options: dict[str, Any] = {"alpha": 0.6, "lam": 0.3, "temperature": 2.0, "impl": impl}
        outputs = [
            *sk.distill(logits, labels, target, hidden, taught, **options),
            *sk.distill(logits, labels, weight=weight, impl=impl),
        ]
        return [output for output in outputs if output is not None]

    return run


def _distill_code(device: str) -> Run:
    values, indices = _code(device)
    values = values.detach()
    decoder, target = (torch.randn(n, OUTPUTS, device=device) for n in (NEURONS, BATCH))
    taught, weight = torch.rand(BATCH, 4, device=device), torch.rand(BATCH, device=device)
    positions = torch.randperm(NEURONS, device=device).clamp(max=4)
    labels = torch.randint(OUTPUTS, (BATCH,), device=device)

    def run(impl: str | None) -> list[Tensor]:
        code, terms = (values, indices, decoder, labels), (target, taught)
        options: dict[str, Any] = {"alpha": 0.6, "lam": 0.3, "temperature": 2.0, "impl": impl}
        return [
            *sk.distill_code(*code, *terms, positions=positions, **options),
            *sk.distill_code(*code, weight=weight, impl=impl),
        ]

    return run


CASES = {
    "topk": _topk,
    "linear_topk": _linear_topk,
    "linear_inhibit": _linear_inhibit,
    "linear_topk blocks": _linear_topk_blocks,
    "linear_topk preactivations": _linear_topk_preactivations,
    "linear_inhibit blocks": _linear_inhibit_blocks,
    "sparse_linear": _sparse_linear,
    "code_gram": _code_gram,
    "count_active": _count_active,
    "distill": _distill,
    "distill_code": _distill_code,
    "row_update": _row_update,
}


def gradients(outputs: list[Tensor]) -> list[Tensor]:
    """Of every leaf that the differentiable outputs reach, in a fixed order."""
    reached = [o for o in outputs if o.requires_grad]
    leaves: dict[int, Tensor] = {}
    pending = [o.grad_fn for o in reached]
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        pending += [parent for parent, _ in node.next_functions]
    ordered = sorted(leaves.values(), key=lambda leaf: tuple(leaf.shape))
    loss = [o.double().square().sum() for o in reached]
    return list(torch.autograd.grad(sum(loss), ordered)) if reached else []  # type: ignore[arg-type]


def check_compiled(name: str, impl: str | None, backend: str, device: str) -> None:
    torch._dynamo.reset()
    run = CASES[name](device)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    eager, traced = run(impl), compiled(impl)
    for got, want in zip(traced, eager, strict=True):
        torch.testing.assert_close(got, want)
    expected = gradients(eager)
    assert bool(expected) == any(o.is_floating_point() and o.requires_grad for o in eager)
    for got, want in zip(gradients(traced), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name: str, impl: str | None, device: str) -> None:
    check_compiled(name, impl, "aot_eager", device)


@pytest.mark.skipif(INTERPRETED, reason="inductor's own Triton kernels need the compiler")
@pytest.mark.skipif(
    not torch.cuda.is_available()
    and shutil.which("g++") is None
    and shutil.which("clang++") is None,
    reason="inductor needs a C++ compiler, and neither g++ nor clang++ is installed here",
)
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_inductor(name: str, device: str) -> None:
    check_compiled(name, None, "inductor", device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_no_grad(name: str, impl: str | None, device: str) -> None:
    run = CASES[name](device)
    with torch.no_grad():
        without = run(impl)
    for got, want in zip(without, run(impl), strict=True):
        assert not got.requires_grad
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["linear_topk", "linear_inhibit", "sparse_linear"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(name: str, compiled: bool, device: str) -> None:
    torch._dynamo.reset()
    run = CASES[name](device)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        outputs = run(None)
    assert outputs[0].dtype == torch.bfloat16
    # The leaves are fp32, and so are their gradients.
    leaf_gradients = gradients(outputs)
    assert leaf_gradients
    assert {g.dtype for g in leaf_gradients} == {torch.float32}


@pytest.mark.parametrize("impl", IMPLS)
def test_one_graph_serves_every_batch(impl: str | None, device: str) -> None:
    torch._dynamo.reset()
    run = Reconstruction(impl, device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 9, 33):
        x = torch.randn(batch, INPUTS, device=device, requires_grad=True)
        got, want = (torch.autograd.grad(run(x).square().sum(), x)[0] for run in (compiled, run))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_transforms(impl: str | None, device: str) -> None:
    """Of torch.func: they take the specification."""
    torch._dynamo.reset()
    run = Reconstruction(impl, device)
    each = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))
    x = torch.randn(2, BATCH, INPUTS, device=device)
    torch.testing.assert_close(torch.compile(each, fullgraph=True, backend="aot_eager")(x), each(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_operators_are_exported(impl: str, strict: bool, device: str) -> None:
    module = Reconstruction(impl, device)
    sizes = ({0: torch.export.Dim("batch")},)
    example = (torch.randn(32, INPUTS, device=device),)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    assert "ssd_kernels.linear_topk" in _code_of(program.graph_module)
    for batch in (2, 7, 300):
        x = torch.randn(batch, INPUTS, device=device)
        torch.testing.assert_close(program.module()(x), module(x))


class Reconstruction(nn.Module):
    """Three ops in a row, for any batch."""

    def __init__(self, impl: str | None, device: str) -> None:
        super().__init__()
        self.impl = impl
        self.register_buffer("encoder", torch.randn(NEURONS, INPUTS, device=device))
        self.register_buffer("decoder", torch.randn(NEURONS, INPUTS, device=device))

    def forward(self, x: Tensor) -> Tensor:
        code = sk.linear_topk(x, self.encoder, SLOTS, impl=self.impl)
        out = sk.sparse_linear(code.values, code.indices, self.decoder, impl=self.impl)
        return sk.topk(out, SLOTS, impl=self.impl).values


@pytest.mark.parametrize("impl", IMPLS)
def test_a_learning_rate_may_change_between_compiled_steps(impl: str | None, device: str) -> None:
    torch._dynamo.reset()
    values, indices = _code(device)
    inputs = torch.randn(BATCH, INPUTS, device=device)

    def step(weight: Tensor, lr: float) -> Tensor:
        return sk.row_update([weight], [values], [inputs], indices, lr=lr, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, expected = torch.ones(2, NEURONS, INPUTS, device=device)
    for lr in (0.1, 0.05, 0.025):
        torch.testing.assert_close(compiled(ours, lr), step(expected, lr))
    torch.testing.assert_close(ours, expected)


def _opcheck_cases(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator."""
    values, indices = _code(device)
    plain = values.detach()
    scores = torch.randn(BATCH, NEURONS, device=device, requires_grad=True)
    boost, mask = torch.rand(NEURONS, device=device), torch.rand(NEURONS, device=device) > 0.3
    weight = torch.randn(NEURONS, OUTPUTS, device=device, requires_grad=True)
    bias = torch.randn(OUTPUTS, device=device, requires_grad=True)
    grad = torch.randn(BATCH, OUTPUTS, device=device)
    counts = torch.zeros(NEURONS, dtype=torch.int64, device=device)
    now = torch.tensor(3, device=device)
    gram = torch.zeros(NEURONS, NEURONS, device=device)
    cross, labels = gram[:, :OUTPUTS].contiguous(), indices[:, 0] % OUTPUTS
    weights = [torch.rand(NEURONS, w, device=device) for w in (INPUTS, OUTPUTS)]
    buffers = [w.clone() for w in weights]
    inputs = [torch.randn(BATCH, w, device=device) for w in (INPUTS, OUTPUTS)]
    layer, several = _layer(device), _layer(device, networks=3)
    rate, bound = torch.full((1,), 0.1, device=device), torch.full((1,), 0.5, device=device)
    update = (weights, [plain, plain], inputs, indices, rate)
    logits, hidden = grad.clone(), plain.clone()
    labels = torch.randint(OUTPUTS, (BATCH,), device=device)
    numbers, share = [0.6, 0.3, 2.0], torch.rand(BATCH, device=device)
    tensors = [torch.full((BATCH,), number, device=device) for number in numbers]
    backward = (grad, plain, indices, weight.detach())
    stored = (logits, labels, indices[:2] % 3, torch.tensor([3, 2], device=device), now)
    sums = [torch.zeros(2, dtype=dtype, device=device) for dtype in (torch.float64, torch.int64)]
    tallied = (grad[:, 0], grad, labels, plain[:, 0], *sums, sums[1].clone(), now)
    one, three = (*layer, SLOTS, "mask"), (*several, SLOTS, "mask")
    return {
        "topk": (scores, SLOTS, None, None),
        "topk chosen": (scores, SLOTS, boost, mask),
        "sparse_linear": (values, indices, weight, bias),
        "sparse_linear no bias": (values, indices, weight, None),
        "sparse_linear_backward": (*backward, True, True, ()),
        "sparse_linear_backward of values": (*backward, True, False, ()),
        "row_gradients": (plain, inputs[0], indices, NEURONS, False, None, ()),
        "row_gradients and sums": (
            plain,
            inputs[0],
            indices,
            NEURONS,
            True,
            (plain > 0).view(torch.uint8),
            (),
        ),
        "code_gram": (plain, indices, gram, cross, labels),
        "code_gram only": (plain, indices, gram, None, None),
        "linear_topk": (*one, counts, 1),
        "linear_topk of all": (*layer, NEURONS, "subtract", None, 1),
        "linear_topk blocks": (*three, None, 3),
        "linear_inhibit": (*layer, SLOTS, boost, "subtract", counts, True, 1),
        "linear_inhibit blocks": (*several, SLOTS, boost.repeat(3), "mask", None, False, 3),
        "graded_code": (*(t.detach() for t in layer[:2]), SLOTS, 5, boost, "mask", counts, 1),
        "count_active": (plain, indices, counts, counts.clone(), 0, now),
        "count_active only": (plain, indices, counts, None, 3, None),
        "row_update": (*update, 0.0, bound, None, True, [True, False], 0.9, buffers, 1),
        "row_update plain": (*update[:4], None, 0.1, None, None, False, [False] * 2, 0.0, [], 1),
        "draw_batch": (*stored, 2, grad, plain, counts[:16], bound.expand(2)),
        "draw_batch only": (*stored, 2, None, None, None, None),
        "dense_update": (
            weights,
            buffers,
            rate,
            0.0,
            bound,
            None,
            True,
            [True, False],
            0.9,
            [w.clone() for w in weights],
            counts[:1],
            1,
        ),
        "dense_update plain": (
            weights,
            buffers,
            None,
            0.1,
            None,
            None,
            False,
            [False] * 2,
            0.0,
            [],
            None,
            1,
        ),
        "gate_gradient": (
            scores.detach().clone(),
            mask.expand(BATCH, -1),
            plain,
            counts.clone(),
            False,
        ),
        "gate_gradient alone": (scores.detach().clone(), boost.expand(BATCH, -1), None, None, True),
        "tally": (*tallied, plain[:, 0] > 0.5, torch.zeros(2, dtype=torch.bool, device=device)),
        "tally only": (*tallied, None, None),
        "distill": (
            logits,
            labels,
            grad,
            hidden,
            plain,
            [],
            tensors,
            share,
            "forward",
            logits > 0,
        ),
        "distill_code": (
            plain,
            indices,
            weight.detach(),
            labels,
            grad,
            plain,
            indices[0].new_full((NEURONS,), 1),
            [],
            tensors,
            share,
            "forward",
            logits > 0,
        ),
        "distill_code plain": (
            plain,
            indices,
            weight.detach(),
            labels,
            None,
            None,
            None,
            numbers,
            [],
            None,
            "reverse",
            None,
        ),
        "distill plain": (logits, labels, None, None, None, numbers, [], None, "reverse", None),
    }


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("name", _opcheck_cases("cpu"))
def test_opcheck(name: str, impl: str, device: str) -> None:
    operator = _operators()[name.split()[0]]
    # As the autograd.Function of the op hands them over.
    given = [a.detach() if isinstance(a, Tensor) else a for a in _opcheck_cases(device)[name]]
    assert set(torch.library.opcheck(operator, tuple(given)).values()) == {"SUCCESS"}


def test_every_operator_is_checked() -> None:
    assert _operators().keys() == {name.split()[0] for name in _opcheck_cases("cpu")}


def _operators() -> dict[str, Any]:
    """Those of both packages, by name."""
    qualified = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {
        name: getattr(getattr(torch.ops, package), name).default
        for package, name in qualified
        if package in PACKAGES
    }


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("name", CASES)
def test_operators_serve_traced_calls_only(name: str, impl: str, device: str) -> None:
    torch._dynamo.reset()
    run = CASES[name](device)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(_code_of(graph))
        return graph.forward

    with Operators() as eager:
        run(impl)
    assert not eager.called
    torch.compile(lambda: run(impl), fullgraph=True, backend=backend)()
    op = "topk" if "preactivations" in name else name.split()[0]
    assert str(_operators()[op]).removesuffix(".default") in graphs[0]


def _code_of(graph: torch.fx.GraphModule) -> str:
    """With its subgraphs."""
    return "".join(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


class Operators(TorchDispatchMode):
    """Notes which of ours are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace in PACKAGES:
            self.called.append(str(func))
        return func(*args, **(kwargs or {}))
