"""Exact top-k with the neurons split over processes: sharded_topk, sharded_linear, ShardedTopKSAE.

Process r of w holds the rows that torch.tensor_split(weight, w)[r] gives, of encoder and decoder.
Everything else, such as x, the code, the output and the loss, is the same on every process, and so
is its gradient. Each process calls the same functions in the same order. reduce_activity serves
DistributedDataParallel, where processes split the samples instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ssd_kernels import _checks
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.sae import TopKSAE
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import topk


def sharded_topk(
    x: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    neurons: int,
    group: dist.ProcessGroup | None = None,
) -> TopKOutput:
    """linear_topk of a weight whose rows are split over processes; each returns the whole code.

    Args:
        x: [.., d] fp16, bf16, fp32 or fp64, the same on every process.
        weight: [rows of this process, d] in the dtype of x.
        k: neurons that stay active, 1..R.
        bias: [rows of this process] in the dtype of x, or None.
        neurons: R, of all processes.
        group: the processes; None: all.

    Returns:
        TopKOutput: values [.., k] >= 0, descending, and indices [.., k] int64 in 0..R-1. Ties go to
        the lower index, NaN is largest. Processes compare values in the dtype of x, so that
        16-bit ones tie where they round to the same. A slot of value 0 names a neuron that is
        inactive, but not always the one that linear_topk names.

    Raises:
        TypeError, ValueError: a dtype, shape, device or k that does not fit, before any work.
    """
    rows = _rows_of("sharded_topk", neurons, weight, group)
    _checks.active_range("sharded_topk", k, neurons)
    local = linear_topk(_Shared.apply(x, group), weight, min(k, len(rows)), bias)
    return _best(local.values, local.indices, rows, k, neurons, group)


def sharded_linear(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    neurons: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """sparse_linear of a weight whose rows are split over processes; each returns the whole sum.

    Args:
        values: [.., K] floating; indices: [.., K] int64 in 0..R-1; the same on every process.
        weight: [rows of this process, C].
        bias: [C] or None, the same on every process.
        neurons: R, of all processes.
        group: the processes; None: all.

    Returns:
        [.., C] in the dtype of weight.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, before any work.
    """
    rows = _rows_of("sharded_linear", neurons, weight, group)
    _checks.code("sharded_linear", values, indices, neurons)
    _checks.floating("sharded_linear", weight=weight, bias=bias)
    _checks.shape("sharded_linear", "bias", bias, (weight.shape[1],))
    own = (indices >= rows.start) & (indices < rows.stop)
    mine = torch.where(own, _Shared.apply(values, group), 0.0)
    # The slots of other processes are spread over our rows: no row gets all of them.
    part = sparse_linear(mine, (indices - rows.start) % len(rows), weight)
    out = _Sum.apply(part, group)
    return out if bias is None else out + bias.to(out.dtype)


class ShardedTopKSAE(TopKSAE):
    """A TopKSAE whose neurons are split over processes; each sees all samples.

    A process holds `rows`, a range of neuron numbers: encoder.weight and decoder.weight [rows, d],
    encoder.bias [rows]. decoder.bias, samples, counts [R] and last_active [R] are the same on every
    process, since each knows the whole code. Optimizers that work on one element or row at a time,
    such as SGD and Adam, need no change. A norm over all parameters does: clip with
    `torch.nn.utils.clip_grads_with_norm_(sae.parameters(), bound, sae.gradient_norm())`.

    Args:
        in_features: d.
        neurons: R, of all processes; at least one for each.
        k: neurons that stay active, 1..R.
        group: the processes; None: all.
        settings: dead_after, auxk, device and dtype, as in TopKSAE.

    forward: x [.., d], the same on every process -> SAEOutput, the same on every process.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        k: int,
        *,
        group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        name = type(self).__name__
        rows = _rows(name, neurons, group)
        _checks.active_range(name, k, neurons)
        self.group, self.rows = group, rows
        with _own_random(group):
            super().__init__(in_features, len(rows), k, **settings)
        self.neurons = neurons
        for activity in ("counts", "last_active"):
            self.register_buffer(activity, self.samples.new_zeros(neurons))

    def _checked_k(self, k: Any, neurons: int) -> Any:
        return k  # neurons are those of this process

    def reset_parameters(self) -> None:
        with _own_random(self.group):
            super().reset_parameters()

    def _largest(self, centered: Tensor, k: int) -> TopKOutput:
        weight, bias = self.encoder.weight, self.encoder.bias
        return sharded_topk(centered, weight, k, bias, neurons=self.neurons, group=self.group)

    def _sum(self, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.decoder.weight
        return sharded_linear(values, indices, weight, bias, neurons=self.neurons, group=self.group)

    def _strongest(self, samples: Tensor, neurons: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows, samples = self.rows, _Shared.apply(samples, self.group)
        mine = neurons[(neurons >= rows.start) & (neurons < rows.stop)] - rows.start
        if len(mine):
            values, indices = super()._strongest(samples, mine, min(k, len(mine)))
        else:  # x stays in the graph: all processes take part in the sum of its gradient
            values = samples[:, :0]
            indices = mine.new_empty(values.shape)
        code = _best(values, indices, rows, k, self.neurons, self.group)
        return code.values, code.indices

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """L2 norm, 0-d, of the gradient of all processes' parameters; those without one count as 0.

        Every process calls it, after backward.
        """
        shared = self.decoder.bias
        own = [p.grad for p in self.parameters() if p is not shared and p.grad is not None]
        size = nn.utils.get_total_norm(own)
        parts = torch.stack(_gathered(size.to(self.decoder.weight.device), self.group))
        if shared is not None and shared.grad is not None:
            parts = torch.cat([parts, shared.grad.norm().view(1)])
        return parts.norm()


def reduce_activity(
    counts: Tensor, last_active: Tensor | None = None, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor | None]:
    """Activity in the samples of all processes, each of which counted its own.

    The arguments stay what this process counted, so it may go on counting.

    Args:
        counts: [R] int64 or int32.
        last_active: [R] int64 or int32, or None. In the unit of its steps: where that is samples of
            one of w processes, as in TopKSAE, w times the result is in samples of all.
        group: the processes; None: all.

    Returns:
        The sum of the counts, and the latest last_active or None; new tensors.
    """
    counts = counts.clone()
    dist.all_reduce(counts, group=group)
    if last_active is not None:
        last_active = last_active.clone()
        dist.all_reduce(last_active, dist.ReduceOp.MAX, group=group)
    return counts, last_active


def _rows(op: str, neurons: int, group: dist.ProcessGroup | None) -> range:
    """The neurons of this process, as torch.tensor_split cuts them."""
    _checks.whole(op, "neurons", neurons, 1)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if neurons < world:
        raise ValueError(f"{op}: {world} processes cannot share neurons={neurons}; use fewer")
    each, more = divmod(neurons, world)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


def _rows_of(op: str, neurons: int, weight: Tensor, group: dist.ProcessGroup | None) -> range:
    """_rows, which weight [rows, ..] must have."""
    rows = _rows(op, neurons, group)
    if weight.dim() != 2 or len(weight) != len(rows):
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}, expected [{len(rows)}, ..] on process "
            f"{dist.get_rank(group)} of {dist.get_world_size(group)} for neurons={neurons}; "
            "cut it with torch.tensor_split"
        )
    return rows


@contextmanager
def _own_random(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Processes that are seeded alike draw different numbers inside, and are seeded alike after."""
    seed = int(torch.randint(2**62, ())) + dist.get_rank(group)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _best(
    values: Tensor,
    indices: Tensor,
    rows: range,
    k: int,
    neurons: int,
    group: dist.ProcessGroup | None,
) -> TopKOutput:
    """The k largest of the values [.., K] that each process sends, K <= k, in descending order.

    The processes follow one another in the order of their neurons. So a tie goes to the lower index
    if it goes to the first candidate, as in topk.
    """
    slots = min(k, -(-neurons // dist.get_world_size(group)))
    missing = 0, slots - values.shape[-1]
    values = F.pad(values, missing, value=-torch.inf)
    indices = F.pad(indices + rows.start, missing).to(torch.int32)  # half the bytes
    parts = _gathered(values.detach(), group)
    parts[dist.get_rank(group)] = values  # has a gradient
    candidates = torch.cat(parts, -1)
    chosen = topk(candidates.detach(), k).indices
    indices = torch.cat(_gathered(indices, group), -1).gather(-1, chosen).long()
    return TopKOutput(candidates.gather(-1, chosen), indices)


def _gathered(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The tensors of all processes, which have one shape."""
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return parts


# torch.distributed.nn.functional.all_reduce sums the gradients as well: it serves a loss that is
# the sum of the processes' losses. Here all of them compute one and the same loss.


class _Shared(torch.autograd.Function):
    """A tensor that is the same on every process, which uses it for its neurons alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum of the processes' parts."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
