"""How many launches and allocations a call takes, counted without a GPU.

The tensors are on the meta device (launches.py). A launch is a Triton kernel, or a torch operator
that neither views nor only allocates; a sort counts once, though it is several kernels. Memory that
is neither handed in nor handed out counts as allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import launches
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssd_kernels import _dispatch
from tests.kernels.cases import Draw, Op, Pin, Prepare
from tests.kernels.ops import cases

pytestmark = [
    pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(
        _dispatch.interpreted(), reason="Triton's interpreter launches nothing in this process"
    ),
]
# What launches nothing, besides views.
IDLE = ("empty", "empty_like", "new_empty", "_unsafe_view", "promote_types")


class Count(TorchDispatchMode):
    """Adds the torch operators that launch to `names`; keeps all memory that they allocate."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.fresh: dict[int, Any] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        given = _memory((args, kwargs))
        self.fresh |= {at: held for at, held in _memory(result).items() if at not in given}
        views = all(r.alias_info and not r.alias_info.is_write for r in op._schema.returns)
        name = op._schema.name.removeprefix("aten::")
        if not views and name not in IDLE:
            self.names.append(name)
        return result


def _memory(tree: Any) -> dict[int, Any]:
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)]
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


def counted(prepare: Prepare) -> tuple[list[str], int]:
    names: list[str] = []
    with launches.named("sm90", names):
        run = prepare()
        names.clear()
        with Count(names) as count:
            results = run()
    return names, len(count.fresh.keys() - _memory(results).keys())


def prepared(op: Op, pin: Pin) -> Callable[[], Any]:
    if callable(pin.given):
        return pin.given()
    draw, run = op.without_data(pin.dtype, pin.given)
    forward = partial(run, None)
    if not pin.backward:
        return forward
    before = forward()
    slopes = [torch.empty_like(before[number]) for number in pin.backward]

    def backward() -> Any:
        results = forward() if pin.forward else before
        outputs = [results[number] for number in pin.backward]
        return results, torch.autograd.grad(outputs, draw.leaves, slopes)

    return backward


PINS = cases("pins")


@pytest.mark.parametrize("name", PINS)
def test_launches_and_allocations(name: str) -> None:
    op, pin = PINS[name]
    assert counted(partial(prepared, op, pin)) == (pin.launches.split(), pin.allocations)


def test_counting() -> None:
    rows = Draw("meta")(4, 3)

    def run() -> Tensor:
        kept = rows.t().contiguous()[1:]  # a copy, of which a view is handed out
        rows.add_(torch.empty_like(rows))
        rows.sum().sqrt()
        return kept

    assert counted(lambda: run) == (["clone", "add_", "sum", "sqrt"], 3)
