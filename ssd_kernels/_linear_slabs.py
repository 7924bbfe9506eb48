"""Launches of linear_topk and linear_inhibit: slab by slab of rows, scores, then selection.

Rescoring is exact. With e the bf16 estimate and s the fp32 score of neuron j in row b,
|e - s| <= E = c |x_b| max|w|: rounding to bf16 changes each operand by at most 2^-8 of it, hence
each product by 2^-7 + 2^-16 of it, and by Cauchy-Schwarz the products sum to at most |x_b| |w_j| in
absolute value; fp32 accumulation adds d 2^-22 of that (4 ulp a term: tensor cores truncate) to
each of e and s. k+1 groups have a maximum >= M, so k+1 neurons have s >= M - E, and a neuron with
e < M - 2 E has s < M - E: it is none of the k+1 largest. Flushed subnormals and the bias' rounding
have terms of their own. A row with more candidates than places, or a bound that is no number,
gets all its fp32 scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssd_kernels import _dispatch, _op, _tuning
from ssd_kernels._linear_topk_kernels import (
    GROUP,
    _decide_kernel,
    _filter_kernel,
    _inhibit_kernel,
    _maxima_kernel,
    _recover_kernel,
    _rescore_kernel,
    _score_kernel,
)
from ssd_kernels.topk import MAX_K, select_triton

PATHS = ("fused", "chunked", "rescore")
# A slab should stay in L2; where rows are too long for that, it takes a share of the logits.
L2_BYTES = 32 * 2**20
MEMORY_SHARE = 0.045
# Group maxima that one program of the selecting kernels can hold.
MAX_GROUPS = 8192
RESCORE_GROUPS = 4096  # of the filter, which also holds the members of the groups it keeps
MIXED_MM = "dtype" in torch.ops.aten.mm.overloads()  # 16-bit inputs, fp32 result
RECOVER_PARTS = 8
MAX_NETWORKS = 65_535  # of a slab: programs along axis 1 of a grid


def possible(path: str, x: Tensor, neurons: int, k: int) -> bool:
    """Whether the kernels serve these inputs on this path."""
    if k >= MAX_K or x.dtype not in _dispatch.TRITON_DTYPES:
        return False
    if path == "rescore":
        return x.dtype == torch.float32 and rescorable(neurons, k)
    return path == "fused" or x.dtype == torch.float32 or MIXED_MM


def rescorable(neurons: int, k: int) -> bool:
    return k < _groups(neurons) <= RESCORE_GROUPS and 2 * (k + 1) * GROUP <= 8192


def _code_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
    return (
        x.new_empty(x.shape[0], k),
        indices,
        x.new_empty(x.shape[0]),
        indices.new_empty(x.shape[0]),
    )


@_op.operator("ssd_kernels::linear_topk", _code_like, mutates=("counts",))
def code(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    inhibition: str,
    counts: Tensor | None,
    path: str,
    blocks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices [B, k], the (k+1)-th activation [B] and its index [B] (k = R: 0 and any)."""
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    batch = len(x)
    values = x.new_empty(batch, k)
    indices = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    after = indices.new_zeros(batch)
    cut = x.new_empty(batch)
    scores = Scores(x, weight, bias, k, path, blocks)
    for slab in scores.slabs():
        scores.decide(slab, cut, values, indices, after, counts, inhibition == "subtract")
    return values, indices, cut, after


def _inhibit_like(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    counts: Tensor | None,
    need_passes: bool,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    hidden = x.new_empty(x.shape[0], weight.shape[0] // blocks)
    return hidden, x.new_empty(hidden.shape if need_passes else 0, dtype=torch.int8)


@_op.operator("ssd_kernels::linear_inhibit", _inhibit_like, mutates=("counts",))
def inhibit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    gaba: Tensor | None,
    inhibition: str,
    counts: Tensor | None,
    need_passes: bool,
    blocks: int,
) -> tuple[Tensor, Tensor]:
    """The dense activations [B, R] and, if needed, int8 [B, R]: where the gradient passes."""
    x, weight = _rows_contiguous(x), _rows_contiguous(weight)
    neurons = len(weight) // blocks
    hidden = x.new_empty(len(x), neurons)
    passes = torch.empty(hidden.shape if need_passes else 0, dtype=torch.int8, device=x.device)
    cut = torch.empty(len(x), dtype=torch.float32, device=x.device)
    scores = Scores(x, weight, bias, k, "fused", blocks)
    gaba = None if gaba is None else gaba.detach().contiguous()
    chosen = _tuning.config("linear_inhibit", x.device)
    tiles = _ceil_div(neurons, chosen["BN"])
    for slab in scores.slabs():
        scores.decide(slab, cut)
        programs = tiles * _ceil_div(slab.of_each, chosen["BM"])
        with torch.cuda.device_of(x):
            _inhibit_kernel[(programs, slab.networks)](
                scores.slab,
                scores.bias,
                x if gaba is None else gaba,
                cut[slab.rows],
                hidden[slab.rows],
                passes[slab.rows] if need_passes else passes,
                scores.held if counts is None else counts,
                slab.first,
                slab.of_each,
                neurons,
                tiles,
                1 if counts is None else counts.stride(0),
                BIAS=bias is not None,
                GABA=gaba is not None,
                SUBTRACT=inhibition == "subtract",
                COUNT=counts is not None,
                PASSES=need_passes,
                **chosen,
            )
    return hidden, passes


class Slab(NamedTuple):
    """Rows of the batch that are worked on together."""

    rows: slice
    first: int  # the network of the first row
    networks: int  # whose rows follow one another
    of_each: int  # rows


class Scores:
    """The slab of scores, their group maxima, and the kernels that read them.

    x: [S B, d]. weight: [S R, d]. bias: [S R] or None; S = blocks.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, path: str, blocks: int = 1
    ) -> None:
        self.x, self.weight, self.k, self.path, self.blocks = x, weight, k, path, blocks
        self.neurons = len(weight) // blocks
        self.bias = x if bias is None else bias.detach().contiguous()
        self.has_bias = bias is not None
        self.best = min(k + 1, self.neurons)
        self.groups = _groups(self.neurons)
        self.picks = min(self.best, self.groups)
        self.rows = slab_rows(len(x), self.neurons, x.element_size())
        device = x.device
        self.slab = torch.empty(self.rows, self.neurons, dtype=torch.float32, device=device)
        self.maxima = torch.empty(self.rows, self.groups, dtype=torch.int32, device=device)
        self.candidates = max(128, 4 * _power(self.best)) if path == "rescore" else 1
        self.listed = self.maxima.new_empty(self.rows, self.candidates)
        self.rescored = self.slab.new_empty(self.rows, self.candidates)
        self.held = self.maxima.new_empty(self.rows)
        if path == "rescore":
            self.estimate_x, self.estimate_weight = _bfloat16(x), _bfloat16(weight)
            self.slack = slack(x, weight, blocks)

    def slabs(self) -> list[Slab]:
        """Whole networks where the slab holds one, else parts of one."""
        batch = len(self.x) // self.blocks
        if batch == 0:
            return []
        held = min(self.rows // batch, MAX_NETWORKS)
        if held > 0:
            starts = range(0, self.blocks, held)
            networks = [(first, min(held, self.blocks - first)) for first in starts]
            return [
                Slab(slice(first * batch, (first + count) * batch), first, count, batch)
                for first, count in networks
            ]
        parts = [(start, min(self.rows, batch - start)) for start in range(0, batch, self.rows)]
        return [
            Slab(slice(first * batch + start, first * batch + start + size), first, 1, size)
            for first in range(self.blocks)
            for start, size in parts
        ]

    def fill(self, slab: Slab) -> None:
        """Scores without the bias, group maxima with it."""
        if self.path == "chunked":
            self._library(slab)
        elif self.path == "fused":
            self._product(slab, self.x, self.weight)
        else:
            self._product(slab, self.estimate_x, self.estimate_weight)
            self._rescore(slab)

    def _product(self, slab: Slab, x: Tensor, weight: Tensor) -> None:
        x = x[slab.rows]
        chosen = dict(_tuning.config(_product_op(x), x.device, batch=slab.of_each))
        tiles = _ceil_div(slab.of_each, chosen["BM"]) * _ceil_div(self.neurons, chosen["BN"])
        with torch.cuda.device_of(x):
            _score_kernel[(tiles, slab.networks)](
                x,
                weight,
                self.bias,
                self.slab,
                self.maxima,
                slab.first,
                slab.of_each,
                self.neurons,
                x.shape[1],
                self.groups,
                x.stride(0),
                weight.stride(0),
                BIAS=self.has_bias,
                PRECISION=_precision(x.dtype == torch.float32, torch.version.hip is not None),
                **chosen,
            )

    def _library(self, slab: Slab) -> None:
        # A product for each network, the one that it would have alone.
        inputs = self.x[slab.rows].split(slab.of_each)
        outputs = self.slab[: len(inputs) * slab.of_each].split(slab.of_each)
        weights = self.weight.split(self.neurons)[slab.first : slab.first + slab.networks]
        for x, weight, out in zip(inputs, weights, outputs, strict=True):
            if x.dtype == torch.float32:
                torch.mm(x, weight.T, out=out)
            elif x.is_cuda:
                torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
            else:  # Triton's interpreter
                torch.mm(x.float(), weight.float().T, out=out)
        tiles = _ceil_div(self.neurons, 1024)
        with torch.cuda.device_of(self.x):
            _maxima_kernel[(slab.of_each * tiles, slab.networks)](
                self.slab,
                self.bias,
                self.maxima,
                slab.first,
                self.neurons,
                self.groups,
                tiles,
                BIAS=self.has_bias,
                BN=1024,
                num_warps=4,
            )

    def _rescore(self, slab: Slab) -> None:
        features = self.x.shape[1]
        x = self.x[slab.rows]
        strides = (x.stride(0), self.weight.stride(0))
        picks = max(64, 2 * _power(self.best))
        picked = self.maxima.new_empty(len(x), picks)
        block = min(128, max(16, _power(features)))
        grid = (slab.of_each, slab.networks)
        with torch.cuda.device_of(x):
            _filter_kernel[grid](
                self.slab,
                self.bias,
                self.maxima,
                self.slack[slab.rows],
                picked,
                self.listed,
                self.held,
                slab.first,
                self.best,
                self.neurons,
                self.groups,
                BIAS=self.has_bias,
                GROUPS=_power(self.groups),
                PICKS=picks,
                CANDIDATES=self.candidates,
                num_warps=_warps(max(picks * GROUP, self.groups)),
            )
            _rescore_kernel[grid](
                x,
                self.weight,
                self.listed,
                self.held,
                self.rescored,
                slab.first,
                self.neurons,
                features,
                *strides,
                CANDIDATES=self.candidates,
                N=32,
                BK=block,
                num_warps=4,
            )
            _recover_kernel[(slab.of_each * RECOVER_PARTS, slab.networks)](
                x,
                self.weight,
                self.bias,
                self.held,
                self.slab,
                self.maxima,
                slab.first,
                self.neurons,
                features,
                self.groups,
                *strides,
                BIAS=self.has_bias,
                PARTS=RECOVER_PARTS,
                BK=block,
                num_warps=4,
            )

    def decide(
        self,
        slab: Slab,
        cut: Tensor,
        values: Tensor | None = None,
        indices: Tensor | None = None,
        after: Tensor | None = None,
        counts: Tensor | None = None,
        subtract: bool = False,
    ) -> None:
        """Writes the (k+1)-th activations to cut [B] and, if there are values, the code."""
        self.fill(slab)
        rows, size = slab.rows, slab.of_each * slab.networks
        pick = self.picks < self.groups <= MAX_GROUPS
        if pick:
            picked = self.maxima.new_empty(size, self.picks)
        elif self.picks == self.groups:
            picked = torch.arange(self.groups, dtype=torch.int32, device=self.x.device)
        else:
            keys = self.maxima[:size]
            bits = torch.where(keys < 0, -(2**31) - keys, keys)
            picked = select_triton(bits.view(torch.float32), self.picks)[1]
        listed = self.path == "rescore"
        members = max(_power(self.picks * GROUP), self.candidates)
        capacity = max(32, _power(self.best))
        scratch = torch.empty(size, capacity, dtype=torch.int64, device=self.x.device)
        with torch.cuda.device_of(self.x):
            _decide_kernel[(slab.of_each, slab.networks)](
                self.slab,
                self.bias,
                self.maxima,
                picked,
                self.listed,
                self.rescored,
                self.held,
                scratch,
                cut if values is None else values[rows],
                scratch if indices is None else indices[rows],
                scratch if after is None else after[rows],
                cut[rows],
                self.held if counts is None else counts,
                slab.first,
                self.k,
                self.best,
                self.neurons,
                self.groups,
                self.picks,
                picked.stride(0) if picked.dim() == 2 else 0,
                1 if counts is None else counts.stride(0),
                BIAS=self.has_bias,
                PICK=pick,
                LISTED=listed,
                CODE=values is not None,
                SUBTRACT=subtract,
                COUNT=counts is not None,
                GROUPS=_power(self.groups) if pick else 1,
                MEMBERS=members,
                CANDIDATES=self.candidates,
                CAPACITY=capacity,
                STEP=8,
                num_warps=_warps(max(members, self.groups if pick else 1) // 2),
            )


def slack(x: Tensor, weight: Tensor, blocks: int = 1) -> Tensor:
    """2 E of each row [S B], rounded up to fp32; see the proof above."""
    features = x.shape[1]
    share = 2.0**-7 + 2.0**-16 + 2 * features * 2.0**-22
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).view(blocks, -1)
    longest = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).view(blocks, -1)
    longest = longest.amax(1, keepdim=True)  # of each network
    subnormal = features**0.5 * 2.0**-124 * (length + longest + 1)
    return (2.001 * (share * length * longest + subnormal)).float().flatten()


def slab_rows(batch: int, neurons: int, element_size: int) -> int:
    """Rows of the slab: in L2 if it holds 128 of them, else a small share of the logits."""
    cached = L2_BYTES // (4 * neurons)
    share = int(MEMORY_SHARE * batch * element_size) // 4
    rows = max(128, cached, share)
    return min(max(batch, 1), rows // 64 * 64)


def _groups(neurons: int) -> int:
    return _ceil_div(neurons, GROUP)


def _product_op(x: Tensor) -> str:
    return "linear_topk_fp32" if x.dtype == torch.float32 else "linear_topk"


def _precision(single: bool, hip: bool) -> str:
    return "tf32x3" if single and not hip else "ieee"


def _bfloat16(x: Tensor) -> Tensor:
    # Triton's interpreter has no bfloat16; products of rounded values are exact in fp32 either way.
    return x.bfloat16().float() if _dispatch.interpreted() else x.bfloat16()


def _rows_contiguous(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(lanes: int) -> int:
    return min(8, max(1, _power(lanes) // 512))


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
