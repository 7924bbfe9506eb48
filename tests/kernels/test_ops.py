"""Every op has its cases in tests/kernels/cases, so that the tests that all ops share see it."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import ssd.ops
import ssd_kernels
from ssd_kernels import _dispatch, _tuning
from tests.kernels.ops import OPS

for package in (ssd_kernels, ssd.ops):  # every op registers when its module is imported
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "_loops":  # which needs numba
            importlib.import_module(f"{package.__name__}.{module.name}")
EVERY = {"calls", "checked"}
KERNELS = {"compiled", "pins"}
PUBLIC = {"good", "bad", "drawn"}


def missing(name: str) -> list[str]:
    """What cases/NAME.py lacks."""
    wanted = set(EVERY)
    if "triton" in _dispatch.TABLES[name]:
        wanted |= KERNELS
    if name in ssd_kernels.__all__:
        wanted |= PUBLIC
    return sorted(field for field in wanted if not getattr(OPS[name], field))


@pytest.mark.parametrize("name", _dispatch.TABLES)
def test_an_op_has_its_cases(name: str) -> None:
    assert name in OPS, f"tests/kernels/cases/{name}.py is missing"
    assert not missing(name), (
        f"OP of tests/kernels/cases/{name}.py lacks {', '.join(missing(name))}"
    )


def test_every_case_is_of_an_op() -> None:
    assert OPS.keys() == _dispatch.TABLES.keys()
    assert {name: op.function.__name__ for name, op in OPS.items()} == {name: name for name in OPS}


def test_every_launch_configuration_has_short_tiles() -> None:
    assert {name for op in OPS.values() for name in op.tiles} == _tuning.TABLE.keys()
