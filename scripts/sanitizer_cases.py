"""Every op and implementation once on small shapes, forward and backward, for compute-sanitizer.

    compute-sanitizer --tool memcheck python3 scripts/sanitizer_cases.py

Without a GPU it runs the plain PyTorch implementations, and with TRITON_INTERPRET=1 Triton's too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import ssd_kernels as ours
from benchmarks import gate
from benchmarks.common import CUDA_ONLY
from ssd_kernels import _dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Odd on purpose: [B, d] x [R, d], and a row that is a whole number of no tile.
B, D, R, K, C = 5, 24, 517, 7, 13
OPS = (
    "topk",
    "linear_topk",
    "linear_inhibit",
    "sparse_linear",
    "count_active",
    "code_gram",
    "row_update",
)
Results = tuple[Tensor, ...]


def main() -> int:
    wrong = 0
    for op in OPS:
        reference = _run(op, "reference")
        for impl in _implementations(op):
            torch.manual_seed(0)
            error = _compare(_run(op, impl), reference)
            print(f"{op:15} {impl:10} {error or 'ok'}", flush=True)
            wrong += bool(error)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{DEVICE}: {wrong} wrong")
    return 1 if wrong else 0


def _implementations(op: str) -> Iterator[str]:
    runs_triton = DEVICE.type == "cuda" or _dispatch.interpreted()
    for name in import_module(f"ssd_kernels.{op}").IMPLEMENTATIONS:
        if name == "reference":
            continue
        if name in CUDA_ONLY and not runs_triton:
            print(f"{op:15} {name:10} skipped: needs CUDA or TRITON_INTERPRET=1")
            continue
        yield name


def _run(op: str, impl: str) -> Results:
    torch.manual_seed(0)
    return CASES[op](impl)


def _normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, device=DEVICE)


def _compare(got: Results, true: Results) -> str:
    """ "" if every tensor is the reference's up to fp32 rounding."""
    for number, (mine, expected) in enumerate(zip(got, true, strict=True)):
        if mine.dtype == torch.int64:
            error = "" if torch.equal(mine, expected) else "integers differ"
        else:
            error = gate.close("values", mine.detach(), expected.detach().double())
        if error:
            return f"result {number}: {error}"
    return ""


def _topk(impl: str) -> Results:
    scores = _normal(B, R)
    boost, mask = torch.rand(R, device=DEVICE), torch.rand(R, device=DEVICE) > 0.3
    plain = ours.topk(scores, K, impl=impl)
    chosen = ours.topk(scores, K, boost=boost, mask=mask, impl=impl)
    return *plain[:2], *chosen[:2]


def _linear_topk(impl: str) -> Results:
    x, weight, bias = (_normal(*size).requires_grad_() for size in ((B, D), (R, D), (R,)))
    counts = torch.zeros(R, dtype=torch.int64, device=DEVICE)
    values, indices, cut, _ = ours.linear_topk(
        x, weight, K, bias, inhibition="subtract", threshold=True, counts=counts, impl=impl
    )
    assert cut is not None
    grads = torch.autograd.grad(values.square().sum() + cut.sum(), (x, weight, bias))
    return values, indices, cut, counts, *grads


def _linear_inhibit(impl: str) -> Results:
    x, weight, bias = (_normal(*size).requires_grad_() for size in ((B, D), (R, D), (R,)))
    gaba = torch.linspace(-1, 1, R, device=DEVICE)
    counts = torch.zeros(R, dtype=torch.int64, device=DEVICE)
    hidden = ours.linear_inhibit(x, weight, K, gaba, bias, counts=counts, impl=impl)
    grads = torch.autograd.grad(hidden.square().sum(), (x, weight, bias))
    return hidden, counts, *grads


def _code() -> tuple[Tensor, Tensor]:
    indices = torch.stack([torch.randperm(R)[:K] for _ in range(B)]).to(DEVICE)
    return _normal(B, K), indices


def _sparse_linear(impl: str) -> Results:
    values, indices = _code()
    values.requires_grad_()
    weight, bias = _normal(R, C).requires_grad_(), _normal(C).requires_grad_()
    out = ours.sparse_linear(values, indices, weight, bias, impl=impl)
    return out, *torch.autograd.grad(out.square().sum(), (values, weight, bias))


def _count_active(impl: str) -> Results:
    values, indices = _code()
    counts, last = (torch.zeros(R, dtype=torch.int64, device=DEVICE) for _ in range(2))
    ours.count_active(values, indices, counts, last, 3, impl=impl)
    return counts, last


def _code_gram(impl: str) -> Results:
    values, indices = _code()
    gram, cross = torch.zeros(R, R, device=DEVICE), torch.zeros(2, R, C, device=DEVICE)
    labels = torch.randint(C, (B,), device=DEVICE)
    ours.code_gram(values, indices, gram, cross[0], labels, impl=impl)
    ours.code_gram(values, indices, gram, cross[1], _normal(B, C), impl=impl)
    return gram, cross


def _row_update(impl: str) -> Results:
    coefficients, indices = _code()
    weights, buffers = [_normal(R, D), _normal(R, C)], [_normal(R, D), _normal(R, C)]
    norm = ours.row_update(
        weights,
        [coefficients, 2 * coefficients],
        [_normal(B, D), _normal(B, C)],
        indices,
        lr=0.1,
        max_norm=1.0,
        nonnegative=True,
        normalize=[True, False],
        momentum=0.9,
        buffers=buffers,
        impl=impl,
    )
    return norm, *weights, *buffers


CASES: dict[str, Callable[[str], Results]] = {
    "topk": _topk,
    "linear_topk": _linear_topk,
    "linear_inhibit": _linear_inhibit,
    "sparse_linear": _sparse_linear,
    "count_active": _count_active,
    "code_gram": _code_gram,
    "row_update": _row_update,
}


if __name__ == "__main__":
    sys.exit(main())
