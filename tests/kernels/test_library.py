"""torch.compile, autocast and no_grad of every op; opcheck of the Triton operators."""

from __future__ import annotations

import shutil
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._library.custom_ops import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import ssd_kernels as sk
from ssd_kernels import _op
from tests.kernels.cases import TINY, Draw, Run, gradients
from tests.kernels.conftest import INTERPRETED, triton_only
from tests.kernels.ops import OPS, PACKAGES, cases

# Compiled on CPU, the traceable path serves; "triton" is operators.
IMPLS = [None, triton_only("triton")]
BATCH, INPUTS, NEURONS, SLOTS = (TINY[name] for name in "BDRK")
UNTRACED = {f"{name} {case}".strip() for name, op in OPS.items() for case in op.untraced}
CASES = {name: case for name, case in cases("calls").items() if name not in UNTRACED}


def prepared(name: str, device: str) -> tuple[Run, list[Tensor]]:
    """A call, and the leaves that its gradients are asked for."""
    op, given = CASES[name]
    draw = Draw(device, **TINY)
    return op.prepare(draw, given), draw.leaves


def check_compiled(name: str, impl: str | None, backend: Any, device: str) -> None:
    torch._dynamo.reset()
    run, leaves = prepared(name, device)
    with Operators() as called:
        eager = run(impl)
    assert not called.names  # operators serve traced calls only
    traced = torch.compile(run, fullgraph=True, backend=backend)(impl)
    expected = gradients(eager, leaves)
    assert bool(expected) == bool(leaves)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(gradients(traced, leaves), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name: str, impl: str | None, device: str) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        graphs.append(_code_of(graph))
        return lookup_backend("aot_eager")(graph, given)

    check_compiled(name, impl, backend, device)
    words = [f"{package}.{name}" for package in PACKAGES for name in _operators()]
    assert impl is None or any(word in graphs[0] for word in words)


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
    for batch in (4, 9) if INTERPRETED else (4, 9, 33):
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
    example = (torch.randn(4, INPUTS, device=device),)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    assert "ssd_kernels.linear_topk" in _code_of(program.graph_module)
    for batch in (2, 7) if INTERPRETED else (2, 7, 300):
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
    values, indices = Draw(device, **TINY).code()
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
def operator_calls(device: str) -> dict[str, tuple[str, Any, Any]]:
    """The operators that all calls and their backwards come to: one call of each kind.

    Calls are of a kind if they differ in no more than the sizes and values of tensors.
    """
    calls: dict[str, tuple[str, Any, Any]] = {}
    cross = CustomOpDef.__call__

    def recorded(operator: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        given = operator._qualname.partition("::")[2], _copied(args), _copied(kwargs)
        kind = tree_map_only(Tensor, lambda t: (t.dtype, t.dim(), t.requires_grad), given)
        calls.setdefault(str(kind), given)
        return cross(operator, *args, **kwargs)

    with (
        patch.object(CustomOpDef, "__call__", recorded),
        patch.object(_op, "_dispatch", SimpleNamespace(tracing=lambda: True)),
    ):
        for name in CASES:
            run, leaves = prepared(name, device)
            gradients(run("triton"), leaves)
    return calls


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_opcheck(impl: str, device: str) -> None:
    for operator, args, kwargs in operator_calls(device).values():
        results = torch.library.opcheck(_operators()[operator], args, kwargs)
        assert set(results.values()) == {"SUCCESS"}, operator
    assert _operators().keys() == {operator for operator, *_ in operator_calls(device).values()}


def _operators() -> dict[str, Any]:
    """Those of both packages, by name."""
    qualified = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {
        name: getattr(getattr(torch.ops, package), name).default
        for package, name in qualified
        if package in PACKAGES
    }


def _code_of(graph: torch.fx.GraphModule) -> str:
    """With its subgraphs."""
    return "".join(m.code for m in graph.modules() if isinstance(m, torch.fx.GraphModule))


class Operators(TorchDispatchMode):
    """Notes which of ours are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace in PACKAGES:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
