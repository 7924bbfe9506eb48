"""pytest-benchmark versions of the core rows: pytest benchmarks --benchmark-enable.

Small shapes on CPU, the targets' shapes on CUDA; the same providers and gate as topk_bench.py.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import providers
from benchmarks.cases import CPU, CUDA, Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = CUDA if DEVICE.type == "cuda" else CPU
BASELINES = {
    "topk": "torch.topk",
    "linear_topk": "F.linear + torch.topk",
    "linear_active": "F.linear + torch.topk",
    "linear_inhibit": "F.linear + torch.topk",
    "sparse_linear": "dense matmul",
    "count_active": "index_add_",
    "code_gram": "dense matmul",
    "row_update": "dense step, gradient given",
}


def _id(shape: Shape) -> str:
    sizes = "-".join(f"{name}{size}" for name, size in shape.sizes.items())
    return f"{shape.op}-{shape.mode}-{shape.dtype}-{sizes}".replace("torch.", "")


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "baseline"])
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
def test_core_row(benchmark: BenchmarkFixture, shape: Shape, ours: bool) -> None:
    case = providers.build(shape, DEVICE)
    name = "ours" if ours else BASELINES[shape.op]
    given, provider = case.inputs(), case.providers[name]
    assert case.check(name, given, provider(given)) == ""

    def call() -> None:
        provider(given)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
