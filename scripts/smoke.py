"""Runs every op and every implementation on small shapes against the specification in fp64.

    python scripts/smoke.py [--quick]     one line a case: ok, how wrong, or what was raised

A failure does not end it; if the GPU no longer answers, a new process runs the rest. --quick takes
fp32 alone, as compute-sanitizer needs it. Without a GPU the implementations for a CPU run, and with
TRITON_INTERPRET=1 Triton's too. Exit status: 1 if a case failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

import ssd_kernels as ours
from ssd.cli import ArgumentParser, exit_status
from ssd.ops.batch import draw_batch, tally
from ssd.ops.code_gram import code_gram
from ssd.ops.dense_update import dense_update
from ssd.ops.distill import distill
from ssd.ops.distill_code import distill_code
from ssd.ops.gate_gradient import gate_gradient
from ssd_kernels import _dispatch
from ssd_kernels._graded_code import linear_active, linear_code
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.linear_inhibit import linear_inhibit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Odd on purpose: [B, d] x [R, d], and a row that is a whole number of no tile.
B, D, R, K, C = 5, 24, 517, 7, 13
MANY, UNALIGNED = 130, 23  # a batch that takes the large tiles; rows of no whole 16 bytes
S = 2  # networks
# Largest error of a result over its largest entry: a few roundings of the dtype.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
Results = tuple[Tensor | None, ...]
Draw = Callable[..., Tensor]


class Case(NamedTuple):
    """run(impl, draw) -> results; draw(sizes) gives a normal tensor of the case's dtype."""

    op: str
    name: str
    run: Callable[[str, Draw], Results]
    half: bool = True  # whether 16-bit inputs are tried


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fp32 alone")
    begun = {"nargs": 2, "type": int, "default": (0, 0), "help": argparse.SUPPRESS}
    parser.add_argument("--from", dest="begun", metavar=("DONE", "WRONG"), **begun)
    given = parser.parse_args(arguments)
    quick, (skip, wrong) = given.quick, given.begun
    if skip and DEVICE.type != "cuda":
        print(f"cuda: the device is gone; {wrong} wrong of {skip}")
        return 1
    for number, (case, impl, dtype) in enumerate(_cases(quick)):
        if number < skip:
            continue
        start = time.perf_counter()
        found = _attempt(case, impl, dtype)
        seconds = time.perf_counter() - start
        title = f"{case.op + case.name:32} {impl:10} {str(dtype)[6:]:9}"
        print(f"{title} {seconds:5.1f} s  {found or 'ok'}", flush=True)
        wrong += bool(found)
        if not _answers():
            print("the GPU no longer answers: the rest runs in a new process", flush=True)
            again = [*["--quick"] * quick, "--from", str(number + 1), str(wrong)]
            os.execv(sys.executable, [sys.executable, __file__, *again])
    print(f"{DEVICE}: {wrong} wrong of {number + 1}")
    return 1 if wrong else 0


def _cases(quick: bool) -> Iterator[tuple[Case, str, torch.dtype]]:
    """What is run here: case, implementation, dtype."""
    interpreted, cpu = _dispatch.interpreted(), DEVICE.type == "cpu"
    runs_triton = interpreted or not cpu
    runs = {"reference": False, "torch": True, "triton": runs_triton, "numba": cpu}
    for case in CASES:
        for impl in filter(runs.get, _dispatch.TABLES[case.op]):
            dtypes = [torch.float32]
            if not quick and case.half and runs_triton and impl != "numba":
                dtypes.append(torch.float16)
                if not interpreted:  # the interpreter has no bfloat16
                    dtypes.append(torch.bfloat16)
            for dtype in dtypes:
                yield case, impl, dtype


def _attempt(case: Case, impl: str, dtype: torch.dtype) -> str:
    """ "" if every result is the specification's, else what is wrong."""
    try:
        got, true = (_run(case, name, dtype) for name in (impl, "reference"))
        pairs = enumerate(zip(got, true, strict=True))
        return "; ".join(filter(None, (_wrong(*pair) for pair in pairs)))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = " | ".join(lines[:1] + lines[1:][-3:])
        return f"{type(error).__name__}: {said[:600]} ({Path(where.filename).name}:{where.lineno})"


def _run(case: Case, impl: str, dtype: torch.dtype) -> Results:
    """The reference computes in fp64 on the same, rounded inputs."""
    torch.manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        drawn = torch.randn(*sizes).to(dtype)
        return (drawn.double() if impl == "reference" else drawn).to(DEVICE)

    return case.run(impl, draw)


def _wrong(number: int, pair: tuple[Tensor | None, Tensor | None]) -> str:
    got, true = pair
    if got is None or true is None:
        return "" if got is true else f"result {number} is {got}, expected {true}"
    if got.shape != true.shape:
        return f"result {number} has shape {list(got.shape)}, expected {list(true.shape)}"
    if not got.dtype.is_floating_point:
        return "" if torch.equal(got, true) else f"result {number}: integers differ"
    scale = true.abs().max().clamp(min=1e-30)
    error = ((got.double() - true).abs().max() / scale).item()
    return "" if error <= TOLERANCE[got.dtype] else f"result {number} is off by {error:.2g}"


def _answers() -> bool:
    if DEVICE.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
    return True


def _counts(neurons: int = R) -> Tensor:
    return torch.zeros(neurons, dtype=torch.int64, device=DEVICE)


def _ramp(low: float, like: Tensor) -> Tensor:
    """[R] from low to 1, exact in every dtype."""
    return torch.linspace(low, 1, R).bfloat16().to(like.device, like.dtype)


def _leaves(draw: Draw, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [draw(*size).requires_grad_() for size in sizes]


def _topk(impl: str, draw: Draw) -> Results:
    scores = draw(B, R)
    boost = draw(R)
    mask = torch.rand(R, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    return *ours.topk(scores, K, impl=impl)[:2], *ours.topk(scores.round(), K, impl=impl)[:2], \
        ours.topk(scores, K, boost=boost, mask=mask, impl=impl)[1]  # fmt: skip


def _topk_parts(impl: str, draw: Draw) -> Results:
    return ours.topk(draw(2, 40_003), 64, impl=impl)[:2]


def _linear_topk(impl: str, draw: Draw) -> Results:
    leaves, counts = _leaves(draw, (B, D), (R, D), (R,)), _counts()
    x, weight, bias = leaves
    values, indices, cut, _ = ours.linear_topk(
        x, weight, K, bias, inhibition="subtract", threshold=True, counts=counts, impl=impl
    )
    assert cut is not None
    loss = values.float().square().sum() + cut.float().sum()
    return values, indices, cut, counts, *torch.autograd.grad(loss, leaves)


def _linear_topk_forward(impl: str, draw: Draw, batch: int, d: int, blocks: int = 1) -> Results:
    x, weight, bias = draw(blocks * batch, d), draw(blocks * R, d), draw(blocks * R)
    return ours.linear_topk(x, weight, K, bias, blocks=blocks, impl=impl)[:2]


def _linear_inhibit(impl: str, draw: Draw) -> Results:
    leaves, counts = _leaves(draw, (B, D), (R, D), (R,)), _counts()
    x, weight, bias = leaves
    gaba = _ramp(-1, x)
    hidden = linear_inhibit(x, weight, K, gaba, bias, counts=counts, impl=impl)
    return hidden, counts, *torch.autograd.grad(hidden.float().square().sum(), leaves)


def _linear_code(impl: str, draw: Draw, batch: int = B, blocks: int = 1) -> Results:
    rows, neurons = blocks * batch, blocks * R
    x, weight, counts = draw(rows, D).abs(), draw(neurons, D).abs(), _counts(neurons)
    gaba = _ramp(0.9, x).repeat(blocks)
    code, wider = linear_code(x, weight, K, 4 * K, gaba, counts=counts, blocks=blocks, impl=impl)
    # Slots of value 0 are padding, whatever their index.
    dense = code.values.new_zeros(rows, neurons).scatter_add_(1, code.indices, code.values)
    return dense, wider, counts


def _linear_active(impl: str, draw: Draw, least: float = 0.9, blocks: int = 1) -> Results:
    x, weight, counts = draw(blocks * B, D), draw(blocks * R, D), _counts(blocks * R)
    given = {"counts": counts, "every": True, "blocks": blocks, "impl": impl}
    active = linear_active(x, weight, K, _ramp(least, x).repeat(blocks), **given)
    return active.values, active.gate > 0, counts


def _code(draw: Draw) -> tuple[Tensor, Tensor]:
    values = draw(B, K)
    generator = torch.Generator().manual_seed(2)
    indices = torch.stack([torch.randperm(R, generator=generator)[:K] for _ in range(B)])
    indices[1] = indices[0]  # neurons of several slots
    return values, indices.to(DEVICE)


def _sparse_linear(impl: str, draw: Draw) -> Results:
    values, indices = _code(draw)
    leaves = [values.requires_grad_(), *_leaves(draw, (R, C), (C,))]
    out = ours.sparse_linear(values, indices, *leaves[1:], impl=impl)
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)


def _row_gradient(impl: str, draw: Draw) -> Results:
    values, indices = _code(draw)
    return (row_gradient(values, draw(B, D), indices, R, impl=impl),)


def _count_active(impl: str, draw: Draw) -> Results:
    values, indices = _code(draw)
    counts, last = _counts(), _counts()
    ours.count_active(values, indices, counts, last, 3, impl=impl)
    return counts, last


def _code_gram(impl: str, draw: Draw) -> Results:
    values, indices = _code(draw)
    gram, cross = values.new_zeros(R, R), values.new_zeros(2, R, C)
    labels = torch.arange(B, device=DEVICE) % C
    code_gram(values, indices, gram, cross[0], labels, impl=impl)
    code_gram(values, indices, gram, cross[1], draw(B, C), impl=impl)
    return gram, cross


def _distill(impl: str, draw: Draw) -> Results:
    labels = torch.arange(B, device=DEVICE) % C
    return distill(
        draw(B, C), labels, draw(B, C), draw(B, K).relu(), draw(B, K).relu(),
        alpha=0.6, lam=0.3, temperature=2.0, weight=draw(B).abs(), impl=impl,
    )  # fmt: skip


def _draw_batch(impl: str, draw: Draw) -> Results:
    stored, order = S * B, torch.arange(S * B, device=DEVICE).flip(0).view(S, B) % B
    samples, position = torch.tensor([B, 4], device=DEVICE), torch.tensor(1, device=DEVICE)
    anneal = torch.tensor([R, 2 * R], device=DEVICE)
    labels, counts = torch.arange(stored, device=DEVICE), torch.arange(S * R, device=DEVICE)
    return draw_batch(
        draw(stored, D), labels, order, samples, position, 3, draw(stored, C), draw(stored, K),
        counts, anneal, impl=impl,
    )  # fmt: skip


def _dense_update(impl: str, draw: Draw) -> Results:
    weights, gradients, buffers = ([draw(S * R, D), draw(S * R, C)] for _ in range(3))
    samples, rates = torch.tensor([0, 3], device=DEVICE), torch.tensor([0.1, 0.2], device=DEVICE)
    dense_update(
        weights, gradients, lr=rates, max_norm=1.0, nonnegative=True, normalize=[True, False],
        momentum=0.9, buffers=buffers, samples=samples, blocks=S, impl=impl,
    )  # fmt: skip
    return *weights, *buffers


def _gate_gradient(impl: str, draw: Draw) -> Results:
    gradients, gate, slopes = [draw(S * B, R) for _ in range(2)], draw(S * B, R), draw(S * B, K)
    positions = (torch.arange(S * R, device=DEVICE) % R).clamp(max=K)
    gate_gradient(gradients[0], gate, slopes, positions, impl=impl)
    gate_gradient(gradients[1], gate > 0, slopes, positions, gated=False, impl=impl)
    return tuple(gradients)


def _tally(impl: str, draw: Draw) -> Results:
    logits, weight = draw(S * MANY, C), draw(S * MANY)
    labels = torch.arange(S * MANY, device=DEVICE) % C
    sums = torch.zeros(S, dtype=torch.float64, device=DEVICE), _counts(S), _counts(S), _counts(1)[0]
    crowded = weight > 1, torch.zeros(S, dtype=torch.bool, device=DEVICE)
    tally(weight, logits, labels, weight, *sums, *crowded, impl=impl)
    return sums[0].float(), *sums[1:], crowded[1]


def _distill_code(impl: str, draw: Draw) -> Results:
    values, indices = _code(draw)
    return distill_code(
        values, indices, draw(R, C), torch.arange(B, device=DEVICE) % C, draw(B, C),
        draw(B, K).relu(), positions=torch.arange(R, device=DEVICE).clamp(max=K),
        alpha=0.6, lam=0.3, temperature=2.0, weight=draw(B).abs(), impl=impl,
    )  # fmt: skip


def _row_update(impl: str, draw: Draw) -> Results:
    coefficients, indices = _code(draw)
    weights, buffers = ([draw(R, D), draw(R, C)] for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "max_norm": 1.0, "nonnegative": True, "impl": impl}
    norm = ours.row_update(
        weights, [coefficients, 2 * coefficients], [draw(B, D), draw(B, C)], indices,
        normalize=[True, False], momentum=0.9, buffers=buffers, **options,
    )  # fmt: skip
    return norm, *weights, *buffers


def _row_update_plain(impl: str, draw: Draw, blocks: int = 1) -> Results:
    """Without momentum; the samples of a network follow one another, as its neurons do."""
    codes = [_code(draw) for _ in range(blocks)]
    coefficients = torch.cat([values for values, _ in codes])
    indices = torch.cat([own + number * R for number, (_, own) in enumerate(codes)])
    weights = [draw(blocks * R, D), draw(blocks * R, C)]
    rates = 0.1 if blocks == 1 else torch.linspace(0.1, 0.2, blocks).to(coefficients)
    norm = ours.row_update(
        weights, [coefficients, 2 * coefficients], [draw(blocks * B, D), draw(blocks * B, C)],
        indices, lr=rates, max_norm=1.0, nonnegative=True, normalize=[True, False],
        blocks=blocks, impl=impl,
    )  # fmt: skip
    return norm, *weights


CASES = [
    Case("topk", "", _topk),
    Case("topk", " in parts", _topk_parts),
    Case("linear_topk", "", _linear_topk),
    Case("linear_topk", " large", partial(_linear_topk_forward, batch=MANY, d=D)),
    Case(
        "linear_topk", " large, unaligned", partial(_linear_topk_forward, batch=MANY, d=UNALIGNED)
    ),
    Case("linear_topk", " of networks", partial(_linear_topk_forward, batch=B, d=D, blocks=S)),
    Case(
        "linear_topk",
        " of networks, large",
        partial(_linear_topk_forward, batch=MANY, d=D, blocks=S),
    ),
    Case("linear_inhibit", "", _linear_inhibit),
    Case("linear_code", "", _linear_code, half=False),
    Case("linear_code", " large", partial(_linear_code, batch=MANY), half=False),
    Case("linear_code", " of networks", partial(_linear_code, blocks=S), half=False),
    Case("linear_active", "", _linear_active, half=False),
    Case(
        "linear_active",
        " of networks, excited",
        partial(_linear_active, least=-1, blocks=S),
        half=False,
    ),
    Case("sparse_linear", "", _sparse_linear),
    Case("row_gradient", "", _row_gradient),
    Case("count_active", "", _count_active),
    Case("code_gram", "", _code_gram, half=False),
    Case("distill", "", _distill, half=False),
    Case("dense_update", "", _dense_update, half=False),
    Case("draw_batch", "", _draw_batch, half=False),
    Case("gate_gradient", "", _gate_gradient, half=False),
    Case("tally", "", _tally, half=False),
    Case("distill_code", "", _distill_code, half=False),
    Case("row_update", "", _row_update, half=False),
    Case("row_update", " plain", _row_update_plain, half=False),
    Case("row_update", " of networks", partial(_row_update_plain, blocks=S), half=False),
]


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
