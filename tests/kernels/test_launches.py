"""How many launches and allocations a call takes, counted without a GPU.

The tensors are on the meta device (launches.py). A launch is a Triton kernel, or a torch operator
that neither views nor only allocates; a sort counts once, though it is several kernels. Memory that
is neither handed in nor handed out counts as allocated. A row of PINS pins one mode of one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import launches
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ssd_kernels as ours
from ssd.ops.batch import draw_batch, tally
from ssd.ops.dense_update import dense_update
from ssd.ops.distill import distill
from ssd.ops.distill_code import distill_code
from ssd.ops.gate_gradient import gate_gradient
from ssd_kernels import _dispatch
from ssd_kernels._graded_code import linear_code

pytestmark = [
    pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed"),
    pytest.mark.skipif(
        _dispatch.interpreted(), reason="Triton's interpreter launches nothing in this process"
    ),
]
# What launches nothing, besides views.
IDLE = ("empty", "empty_like", "new_empty", "_unsafe_view", "promote_types")
SMALL = {"B": 128, "R": 10_000, "k": 10}
LARGE = {"B": 8192, "R": 65_536, "k": 64}  # too many slots to rank
Run = Callable[[], Any]  # returns what it hands out


Prepare = Callable[[], Run]  # what it does itself is not counted


class Pin(NamedTuple):
    prepare: Prepare
    launches: str  # in order
    allocations: int


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


def new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def code(B: int, R: int, k: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Any:
    return new(B, k, dtype=dtype, grad=grad), new(B, k, dtype=torch.int64)


def of(op: Callable[..., Any], *args: Any, **options: Any) -> Prepare:
    return lambda: lambda: op(*args, **options)


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> Run:
    slopes = [torch.empty_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, slopes)


def decoder(
    needs: str = "vwb", C: int = 256, dtype: torch.dtype = torch.float32, **shape: int
) -> Prepare:
    """The backward of sparse_linear, for v(alues), w(eight) and b(ias)."""

    def prepare() -> Run:
        values, indices = code(**shape, dtype=dtype, grad="v" in needs)
        weight = new(shape["R"], C, dtype=dtype, grad="w" in needs)
        bias = new(C, dtype=dtype, grad=True) if "b" in needs else None
        out = ours.sparse_linear(values, indices, weight, bias)
        return gradients(
            [out], [t for t in (values, weight, bias) if t is not None and t.requires_grad]
        )

    return prepare


def encoder(needs: str = "xwb", parts: str = "values", **shape: int) -> Prepare:
    """The backward of linear_topk, for x, w(eight) and b(ias)."""

    def prepare() -> Run:
        B, R = shape["B"], shape["R"]
        leaves = [
            new(*size, grad=name in needs)
            for name, size in (("x", (B, 256)), ("w", (R, 256)), ("b", (R,)))
        ]
        out = ours.linear_topk(*leaves[:2], shape["k"], leaves[2], threshold=True)
        outputs = [getattr(out, part) for part in parts.split()]
        return gradients(outputs, [leaf for leaf in leaves if leaf.requires_grad])

    return prepare


def encode(
    dtype: torch.dtype = torch.float32, grad: bool = False, backward: bool = False,
    threshold: bool = False, **shape: int,
) -> Prepare:  # fmt: skip
    """linear_topk, and its backward to x, weight and bias."""

    def prepare() -> Run:
        B, R = shape["B"], shape["R"]
        leaves = [new(*size, dtype=dtype, grad=grad) for size in ((B, 256), (R, 256), (R,))]
        slopes, counts = new(B, shape["k"], dtype=dtype), new(R, dtype=torch.int64)

        def run() -> Any:
            x, weight, bias = leaves
            out = ours.linear_topk(x, weight, shape["k"], bias, threshold=threshold, counts=counts)
            return out, torch.autograd.grad(out.values, leaves, slopes) if backward else None

        return run

    return prepare


def inhibit(grad: bool, dtype: torch.dtype = torch.float32) -> Prepare:
    x, weight, gaba = new(128, 256, dtype=dtype), new(10_000, 256, dtype=dtype), new(10_000)
    return of(ours.linear_inhibit, x.requires_grad_(grad), weight, 10, gaba)


def both(**shape: int) -> Prepare:
    """The backward of a decoder and its encoder."""

    def prepare() -> Run:
        leaves = [new(shape["R"], 256, grad=True) for _ in range(2)]
        hidden = ours.linear_topk(new(shape["B"], 256), leaves[0], shape["k"])
        return gradients([ours.sparse_linear(hidden.values, hidden.indices, leaves[1])], leaves)

    return prepare


def update(*widths: int, S: int = 1, **shape: int) -> Prepare:
    values, indices = code(**shape)
    rates = new(S) if S > 1 else 0.1
    return of(
        ours.row_update,
        [new(shape["R"], width) for width in widths],
        [values] * len(widths),
        [new(shape["B"], width) for width in widths],
        indices,
        lr=rates,
        max_norm=rates,
        normalize=[True] * len(widths),
        blocks=S,
    )


def distilled(teacher: bool = True, each: bool = False) -> Prepare:
    """distill of [128, 10]; each: settings, and a weight, of each sample."""
    logits, labels = new(128, 10), new(128, dtype=torch.int64)
    terms = [new(128, 10) for _ in range(3)] if teacher else [None, logits, logits]
    names = ("alpha", "lam", "temperature", "weight")
    options = {name: new(128) for name in names} if each else {"alpha": 0.5, "lam": 0.5}
    return of(distill, logits, labels, *terms, **options)


def decoded(teacher: bool = True, each: bool = False) -> Prepare:
    """distill_code of [128, 10]; each: settings, and a weight, of each sample."""
    positions = new(10_000, dtype=torch.int64)
    names = ("alpha", "lam", "temperature", "weight")
    options = {name: new(128) for name in names} if each else {"alpha": 0.5, "lam": 0.5}
    targets = [new(128, 10), new(128, 10)] if teacher else []
    return of(
        distill_code, *code(**SMALL), new(10_000, 10), new(128, dtype=torch.int64), *targets,
        positions=positions, **options,
    )  # fmt: skip


def count(**options: Any) -> Prepare:
    return of(ours.count_active, *code(**SMALL), new(10_000, dtype=torch.int64), **options)


def batch(S: int = 10, B: int = 128) -> Prepare:
    """draw_batch with all that it draws."""
    stored, longs = S * 6000, {"dtype": torch.int64}
    targets = new(stored, 10), new(stored, 200), new(S * 10_000, **longs), new(S)
    order, samples, position = new(S, 6000, **longs), new(S, **longs), new(**longs)
    return of(draw_batch, new(stored, 256), new(stored, **longs), order, samples, position, B,
              *targets)  # fmt: skip


def dense(S: int = 10) -> Prepare:
    weights, gradients = ([new(S * 10_000, width) for width in (256, 10)] for _ in range(2))
    samples = new(S, dtype=torch.int64)
    return of(dense_update, weights, gradients, lr=new(S), max_norm=new(S), samples=samples,
              normalize=[True, False], blocks=S)  # fmt: skip


def tallied(S: int = 10, B: int = 128) -> Prepare:
    rows, longs = S * B, {"dtype": torch.int64}
    sums = new(S, dtype=torch.float64), new(S, **longs), new(S, **longs), new(**longs)
    crowded = new(rows, dtype=torch.bool), new(S, dtype=torch.bool)
    given = new(rows), new(rows, 10), new(rows, **longs), new(rows)
    return of(tally, *given, *sums, *crowded)


BF16 = torch.bfloat16
RANKED = "_rank_kernel"
ENCODE = "_keys_kernel _code_kernel"
SORTED = "_to_copy sort _offsets_kernel"  # _to_copy: to keys of fewer bits
PINS = {
    "topk": Pin(of(ours.topk, new(8192, 10_000), 10), "_select_kernel", 1),
    "topk of few rows": Pin(
        of(ours.topk, new(128, 10_000), 10), "_select_kernel _select_kernel", 4
    ),
    "count_active": Pin(count(), "_count_kernel", 0),
    "count_active stamp": Pin(
        count(last_active=new(10_000, dtype=torch.int64), step=3), "_count_kernel", 0
    ),
    "distill": Pin(distilled(), "_distill_kernel", 0),
    "distill each": Pin(distilled(each=True), "_distill_kernel", 0),
    "distill labels": Pin(distilled(teacher=False), "_distill_kernel", 0),
    "distill_code": Pin(decoded(), "_distill_code_kernel", 0),
    "distill_code each": Pin(decoded(each=True), "_distill_code_kernel", 0),
    "distill_code labels": Pin(decoded(teacher=False, each=True), "_distill_code_kernel", 0),
    "sparse_linear": Pin(
        of(ours.sparse_linear, *code(**SMALL), new(10_000, 256), new(256)), "_gather_kernel", 0
    ),
    "sparse_linear backward": Pin(decoder(**SMALL), f"{RANKED} segment_kernel sum", 1),
    "sparse_linear backward to values": Pin(decoder("v", **SMALL), f"{RANKED} segment_kernel", 1),
    "sparse_linear backward to weight": Pin(decoder("w", **SMALL), f"{RANKED} segment_kernel", 1),
    "sparse_linear backward to bias": Pin(decoder("b", **SMALL), "sum", 0),
    "sparse_linear backward large": Pin(decoder(**LARGE), f"{SORTED} segment_kernel sum", 4),
    # A row of two tiles: their products are added up.
    "sparse_linear backward wide": Pin(
        decoder(C=4096, dtype=BF16, **LARGE), f"{SORTED} segment_kernel sum _to_copy sum", 7
    ),
    "linear_topk": Pin(encode(threshold=True, **SMALL), f"_halve_kernel {ENCODE}", 2),
    "linear_topk in 16 bits": Pin(encode(BF16, threshold=True, **SMALL), ENCODE, 2),
    "linear_topk with gradients": Pin(
        encode(grad=True, threshold=True, **SMALL), f"_halve_kernel {ENCODE}", 2
    ),
    "linear_topk both ways": Pin(
        encode(grad=True, backward=True, threshold=True, **SMALL),
        f"_halve_kernel {ENCODE} _gather_kernel {RANKED} segment_kernel",
        3,
    ),
    # Two blocks of rows.
    "linear_topk both ways, large": Pin(
        encode(grad=True, backward=True, threshold=True, **LARGE),
        f"_halve_kernel {ENCODE} {ENCODE} _gather_kernel {SORTED} segment_kernel",
        6,
    ),
    "linear_inhibit": Pin(
        inhibit(False), "mm _select_kernel _select_kernel _inhibit_kernel", 6
    ),
    "linear_inhibit with gradients": Pin(
        inhibit(True), "mm _select_kernel _select_kernel _inhibit_kernel", 7
    ),
    "linear_code": Pin(
        of(linear_code, new(128, 256), new(10_000, 256), 10, 40, new(10_000)),
        "_halve_kernel _keys_kernel _graded_kernel",
        1,
    ),
    "linear_topk backward": Pin(encoder(**SMALL), f"_gather_kernel {RANKED} segment_kernel", 1),
    "linear_topk backward to x": Pin(encoder("x", **SMALL), "_gather_kernel", 0),
    "linear_topk backward to weight": Pin(encoder("w", **SMALL), f"{RANKED} segment_kernel", 1),
    "linear_topk backward to bias": Pin(encoder("b", **SMALL), f"{RANKED} segment_kernel", 1),
    "linear_topk backward large": Pin(
        encoder(**LARGE), f"_gather_kernel {SORTED} segment_kernel", 4
    ),
    "linear_topk backward of threshold": Pin(
        encoder(parts="threshold", **SMALL), f"_gather_kernel {RANKED} segment_kernel", 1
    ),
    "linear_topk backward of values and threshold": Pin(
        encoder(parts="values threshold", **SMALL),
        f"cat cat cat _gather_kernel {RANKED} segment_kernel",
        4,
    ),
    "decoder and encoder backward": Pin(
        both(**SMALL), f"{RANKED} segment_kernel segment_kernel", 2
    ),
    "decoder and encoder backward large": Pin(
        both(**LARGE), f"{SORTED} segment_kernel segment_kernel", 5
    ),
    "row_update": Pin(update(256, **SMALL), f"{RANKED} segment_kernel sum _apply_kernel", 5),
    "row_update of two": Pin(
        update(256, 10, **SMALL),
        f"{RANKED} segment_kernel segment_kernel sum _apply_kernel _apply_kernel",
        6,
    ),
    "row_update of ten networks": Pin(
        update(256, 10, S=10, B=1280, R=10_000, k=10),
        f"{RANKED} segment_kernel segment_kernel sum _apply_kernel _apply_kernel",
        6,
    ),
    "gate_gradient": Pin(
        of(gate_gradient, new(1280, 1000), new(1280, 1000), new(1280, 20),
           new(10_000, dtype=torch.int64)),
        "_gate_kernel", 0,
    ),
    "dense_update": Pin(
        dense(), "_squares_kernel _dense_apply_kernel _dense_apply_kernel", 1
    ),
    "draw_batch": Pin(batch(), "_draw_kernel", 0),
    "tally": Pin(tallied(), "_tally_kernel", 0),
    "row_update large": Pin(
        update(1024, **LARGE), f"{SORTED} segment_kernel sum _apply_kernel", 8
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PINS)
def test_launches_and_allocations(name: str) -> None:
    prepare, expected, allocations = PINS[name]
    assert counted(prepare) == (expected.split(), allocations)


def test_counting() -> None:
    rows = new(4, 3)

    def run() -> Tensor:
        kept = rows.t().contiguous()[1:]  # a copy, of which a view is handed out
        rows.add_(torch.empty_like(rows))
        rows.sum().sqrt()
        return kept

    assert counted(lambda: run) == (["clone", "add_", "sum", "sqrt"], 3)
