"""The project's targets on one H100, as ratios computed from the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.record import Row

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Target:
    """`measure` gives the ratio from a run's rows, or None where a row is missing or wrong."""

    what: str
    bound: float
    measure: Callable[[list[Row]], float | None]
    at_least: bool = True

    def verdict(self, rows: list[Row]) -> tuple[str, str]:
        """The ratio as text and met | missed | not measured."""
        ratio = self.measure(rows)
        if ratio is None:
            return "", "not measured"
        met = ratio >= self.bound if self.at_least else ratio <= self.bound
        return f"{ratio:.3g}", "met" if met else "missed"

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass(frozen=True)
class Place:
    """The rows of one case."""

    op: str
    mode: str
    dtype: str
    shape: dict[str, int]

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}={size:,}" for name, size in self.shape.items())
        return f"{self.op} {SHORT[self.dtype]} {sizes}"

    def find(self, rows: list[Row], provider: str, metric: str = "time") -> Row | None:
        for row in rows:
            here = (row.op, row.mode, row.dtype, row.shape) == (
                self.op,
                self.mode,
                self.dtype,
                self.shape,
            )
            if here and (row.provider, row.metric) == (provider, metric):
                return row if row.correct and row.p50 is not None else None
        return None

    def median(self, rows: list[Row], provider: str, metric: str = "time") -> float | None:
        row = self.find(rows, provider, metric)
        return row.p50 if row else None

    def faster(self, than: str, of: str = "ours") -> Callable[[list[Row]], float | None]:
        """How many times faster `of` is than `than`."""
        return lambda rows: _ratio(self.median(rows, than), self.median(rows, of))

    def memory(self, of: float | str) -> Callable[[list[Row]], float | None]:
        """Our peak extra memory over a provider's, or over so many MiB."""

        def measure(rows: list[Row]) -> float | None:
            other = of if isinstance(of, float) else self.median(rows, of, "memory")
            return _ratio(self.median(rows, "ours", "memory"), other)

        return measure

    def bandwidth(self, rows: list[Row]) -> float | None:
        row = self.find(rows, "ours", "bandwidth")
        return row.roofline_fraction if row else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def targets() -> Iterator[Target]:
    """Every target of the table, in its order."""
    yield from _encoder()
    yield from _against_sparsify()
    yield from _topk()
    sparse = Place("sparse_linear", "full", "bfloat16", {"B": 8192, "R": 65536, "k": 64, "C": 4096})
    dense = "dense matmul"
    yield Target(f"{sparse.name}, forward + backward: x {dense}", 8, sparse.faster(dense))
    yield from _counting()


def _linear(mode: str, dtype: str, **shape: int) -> Place:
    return Place("linear_topk", mode, dtype, shape)


LIBRARY, GEMM = "F.linear + torch.topk", "16-bit GEMM alone"
BF16_1024 = _linear("forward", "bfloat16", B=8192, d=1024, R=131072, k=32)
BF16_4096 = _linear("forward", "bfloat16", B=8192, d=4096, R=131072, k=32)
FP32_256 = _linear("forward", "float32", B=8192, d=256, R=10000, k=10)
FP32_1024 = _linear("forward", "float32", B=8192, d=1024, R=65536, k=32)


def _encoder() -> Iterator[Target]:
    for place, bound in (
        (BF16_1024, 0.85),
        (_linear("forward", "bfloat16", B=1024, d=1024, R=131072, k=32), 0.85),
        (BF16_4096, 0.85),
        (FP32_256, 0.5),
        (_linear("forward", "float32", B=1024, d=256, R=10000, k=10), 0.5),
        (FP32_1024, 0.5),
    ):
        yield Target(f"{place.name}: of the speed of the {GEMM}", bound, place.faster(GEMM))
    yield Target(f"{FP32_256.name}: x {LIBRARY}", 6, FP32_256.faster(LIBRARY))
    small = _linear("forward", "float32", B=128, d=256, R=10000, k=10)
    replayed = small.faster(f"{LIBRARY} (graph)", of="ours (graph)")
    yield Target(f"{small.name}, both in a CUDA graph: x {LIBRARY}", 3, replayed)
    yield Target(f"{small.name}, eager: x {LIBRARY}", 1.5, small.faster(LIBRARY))
    logits = 8192 * 131072 * 2 / 2**20
    for place, bound in ((BF16_1024, 4), (BF16_4096, 1.7)):
        yield Target(f"{place.name}: x {LIBRARY}", bound, place.faster(LIBRARY))
        memory = place.memory(logits)
        yield Target(f"{place.name}: memory / logits", 0.05, memory, at_least=False)
    alone = FP32_1024.faster("F.linear alone")
    yield Target(f"{FP32_1024.name}: x IEEE fp32 GEMM alone", 6, alone)


def _against_sparsify() -> Iterator[Target]:
    peer = "eai-sparsify"
    for place in (
        _linear("full", "bfloat16", B=8192, d=1024, R=131072, k=32),
        _linear("full", "float32", B=8192, d=256, R=10000, k=10),
    ):
        name = f"{place.name}, forward + backward"
        yield Target(f"{name}: x {peer}", 3, place.faster(peer))
        yield Target(f"{name}: memory / {peer}'s", 0.1, place.memory(peer), at_least=False)


def _topk() -> Iterator[Target]:
    long = Place("topk", "forward", "float32", {"B": 8192, "R": 131072, "k": 64})
    short = [
        Place("topk", "forward", "float32", {"B": 65536, "R": neurons, "k": k})
        for neurons in (1024, 4096)
        for k in (10, 32)
    ]
    yield Target(f"{long.name}: x torch.topk", 4, long.faster("torch.topk"))
    yield Target(f"{long.name}: of the copy bandwidth", 0.6, long.bandwidth)
    for place in short:
        yield Target(f"{place.name}: x torch.topk", 7, place.faster("torch.topk"))
    for place in (long, *short):
        # Sorted, as torch.topk is.
        yield Target(f"{place.name}: x flashinfer", 1, place.faster("flashinfer"))


def _counting() -> Iterator[Target]:
    for place in (FP32_256, BF16_1024):
        # Time with counting over time without it.
        measure = place.faster("ours+counts")
        yield Target(f"counting, {place.name}", 1.02, measure, at_least=False)
