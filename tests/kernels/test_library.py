"""torch.compile, autocast and no_grad of every op; opcheck of the Triton operators."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import ssd_kernels as sk
from ssd_kernels import _op
from tests.kernels.cases import Draw, Results, Run
from tests.kernels.conftest import INTERPRETED, triton_only
from tests.kernels.ops import OPS, PACKAGES

# Compiled on CPU, the traceable path serves; "triton" is operators.
IMPLS = [None, triton_only("triton")]
SIZES = {"B": 6, "D": 8, "R": 17, "K": 3, "C": 5}
BATCH, INPUTS, NEURONS, SLOTS = 6, 8, 17, 3
CASES = {
    f"{name} {case}".strip(): call.prepare
    for name, op in OPS.items()
    for case, call in op.calls.items()
    if call.traced
}


def prepared(name: str, device: str) -> tuple[Run, list[Tensor]]:
    """A call, and the leaves that its gradients are asked for."""
    draw = Draw(device, **SIZES)
    return CASES[name](draw), draw.leaves


def gradients(outputs: Results, leaves: list[Tensor]) -> list[Tensor]:
    reached = [o for o in outputs if o is not None and o.requires_grad]
    if not reached:
        return []
    loss = torch.stack([o.double().square().sum() for o in reached]).sum()
    return list(torch.autograd.grad(loss, leaves))


def check_compiled(name: str, impl: str | None, backend: str, device: str) -> None:
    torch._dynamo.reset()
    run, leaves = prepared(name, device)
    eager, traced = run(impl), torch.compile(run, fullgraph=True, backend=backend)(impl)
    expected = gradients(eager, leaves)
    assert bool(expected) == bool(leaves)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(gradients(traced, leaves), expected)


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
@pytest.mark.parametrize(
    "name", [name for name in CASES if name in OPS or name.endswith(("networks", "preactivations"))]
)
def test_compiles_with_inductor(name: str, device: str) -> None:
    check_compiled(name, None, "inductor", device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_no_grad(name: str, impl: str | None, device: str) -> None:
    run, _ = prepared(name, device)
    with torch.no_grad():
        without = run(impl)
    assert not any(out.requires_grad for out in without if out is not None)
    torch.testing.assert_close(without, run(impl), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear_topk", "linear_inhibit", "sparse_linear"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(name: str, compiled: bool, device: str) -> None:
    torch._dynamo.reset()
    run, leaves = prepared(name, device)
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16):
        outputs = run(None)
    assert outputs[0] is not None
    assert outputs[0].dtype == torch.bfloat16
    assert {g.dtype for g in gradients(outputs, leaves)} == {torch.float32}  # of the leaves


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
    by_row = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))
    x = torch.randn(2, BATCH, INPUTS, device=device)
    torch.testing.assert_close(
        torch.compile(by_row, fullgraph=True, backend="aot_eager")(x), by_row(x)
    )


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
    values, indices = Draw(device, **SIZES).code()
    inputs = torch.randn(BATCH, INPUTS, device=device)

    def step(weight: Tensor, lr: float) -> Tensor:
        return sk.row_update([weight], [values], [inputs], indices, lr=lr, impl=impl)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours, expected = torch.ones(2, NEURONS, INPUTS, device=device)
    for lr in (0.1, 0.05, 0.025):
        torch.testing.assert_close(compiled(ours, lr), step(expected, lr))
    torch.testing.assert_close(ours, expected)


def _copied(arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)


@cache
def operator_calls(name: str, device: str) -> list[tuple[str, Any, Any]]:
    """The operators that a call and its backward come to, and their arguments."""
    calls = []
    cross = CustomOpDef.__call__

    def recorded(operator: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        calls.append((operator._qualname.partition("::")[2], _copied(args), _copied(kwargs)))
        return cross(operator, *args, **kwargs)

    run, leaves = prepared(name, device)
    with (
        patch.object(CustomOpDef, "__call__", recorded),
        patch.object(_op, "_dispatch", SimpleNamespace(tracing=lambda: True)),
    ):
        gradients(run("triton"), leaves)
    return calls


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, impl: str, device: str) -> None:
    for operator, args, kwargs in operator_calls(name, device):
        results = torch.library.opcheck(_operators()[operator], args, kwargs)
        assert set(results.values()) == {"SUCCESS"}, operator


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_every_operator_is_checked(impl: str, device: str) -> None:
    called = {operator for name in CASES for operator, *_ in operator_calls(name, device)}
    assert _operators().keys() == called


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
    run, _ = prepared(name, device)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(_code_of(graph))
        return graph.forward

    with Operators() as eager:
        run(impl)
    assert not eager.called
    torch.compile(lambda: run(impl), fullgraph=True, backend=backend)()
    assert any(
        f"{package}.{operator}" in graphs[0] for package in PACKAGES for operator in _operators()
    )


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
