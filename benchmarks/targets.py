"""The targets of topk_bench on an H100, as ratios computed from the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.providers import ALONE, DENSE, GEMM, LIBRARY, Shape, shapes
from benchmarks.record import Row, find, ratio

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
Find = Callable[..., Row | None]  # (provider, metric="time") -> the row of a right result
Measure = Callable[[Find], float | None]  # None where a row is missing or wrong
SPARSIFY = "eai-sparsify"
SPARSIFY_TIME = "{}, forward + backward: x eai-sparsify"
SPARSIFY_MEMORY = "{}, forward + backward: memory / eai-sparsify's"
# The most important shapes come first: the time budget cuts the end.
(
    BF16_1024,
    FP32_256,
    FP32_128,
    FP32_1024,
    BF16_4096,
    BF16_TRAINED,
    FP32_TRAINED,
    LONG,
    DECODER,
    *SHORT,
    FP32_SMALL,
    BF16_SMALL,
) = SHAPES = shapes("""
    linear_topk    forward  bfloat16  B=8192 d=1024 R=131072 k=32
    linear_topk    forward  float32   B=8192 d=256 R=10000 k=10
    linear_topk    forward  float32   B=128 d=256 R=10000 k=10
    linear_topk    forward  float32   B=8192 d=1024 R=65536 k=32
    linear_topk    forward  bfloat16  B=8192 d=4096 R=131072 k=32
    linear_topk    full     bfloat16  B=8192 d=1024 R=131072 k=32
    linear_topk    full     float32   B=8192 d=256 R=10000 k=10
    topk           forward  float32   B=8192 R=131072 k=64
    sparse_linear  full     bfloat16  B=8192 R=65536 k=64 C=4096
    topk           forward  float32   B=65536 R=4096 k=10
    topk           forward  float32   B=65536 R=4096 k=32
    topk           forward  float32   B=65536 R=1024 k=10
    topk           forward  float32   B=65536 R=1024 k=32
    linear_topk    forward  float32   B=1024 d=256 R=10000 k=10
    linear_topk    forward  bfloat16  B=1024 d=1024 R=131072 k=32
""")
SHORT.sort(key=lambda shape: shape.sizes["R"])
LOGITS = 8192 * 131072 * 2 / 2**20  # MiB in bf16


@dataclass(frozen=True)
class Target:
    """A ratio on a shape, and its bound; `what` has {} in the place of the shape's name."""

    what: str
    shape: Shape
    bound: float
    measure: Measure
    at_least: bool = True

    def line(self, rows: Sequence[Row]) -> tuple[str, str, str, str]:
        """What, wanted, measured, and met | missed | not measured."""
        shape = self.shape
        sizes = " ".join(f"{name}={size:,}" for name, size in shape.sizes.items())
        what = self.what.format(f"{shape.op} {SHORT_NAMES[shape.dtype_name]} {sizes}")
        wanted = f"{'>=' if self.at_least else '<='} {self.bound:g}"
        cells = {"mode": shape.mode, "dtype": shape.dtype_name, "shape": shape.sizes}
        figure = self.measure(partial(find, rows, op=shape.op, **cells))
        if figure is None:
            return what, wanted, "", "not measured"
        met = figure >= self.bound if self.at_least else figure <= self.bound
        return what, wanted, f"{figure:.3g}", "met" if met else "missed"


def over(above: str, below: str | float = "ours", metric: str = "time") -> Measure:
    """The median of one provider over that of another, or over a number."""

    def measure(find: Find) -> float | None:
        def median(provider: str) -> float | None:
            row = find(provider, metric)
            return row.p50 if row else None

        return ratio(median(above), median(below) if isinstance(below, str) else below)

    return measure


def _bandwidth(find: Find) -> float | None:
    row = find("ours", "bandwidth")
    return row.roofline_fraction if row else None


TARGETS = [
    *(
        Target("{}: of the speed of the 16-bit GEMM alone", shape, bound, over(GEMM))
        for bound, group in (
            (0.85, (BF16_1024, BF16_SMALL, BF16_4096)),
            (0.5, (FP32_256, FP32_SMALL, FP32_1024)),
        )
        for shape in group
    ),
    Target("{}: x F.linear + torch.topk", FP32_256, 6, over(LIBRARY)),
    Target(
        "{}, both in a CUDA graph: x F.linear + torch.topk",
        FP32_128,
        3,
        over(f"{LIBRARY} (graph)", "ours (graph)"),
    ),
    Target("{}, eager: x F.linear + torch.topk", FP32_128, 1.5, over(LIBRARY)),
    Target("{}: x F.linear + torch.topk", BF16_1024, 4, over(LIBRARY)),
    Target("{}: memory / logits", BF16_1024, 0.05, over("ours", LOGITS, "memory"), at_least=False),
    Target("{}: x F.linear + torch.topk", BF16_4096, 1.7, over(LIBRARY)),
    Target("{}: memory / logits", BF16_4096, 0.05, over("ours", LOGITS, "memory"), at_least=False),
    Target("{}: x IEEE fp32 GEMM alone", FP32_1024, 6, over(ALONE)),
    Target(SPARSIFY_TIME, BF16_TRAINED, 3, over(SPARSIFY)),
    Target(SPARSIFY_MEMORY, BF16_TRAINED, 0.1, over("ours", SPARSIFY, "memory"), at_least=False),
    Target(SPARSIFY_TIME, FP32_TRAINED, 3, over(SPARSIFY)),
    Target(SPARSIFY_MEMORY, FP32_TRAINED, 0.1, over("ours", SPARSIFY, "memory"), at_least=False),
    Target("{}: x torch.topk", LONG, 4, over("torch.topk")),
    Target("{}: of the copy bandwidth", LONG, 0.6, _bandwidth),
    *(Target("{}: x torch.topk", shape, 7, over("torch.topk")) for shape in SHORT),
    *(Target("{}: x flashinfer", shape, 1, over("flashinfer")) for shape in (LONG, *SHORT)),
    Target("{}, forward + backward: x dense matmul", DECODER, 8, over(DENSE)),
    Target("counting, {}", FP32_256, 1.02, over("ours+counts"), at_least=False),
    Target("counting, {}", BF16_1024, 1.02, over("ours+counts"), at_least=False),
]
