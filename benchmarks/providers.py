"""Builds each op's cases: its inputs, the providers to compare, the gate and the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ssd_kernels as ours
from benchmarks import gate, peers
from benchmarks.cases import Case, Provider, Shape
from ssd_kernels import reference

# What serves CUDA tensors alone; an implementation that is not named is tried on CPU too.
CUDA_ONLY = {"triton", "fused"}


def implementations(op: str, device: torch.device) -> list[str]:
    """The names in the op's table, the specification left out: it is not meant to be fast."""
    table: Mapping[str, Any] = import_module(f"ssd_kernels.{op}").IMPLEMENTATIONS
    hidden = {"reference"} | (set() if device.type == "cuda" else CUDA_ONLY)
    return [name for name in table if name not in hidden]


def build(shape: Shape, device: torch.device) -> Case:
    """The case of one line of the tables in cases.py."""
    case: Case = BUILDERS[shape.op](shape, device)
    return case


def _ours(op: str, device: torch.device, call: Callable[..., Any]) -> dict[str, Provider]:
    """`ours`, as a user gets it, and each implementation by name; call(set, impl=) -> result."""
    named: dict[str, Provider] = {"ours": partial(call, impl=None)}
    for impl in implementations(op, device):
        named[f"ours:{impl}"] = partial(call, impl=impl)
    return named


def _compiled(device: torch.device, name: str, provider: Provider) -> dict[str, Provider]:
    """torch.compile of a provider, on CUDA: on CPU its compile time alone breaks the minute."""
    if device.type != "cuda":
        return {}
    return {f"{name} (compile)": torch.compile(provider, dynamic=False)}


def _normal(shape: Shape, device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=device, dtype=torch.float32).to(shape.dtype)


def _distinct(batch: int, neurons: int, k: int, device: torch.device) -> Tensor:
    """[B, k] int64: a random start a row and equal steps from there, so no neuron twice."""
    start = torch.randint(neurons, (batch, 1), device=device)
    return (start + torch.arange(k, device=device) * (neurons // k)) % neurons


def _topk(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = (shape.sizes[name] for name in ("B", "R", "k"))
    bytes_each = shape.dtype.itemsize

    def library(scores: Tensor) -> Any:
        return torch.topk(scores, k)

    providers: dict[str, Provider] = _ours(
        "topk", device, lambda scores, impl: ours.topk(scores, k, impl=impl)[:2]
    )
    providers["torch.topk"] = library
    providers |= _compiled(device, "torch.topk", library)
    for name, peer in peers.topk(device).items():
        providers[name] = partial(peer, k)
    return Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        lambda: _normal(shape, device, batch, neurons),
        providers,
        lambda _, scores, result: gate.topk(scores, *result),
        batch * neurons * bytes_each + batch * k * (bytes_each + 8),
    )


def _linear_topk(shape: Shape, device: torch.device) -> Case:
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))
    full = shape.mode == "full"
    counts = torch.zeros(neurons, dtype=torch.int64, device=device)

    def inputs() -> Any:
        x = _normal(shape, device, batch, d).requires_grad_(full)
        weight = _normal(shape, device, neurons, d).requires_grad_(full)
        bias = _normal(shape, device, neurons).requires_grad_(full)
        # One gradient a row: the neurons' order in it is then no provider's business.
        return x, weight, bias, _normal(shape, device, batch, 1).expand(-1, k).contiguous()

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

    providers = _ours("linear_topk", device, call)
    providers["ours+counts"] = lambda given: call(given, None, counts)
    providers["F.linear + torch.topk"] = mode(library)
    providers["F.linear + our topk"] = mode(library_and_ours)
    if not full:
        providers |= _compiled(device, "F.linear + torch.topk", mode(library))
        providers["F.linear alone"] = lambda given: F.linear(*given[:3])
    for name, peer in peers.encoder(device).items():
        providers[name] = mode(partial(peer, k))

    def check(name: str, given: Any, result: Any) -> str:
        x, weight, bias = (t.detach() for t in given[:3])
        if name == "F.linear alone":
            return gate.linear(x, weight, bias, result)
        values, indices, *grads = result
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


def _linear_inhibit(shape: Shape, device: torch.device) -> Case:
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))

    def inputs() -> Any:
        gaba = torch.linspace(-1, 1, neurons, device=device, dtype=shape.dtype)
        sizes = ((batch, d), (neurons, d), (neurons,))
        return *(_normal(shape, device, *size) for size in sizes), gaba

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
    providers = _ours("linear_inhibit", device, call) | {named: library}
    each = shape.dtype.itemsize
    size = (batch * d + neurons * d + 2 * neurons + batch * neurons) * each
    return Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        inputs,
        providers | _compiled(device, named, library),
        check,
        size,
        2 * batch * d * neurons,
    )


def _sparse_linear(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k, outputs = (shape.sizes[name] for name in ("B", "R", "k", "C"))
    full = shape.mode == "full"

    def inputs() -> Any:
        values = _normal(shape, device, batch, k)
        indices = _distinct(batch, neurons, k, device)
        weight = _normal(shape, device, neurons, outputs).requires_grad_(full)
        dense = values.new_zeros(batch, neurons).scatter_(1, indices, values).requires_grad_(full)
        grad = _normal(shape, device, batch, outputs)
        return values.requires_grad_(full), indices, weight, dense, grad

    def mode(decode: Callable[..., Tensor]) -> Provider:
        """decode(given) -> out; the gradient of the code is that of its own form of the code."""

        def both(given: Any) -> Any:
            out = decode(given)
            code = given[3] if decode is dense else given[0]
            return out.detach(), *torch.autograd.grad(out, (code, given[2]), given[4])

        return both if full else decode

    def dense(given: Any) -> Tensor:
        return given[3] @ given[2]

    def bag(given: Any) -> Tensor:
        values, indices, weight, *_ = given
        return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)

    def call(given: Any, impl: str | None) -> Any:
        values, indices, weight, *_ = given
        return mode(lambda _: ours.sparse_linear(values, indices, weight, impl=impl))(given)

    providers = _ours("sparse_linear", device, call)
    providers |= {"dense matmul": mode(dense), "F.embedding_bag": mode(bag)}
    for name, peer in peers.decoder(device).items():
        providers[name] = mode(peer)

    def check(name: str, given: Any, result: Any) -> str:
        values, indices, weight, _, grad = (t.detach() for t in given)
        out, *grads = result if full else (result,)
        rows = gate.sample_rows(values)
        picked = weight[indices[rows]].double()
        true = (values[rows].double().unsqueeze(-1) * picked).sum(1)
        error = gate.close("out", out[rows], true)
        if not full or error:
            return error
        got = grads[0].gather(1, indices) if name == "dense matmul" else grads[0]
        true = (picked * grad[rows].double().unsqueeze(1)).sum(-1)
        neurons = indices.flatten()[:: max(1, indices.numel() // gate.NEURONS)].unique()
        shares = torch.stack([(values.double() * (indices == j)).sum(1) for j in neurons])
        return gate.close("dvalues", got[rows], true) or gate.close(
            "dW", grads[1][neurons], shares @ grad.double()
        )

    each = shape.dtype.itemsize
    touched = min(batch * k, neurons)
    size = (touched + batch) * outputs * each + batch * k * (each + 8)
    if full:
        # Read the output's gradient and the active rows of W again, write dW and dvalues.
        size += (batch + touched + neurons) * outputs * each + batch * k * each
    operations = (6 if full else 2) * batch * k * outputs
    return Case(
        shape.op, shape.mode, shape.dtype, shape.sizes, inputs, providers, check, size, operations
    )


def _count_active(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = (shape.sizes[name] for name in ("B", "R", "k"))

    def inputs() -> Any:
        counts = torch.zeros(neurons, dtype=torch.int64, device=device)
        return _normal(shape, device, batch, k), _distinct(batch, neurons, k, device), counts

    def call(given: Any, impl: str | None) -> None:
        ours.count_active(*given, impl=impl)

    def library(given: Any) -> None:
        values, indices, counts = given
        counts.index_add_(0, indices.flatten(), (values > 0).flatten().long())

    def check(name: str, given: Any, _: Any) -> str:
        values, indices, counts = given
        expected = counts.clone()
        case.providers[name](given)
        reference.count_active(values, indices, expected)
        return "" if torch.equal(counts, expected) else "counts differ from the reference's"

    each = shape.dtype.itemsize
    case = Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        inputs,
        _ours("count_active", device, call) | {"index_add_": library},
        check,
        batch * k * (each + 8) + 2 * 8 * min(batch * k, neurons),
    )
    return case


LEARNING: dict[str, Any] = {
    "lr": 1e-3,
    "max_norm": 1.0,
    "nonnegative": True,
    "normalize": [True, False],
}


def _row_update(shape: Shape, device: torch.device) -> Case:
    """The encoder [R, d] and the decoder [R, 10] of one layer, in one step."""
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))
    widths = (d, 10)

    def inputs() -> Any:
        weights = [F.normalize(_normal(shape, device, neurons, w).abs(), dim=1) for w in widths]
        coefficients = [_normal(shape, device, batch, k) for _ in widths]
        vectors = [_normal(shape, device, batch, w) for w in widths]
        indices = _distinct(batch, neurons, k, device)
        dense = [reference.row_gradient(c, v, indices, neurons)
                 for c, v in zip(coefficients, vectors, strict=True)]  # fmt: skip
        return weights, coefficients, vectors, indices, dense

    def call(given: Any, impl: str | None) -> Tensor:
        return ours.row_update(*given[:4], **LEARNING, impl=impl)

    def library(given: Any) -> Tensor:
        """The dense step on gradients that are already there."""
        weights, *_, dense = given
        norm = torch.stack([g.square().sum() for g in dense]).sum().sqrt()
        scale = reference.clip_scale(norm, 1.0)
        for weight, gradient, unit in zip(weights, dense, (True, False), strict=True):
            weight -= 1e-3 * scale * gradient
            weight.clamp_(min=0)
            if unit:
                weight /= weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return norm

    def check(name: str, given: Any, _: Any) -> str:
        weights, coefficients, vectors, indices, dense = given
        exact = [w.double() for w in weights]
        mine = [w.clone() for w in weights]
        wide = [c.double() for c in coefficients], [v.double() for v in vectors]
        reference.row_update(exact, *wide, indices, **LEARNING, momentum=0.0, buffers=None)
        case.providers[name]((mine, coefficients, vectors, indices, dense))
        errors = [gate.close(f"weights[{n}]", m, e)
                  for n, (m, e) in enumerate(zip(mine, exact, strict=True))]  # fmt: skip
        return next(filter(None, errors), "")

    each = shape.dtype.itemsize
    touched = min(batch * k, neurons)
    size = sum(2 * touched * w + batch * w + batch * k for w in widths) * each + batch * k * 8
    case = Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        inputs,
        _ours("row_update", device, call) | {"dense step, gradient given": library},
        check,
        size,
        2 * batch * k * sum(widths),
    )
    return case


BUILDERS: dict[str, Callable[[Shape, torch.device], Case]] = {
    "topk": _topk,
    "linear_topk": _linear_topk,
    "linear_inhibit": _linear_inhibit,
    "sparse_linear": _sparse_linear,
    "count_active": _count_active,
    "row_update": _row_update,
}
