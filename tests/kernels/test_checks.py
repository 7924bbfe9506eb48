"""Every public function refuses what does not fit: clearly, and before it changes anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.kernels.cases import Arguments
from tests.kernels.ops import OPS

GOOD = {name: op.good for name, op in OPS.items() if op.good is not None}
BAD = [
    pytest.param(name, *bad, id=f"{name}-{number}-{next(iter(bad[0]))}")
    for name, op in OPS.items()
    for number, bad in enumerate(op.bad)
]


def tensors(arguments: Arguments) -> list[Tensor]:
    values = [v for a in arguments.values() for v in (a if isinstance(a, list) else [a])]
    return [v for v in values if isinstance(v, Tensor) and not v.is_meta]


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(("op", "wrong", "error", "message"), BAD)
def test_refused(
    op: str, wrong: Arguments, error: type[Exception], message: str, impl: str | None
) -> None:
    arguments = GOOD[op]() | wrong | {"impl": impl}
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(error, match=message) as raised:
        OPS[op].function(**arguments)
    assert str(raised.value).startswith(f"{op}: ")
    for after, original in zip(tensors(arguments), before, strict=True):
        torch.testing.assert_close(after, original, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", GOOD)
def test_the_same_arguments_without_the_fault_are_served(op: str) -> None:
    OPS[op].function(**GOOD[op]())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", [op for op in GOOD if "indices" in GOOD[op]()])
def test_indices_on_a_gpu_are_looked_at_on_request(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSD_KERNELS_CHECK_INDICES", "1")
    given = GOOD[op]() | {"indices": torch.full((4, 2), -1)}
    moved = tree_map_only(Tensor, Tensor.cuda, given)
    with pytest.raises(ValueError, match=f"^{op}: indices run from -1 to -1"):
        OPS[op].function(**moved)


@pytest.mark.parametrize("op", GOOD)
def test_unknown_implementation(op: str) -> None:
    arguments = GOOD[op]()
    before = [t.clone() for t in tensors(arguments)]
    with pytest.raises(ValueError, match=rf"{op}: impl='magic' is not one of .*reference"):
        OPS[op].function(**arguments, impl="magic")
    for after, original in zip(tensors(arguments), before, strict=True):
        torch.testing.assert_close(after, original, rtol=0, atol=0, equal_nan=True)
