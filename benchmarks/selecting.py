"""Cases of the ops that select: topk, linear_topk, linear_inhibit, linear_active."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ssd_kernels as ours
from benchmarks import gate, peers
from benchmarks.cases import Case, Provider, Shape
from benchmarks.common import captured, compiled, impls, normal
from ssd_kernels import _graded_code, reference

# The longest row in which Inductor may fuse a small top-k; beyond, compiled code calls torch.topk.
FUSED = 16_384


def topk(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = (shape.sizes[name] for name in ("B", "R", "k"))
    bytes_each = shape.dtype.itemsize

    def library(scores: Tensor) -> Any:
        return torch.topk(scores, k)

    providers: dict[str, Provider] = impls(
        "topk", device, lambda scores, impl: ours.topk(scores, k, impl=impl)[:2]
    )
    providers["torch.topk"] = library
    if neurons <= FUSED:
        providers |= compiled(device, "torch.topk", library)
    for name, peer in peers.topk(device).items():
        providers[name] = partial(peer, k)
    return Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        lambda: normal(shape, device, batch, neurons),
        providers,
        lambda _, scores, result: gate.topk(scores, *result),
        batch * neurons * bytes_each + batch * k * (bytes_each + 8),
    )


def linear_topk(shape: Shape, device: torch.device) -> Case:
    if "S" in shape.sizes:
        return _linear_topk_of_networks(shape, device)
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))
    full = shape.mode == "full"
    counts = torch.zeros(neurons, dtype=torch.int64, device=device)

    def inputs() -> Any:
        x = normal(shape, device, batch, d).requires_grad_(full)
        weight = normal(shape, device, neurons, d).requires_grad_(full)
        bias = normal(shape, device, neurons).requires_grad_(full)
        # One gradient a row: the neurons' order in it is then no provider's business.
        grad = normal(shape, device, batch, 1).expand(-1, k).contiguous()
        if full:
            return x, weight, bias, grad
        factors = (x.half(), weight.half()) if shape.dtype == torch.float32 else (x, weight)
        return x, weight, bias, grad, *factors

    def mode(select: Callable[[Tensor, Tensor, Tensor], Any]) -> Provider:
        def forward(given: Any) -> Any:
            return tuple(select(*given[:3]))[:2]

        def both(given: Any) -> Any:
            values, indices = forward(given)
            grads = torch.autograd.grad(values, given[:3], given[3])
            return values.detach(), indices, *grads

        return both if full else forward

    def library(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        values, indices = torch.topk(F.linear(x, weight, bias), k)
        return values.relu(), indices

    def library_and_ours(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        values, indices = ours.topk(F.linear(x, weight, bias), k)[:2]
        return values.relu(), indices

    def call(given: Any, impl: str | None, counts: Tensor | None = None) -> Any:
        return mode(lambda x, w, b: ours.linear_topk(x, w, k, b, counts=counts, impl=impl))(given)

    providers = impls("linear_topk", device, call)
    providers["ours+counts"] = lambda given: call(given, None, counts)
    providers["F.linear + torch.topk"] = mode(library)
    providers["F.linear + our topk"] = mode(library_and_ours)
    if batch <= 128:  # where launches decide
        for name in ("ours", "F.linear + torch.topk"):
            providers |= captured(device, name, providers[name])
    if not full:
        if device.type == "cuda":
            providers["16-bit GEMM alone"] = lambda given: given[4] @ given[5].T
        if shape.dtype == torch.float32:
            providers["F.linear alone"] = lambda given: F.linear(*given[:3])
        if neurons <= FUSED:
            tuned = batch >= 1024
            providers |= compiled(device, "F.linear + torch.topk", mode(library), tuned)
    for name, peer in peers.encoder(device).items():
        providers[name] = mode(partial(peer, k))
    dense = {} if full else peers.dense_encoder(device)
    for name, encode in dense.items():
        providers[name] = partial(lambda encode, given: encode(k, *given[:3]), encode)

    def check(name: str, given: Any, result: Any) -> str:
        x, weight, bias = (t.detach() for t in given[:3])
        if name == "F.linear alone":
            return gate.linear(x, weight, bias, result)
        if name == "16-bit GEMM alone":
            return gate.linear(*given[4:], None, result)
        values, indices, *grads = torch.topk(result, k) if name in dense else result
        rounded = not name.startswith("ours")
        return gate.linear_topk(x, weight, bias, values, indices, rounded=rounded) or (
            gate.linear_topk_gradients(given[:3], values, indices, given[3][:, :1], grads)
            if full
            else ""
        )

    each = shape.dtype.itemsize
    size = (batch * d + neurons * d + neurons) * each + batch * k * (each + 8)
    operations = 2 * batch * d * neurons
    if full:
        # Read x and the active rows of W, write dx and dW.
        size += (2 * batch * d + min(batch * k, neurons) * d + neurons * d) * each
        operations += 4 * batch * k * d
    return Case(
        shape.op, shape.mode, shape.dtype, shape.sizes, inputs, providers, check, size, operations
    )


def _linear_topk_of_networks(shape: Shape, device: torch.device) -> Case:
    """Several networks in one call, beside a call for each."""
    count, batch, d, neurons, k = (shape.sizes[name] for name in ("S", "B", "d", "R", "k"))

    def inputs() -> Any:
        sizes = ((count * batch, d), (count * neurons, d), (count * neurons,))
        return [normal(shape, device, *size) for size in sizes]

    def call(given: Any, impl: str | None) -> Any:
        x, weight, bias = given
        return ours.linear_topk(x, weight, k, bias, networks=count, impl=impl)[:2]

    def loop(select: Callable[[Tensor, Tensor, Tensor], Any], given: Any) -> Any:
        each = [select(*own)[:2] for own in zip(*(t.chunk(count) for t in given), strict=True)]
        values, indices = (torch.cat(part) for part in zip(*each, strict=True))
        return values, reference.numbered_through(indices, neurons, count)

    def library(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        values, indices = torch.topk(F.linear(x, weight, bias), k)
        return values.relu(), indices

    def check(name: str, given: Any, result: Any) -> str:
        own = torch.arange(count, device=device).repeat_interleave(batch).unsqueeze(1)
        parts = (*given, result[0], result[1] - own * neurons)
        shares = zip(*(t.chunk(count) for t in parts), strict=True)
        rounded = not name.startswith("ours")
        return next(filter(None, (gate.linear_topk(*s, rounded=rounded) for s in shares)), "")

    providers = impls("linear_topk", device, call)
    providers["ours, in a loop"] = partial(loop, lambda x, w, b: ours.linear_topk(x, w, k, b))
    providers["F.linear + torch.topk"] = partial(loop, library)
    each = shape.dtype.itemsize
    size = count * ((batch * d + neurons * d + neurons) * each + batch * k * (each + 8))
    operations = 2 * count * batch * d * neurons
    return Case(
        shape.op, shape.mode, shape.dtype, shape.sizes, inputs, providers, check, size, operations
    )


def linear_inhibit(shape: Shape, device: torch.device) -> Case:
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))

    def inputs() -> Any:
        gaba = torch.linspace(-1, 1, neurons, device=device, dtype=shape.dtype)
        sizes = ((batch, d), (neurons, d), (neurons,))
        return *(normal(shape, device, *size) for size in sizes), gaba

    def library(given: Any) -> Tensor:
        x, weight, bias, gaba = given
        a = F.linear(x, weight, bias).relu()
        return (a - gaba * torch.topk(a, k + 1).values[:, k:]).relu()

    def call(given: Any, impl: str | None) -> Any:
        x, weight, bias, gaba = given
        return ours.linear_inhibit(x, weight, k, gaba, bias, impl=impl)

    def check(_: str, given: Any, result: Tensor) -> str:
        rows = gate.sample_rows(given[0])
        x, weight, bias, gaba = (t.double() for t in given)
        true = reference.linear_inhibit(x[rows], weight, k, gaba, bias)
        return gate.close("h", result[rows], true)

    named = "F.linear + torch.topk"
    providers = impls("linear_inhibit", device, call) | {named: library}
    each = shape.dtype.itemsize
    size = (batch * d + neurons * d + 2 * neurons + batch * neurons) * each
    return Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        inputs,
        providers | compiled(device, named, library),
        check,
        size,
        2 * batch * d * neurons,
    )


def linear_active(shape: Shape, device: torch.device) -> Case:
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))
    scratch = _graded_code.Scratch()

    def inputs() -> Any:
        gaba = torch.linspace(0.5, 1, neurons, device=device, dtype=shape.dtype)
        return *(normal(shape, device, *size) for size in ((batch, d), (neurons, d))), gaba

    def library(given: Any) -> Any:
        x, weight, gaba = given
        a = F.linear(x, weight).relu()
        hidden = (a - gaba * torch.topk(a, k + 1).values[:, k:]).relu()
        firing = hidden.any(0).nonzero().squeeze(1)
        return _graded_code.ActiveNeurons(hidden[:, firing], firing, hidden[:, firing])

    def call(given: Any, impl: str | None) -> Any:
        x, weight, gaba = given
        return _graded_code.linear_active(x, weight, k, gaba, scratch=scratch, impl=impl)

    def check(_: str, given: Any, result: Any) -> str:
        values, firing, _ = result
        rows = gate.sample_rows(given[0])
        x, weight, gaba = (t.double() for t in given)
        true = reference.linear_inhibit(x[rows], weight, k, gaba)
        dense = values[rows]
        if firing is not None:
            dense = values.new_zeros(true.shape).index_copy_(1, firing, dense)
        return gate.close("h", dense, true)

    named = "F.linear + torch.topk"
    size = (batch * d + neurons * d + neurons) * shape.dtype.itemsize
    return Case(
        shape.op, shape.mode, shape.dtype, shape.sizes, inputs,
        impls("linear_active", device, call) | {named: library}, check, size,
        2 * batch * d * neurons,
    )  # fmt: skip
