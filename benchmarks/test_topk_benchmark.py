"""The rows of topk_bench.py under pytest-benchmark: pytest benchmarks --benchmark-enable.

Small shapes on CPU, the shapes of targets and others on CUDA; the same providers and gate.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import cases
from benchmarks.providers import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = cases.CUDA if DEVICE.type == "cuda" else cases.CPU


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "baseline"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title.replace(" ", "-"))
def test_core_row(benchmark: BenchmarkFixture, shape: Shape, ours: bool) -> None:
    case = cases.build(shape, DEVICE)
    name = "ours" if ours else case.baseline
    given, provider = case.inputs(), case.providers[name]
    assert case.check(name, given, provider(given)) == ""

    def call() -> None:
        provider(given)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
