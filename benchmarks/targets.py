"""The project's targets on one H100, as ratios computed from the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.record import Row


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
    yield from _topk()
    yield from _linear_topk()
    yield from _against_sparsify()
    sparse = Place("sparse_linear", "full", "bfloat16", {"B": 8192, "R": 65536, "k": 64, "C": 4096})
    yield Target(
        "sparse_linear bf16 R=65,536 k=64 C=4096, forward + backward: x dense matmul",
        10,
        sparse.faster("dense matmul"),
    )
    yield from _counting()


def _topk() -> Iterator[Target]:
    place = Place("topk", "forward", "float32", {"B": 8192, "R": 131072, "k": 64})
    name = "topk fp32 B=8192 R=131,072 k=64"
    yield Target(f"{name}: x torch.topk", 4, place.faster("torch.topk"))
    yield Target(f"{name}: of the copy bandwidth", 0.6, place.bandwidth)
    for neurons in (1024, 4096):
        for k in (10, 32):
            place = Place("topk", "forward", "float32", {"B": 65536, "R": neurons, "k": k})
            yield Target(
                f"topk fp32 B=65,536 R={neurons} k={k}: x torch.topk", 7, place.faster("torch.topk")
            )


def _linear(mode: str, dtype: str, **shape: int) -> Place:
    return Place("linear_topk", mode, dtype, shape)


def _linear_topk() -> Iterator[Target]:
    library = "F.linear + torch.topk"
    for batch in (128, 1024, 8192):
        place = _linear("forward", "float32", B=batch, d=256, R=10000, k=10)
        name = f"linear_topk fp32 d=256 R=10,000 k=10 B={batch}"
        yield Target(f"{name}: x {library}", 3, place.faster(library))
        yield Target(f"{name}: x GEMM + our topk", 1.3, place.faster("F.linear + our topk"))
    for d, bound in ((1024, 3.0), (4096, 1.5)):
        place = _linear("forward", "bfloat16", B=8192, d=d, R=131072, k=32)
        name = f"linear_topk bf16 d={d} R=131,072 k=32 B=8192"
        yield Target(f"{name}: x {library}", bound, place.faster(library))
        logits = 8192 * 131072 * 2 / 2**20
        yield Target(f"{name}: memory / logits", 0.05, place.memory(logits), at_least=False)
    place = _linear("forward", "float32", B=8192, d=1024, R=65536, k=32)
    yield Target(
        "linear_topk fp32 d=1024 R=65,536 k=32 B=8192: x IEEE fp32 GEMM alone",
        2,
        place.faster("F.linear alone"),
    )


def _against_sparsify() -> Iterator[Target]:
    for place, name in (
        (_linear("full", "bfloat16", B=8192, d=1024, R=131072, k=32), "bf16 d=1024 R=131,072"),
        (_linear("full", "float32", B=8192, d=256, R=10000, k=10), "fp32 d=256 R=10,000"),
    ):
        peer = "eai-sparsify"
        name = f"linear_topk {name} B=8192, forward + backward"
        yield Target(f"{name}: x {peer}", 3, place.faster(peer))
        yield Target(f"{name}: memory / {peer}'s", 0.1, place.memory(peer), at_least=False)


def _counting() -> Iterator[Target]:
    for place, name in (
        (_linear("forward", "float32", B=8192, d=256, R=10000, k=10), "fp32 d=256 R=10,000"),
        (_linear("forward", "bfloat16", B=8192, d=1024, R=131072, k=32), "bf16 d=1024 R=131,072"),
    ):
        # Time with counting over time without it.
        measure = place.faster("ours+counts")
        yield Target(f"counting, linear_topk {name} B=8192", 1.03, measure, at_least=False)
