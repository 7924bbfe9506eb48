"""The benchmarked ops: how the case of each is built, and the shapes that are timed.

A new op is a function here, a row of BUILDERS, and a line in the tables at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import ssd.ops.reference
import ssd_kernels as ours
from benchmarks import gate, peers, targets
from benchmarks.providers import (
    ALONE,
    DENSE,
    GEMM,
    LIBRARY,
    Case,
    Provider,
    Shape,
    captured,
    compiled,
    distinct,
    impls,
    normal,
    shapes,
)
from ssd.ops.code_gram import code_gram as our_code_gram
from ssd_kernels import _graded_code, reference

# The longest row in which Inductor may fuse a small top-k; beyond, compiled code calls torch.topk.
FUSED = 16_384
INDEX = 8  # bytes
Select = Callable[[Tensor, Tensor, Tensor], Any]  # (x, weight, bias) -> values, indices, ..


def in_place(
    providers: dict[str, Provider], exact: Callable[[Any], None]
) -> Callable[[str, Any, Any], str]:
    """The check of an op that writes into its inputs: `exact` runs on a copy in fp64."""

    def check(name: str, given: Any, _: Any) -> str:
        mine = tree_map(torch.clone, given)
        true = tree_map(lambda t: t.double() if t.is_floating_point() else t.clone(), given)
        providers[name](mine)
        exact(true)
        pairs = zip(tree_leaves(mine), tree_leaves(true), strict=True)
        errors = (gate.close(f"input {number}", *pair) for number, pair in enumerate(pairs))
        return next(filter(None, errors), "")

    return check


def topk(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = shape["B R k"]

    def library(scores: Tensor) -> Any:
        return torch.topk(scores, k)

    providers = impls("topk", device, lambda scores, impl: ours.topk(scores, k, impl=impl)[:2])
    providers["torch.topk"] = library
    if neurons <= FUSED:
        providers |= compiled(device, "torch.topk", library)
    providers |= {name: partial(peer, k) for name, peer in peers.topk(device).items()}
    number = shape.dtype.itemsize
    return Case(
        shape,
        lambda: normal(shape, device, batch, neurons),
        providers,
        lambda _, scores, result: gate.topk(scores, *result),
        size=batch * neurons * number + batch * k * (number + INDEX),
    )


def linear_topk(shape: Shape, device: torch.device) -> Case:
    """With S networks of B samples each: one call for all, beside one call per network."""
    batch, d, neurons, k = shape["B d R k"]
    count, full = shape.sizes.get("S", 1), shape.mode == "full"
    counts = torch.zeros(count * neurons, dtype=torch.int64, device=device)

    def inputs() -> Any:
        x, weight, bias = (
            normal(shape, device, count * size, *more).requires_grad_(full)
            for size, *more in ((batch, d), (neurons, d), (neurons,))
        )
        # A row's neurons share one gradient, so that their order does not matter.
        grad = normal(shape, device, count * batch, 1).expand(-1, k).contiguous()
        factors = [] if full else [x, weight]
        if shape.dtype == torch.float32:
            factors = [factor.half() for factor in factors]
        return x, weight, bias, grad, *factors

    def mode(select: Select) -> Provider:
        def forward(given: Any) -> Any:
            return tuple(select(*given[:3]))[:2]

        def both(given: Any) -> Any:
            values, indices = forward(given)
            grads = torch.autograd.grad(values, given[:3], given[3])
            return values.detach(), indices, *grads

        return both if full else forward

    def in_turn(select: Select) -> Select:
        """One call per network."""

        def loop(*given: Tensor) -> Any:
            networks = zip(*(t.chunk(count) for t in given), strict=True)
            codes = [select(*network)[:2] for network in networks]
            values, indices = (torch.cat(part) for part in zip(*codes, strict=True))
            return values, reference.numbered_through(indices, neurons, count)

        return select if count == 1 else loop

    def unfused(topk: Callable[..., Any]) -> Select:
        def select(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
            values, indices = topk(F.linear(x, weight, bias), k)[:2]
            return values.relu(), indices

        return select

    def fused(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Any:
        return ours.linear_topk(x, weight, k, bias, **options)

    def call(given: Any, **options: Any) -> Any:
        return mode(partial(fused, networks=count, **options))(given)

    library = unfused(torch.topk)

    providers = impls("linear_topk", device, call)
    if count > 1:
        providers["ours, in a loop"] = mode(in_turn(fused))
    else:
        providers["ours+counts"] = partial(call, counts=counts)
    providers[LIBRARY] = mode(in_turn(library))
    dense = {}
    if count == 1:
        providers["F.linear + our topk"] = mode(unfused(ours.topk))
        if batch <= 128:  # where launches decide
            for name in ("ours", LIBRARY):
                providers |= captured(device, name, providers[name])
        if not full:
            if device.type == "cuda":
                providers[GEMM] = lambda given: given[4] @ given[5].T
            if shape.dtype == torch.float32:
                providers[ALONE] = lambda given: F.linear(*given[:3])
            if neurons <= FUSED:
                providers |= compiled(device, LIBRARY, mode(library), autotune=batch >= 1024)
            dense = peers.dense_encoder(device)
        providers |= {name: mode(partial(peer, k)) for name, peer in peers.encoder(device).items()}
    for name, encode in dense.items():
        providers[name] = lambda given, encode=encode: encode(k, *given[:3])

    def check(name: str, given: Any, result: Any) -> str:
        x, weight, bias = (t.detach() for t in given[:3])
        if name == ALONE:
            return gate.linear(x, weight, bias, result)
        if name == GEMM:
            return gate.linear(*given[4:], None, result)
        values, indices, *grads = torch.topk(result, k) if name in dense else result
        first = neurons * torch.arange(count, device=device).repeat_interleave(batch).unsqueeze(1)
        parts = (t.chunk(count) for t in (x, weight, bias, values, indices - first))
        rounded = not name.startswith("ours")
        for network in zip(*parts, strict=True):
            if error := gate.linear_topk(*network, rounded=rounded):
                return error
        if not full:
            return ""
        return gate.linear_topk_gradients(given[:3], values, indices, given[3][:, :1], grads)

    number = shape.dtype.itemsize
    size = (batch * d + neurons * d + neurons) * number + batch * k * (number + INDEX)
    operations = 2 * batch * d * neurons
    if full:
        # Read x and the active rows of W, write dx and dW.
        size += (2 * batch * d + min(batch * k, neurons) * d + neurons * d) * number
        operations += 4 * batch * k * d
    return Case(shape, inputs, providers, check, count * size, count * operations)


def linear_inhibit(shape: Shape, device: torch.device) -> Case:
    k, outputs = shape.sizes["k"], shape.sizes["B"] * shape.sizes["R"]

    def call(given: Any, impl: str | None) -> Any:
        x, weight, gaba, bias = given
        return ours.linear_inhibit(x, weight, k, gaba, bias, impl=impl)

    return _graded(shape, device, call, lowest=-1.0, biased=True, outputs=outputs)


def linear_active(shape: Shape, device: torch.device) -> Case:
    k, scratch = shape.sizes["k"], _graded_code.Scratch()

    def call(given: Any, impl: str | None) -> Any:
        return _graded_code.linear_active(*given[:2], k, given[2], scratch=scratch, impl=impl)

    def firing(hidden: Tensor) -> Any:
        neurons = hidden.any(0).nonzero().squeeze(1)
        return _graded_code.ActiveNeurons(hidden[:, neurons], neurons, hidden[:, neurons])

    def dense(active: Any) -> Tensor:
        if active.neurons is None:
            return active.values
        hidden = active.values.new_zeros(len(active.values), shape.sizes["R"])
        return hidden.index_copy_(1, active.neurons, active.values)

    return _graded(shape, device, call, lowest=0.5, returned=firing, dense=dense)


def _graded(
    shape: Shape,
    device: torch.device,
    call: Callable[..., Any],
    lowest: float,
    biased: bool = False,
    returned: Callable[[Tensor], Any] = lambda hidden: hidden,
    dense: Callable[[Any], Tensor] = lambda hidden: hidden,
    outputs: int = 0,
) -> Case:
    """Graded inhibition, with factors between `lowest` and 1.

    Args:
        returned: dense hidden layer -> the result of the op. dense: the way back.
        outputs: how many numbers must be written.
    """
    batch, d, neurons, k = shape["B d R k"]

    def inputs() -> Any:
        gaba = torch.linspace(lowest, 1, neurons, device=device, dtype=shape.dtype)
        x, weight = normal(shape, device, batch, d), normal(shape, device, neurons, d)
        return x, weight, gaba, *([normal(shape, device, neurons)] if biased else [])

    def library(given: Any) -> Any:
        x, weight, gaba, *bias = given
        a = F.linear(x, weight, *bias).relu()
        return returned((a - gaba * torch.topk(a, k + 1).values[:, k:]).relu())

    def check(_: str, given: Any, result: Any) -> str:
        rows = gate.sample_rows(given[0])
        x, weight, gaba, *bias = (t.double() for t in given)
        true = reference.linear_inhibit(x[rows], weight, k, gaba, *bias)
        return gate.close("h", dense(result)[rows], true)

    providers = impls(shape.op, device, call) | {LIBRARY: library}
    providers |= compiled(device, LIBRARY, library)
    numbers = batch * d + neurons * d + (1 + biased) * neurons + outputs
    size, operations = numbers * shape.dtype.itemsize, 2 * batch * d * neurons
    return Case(shape, inputs, providers, check, size, operations)


def sparse_linear(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k, outputs = shape["B R k C"]
    full = shape.mode == "full"

    def inputs() -> Any:
        values = normal(shape, device, batch, k)
        indices = distinct(batch, neurons, k, device)
        weight = normal(shape, device, neurons, outputs).requires_grad_(full)
        dense = values.new_zeros(batch, neurons).scatter_(1, indices, values).requires_grad_(full)
        grad = normal(shape, device, batch, outputs)
        return values.requires_grad_(full), indices, weight, dense, grad

    def mode(decode: Callable[..., Tensor]) -> Provider:
        """With full, gradients of the weight and of the code in the form that decode takes."""

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
        return mode(lambda given: ours.sparse_linear(*given[:3], impl=impl))(given)

    providers = impls("sparse_linear", device, call)
    providers |= {DENSE: mode(dense), "F.embedding_bag": mode(bag)}
    providers |= {name: mode(peer) for name, peer in peers.decoder(device).items()}

    def check(name: str, given: Any, result: Any) -> str:
        values, indices, weight, _, grad = (t.detach() for t in given)
        out, *grads = result if full else (result,)
        rows = gate.sample_rows(values)
        picked = weight[indices[rows]].double()
        true = (values[rows].double().unsqueeze(-1) * picked).sum(1)
        error = gate.close("out", out[rows], true)
        if error or not full:
            return error
        got = grads[0].gather(1, indices) if name == DENSE else grads[0]
        true = (picked * grad[rows].double().unsqueeze(1)).sum(-1)
        return gate.close("dvalues", got[rows], true) or gate.weight_gradient(
            values.double(), indices, grad, grads[1]
        )

    number = shape.dtype.itemsize
    touched = min(batch * k, neurons)
    size = (touched + batch) * outputs * number + batch * k * (number + INDEX)
    if full:
        # Read the output's gradient and the active rows of W again, write dW and dvalues.
        size += (batch + touched + neurons) * outputs * number + batch * k * number
    return Case(shape, inputs, providers, check, size, (6 if full else 2) * batch * k * outputs)


def count_active(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = shape["B R k"]

    def inputs() -> Any:
        counts = torch.zeros(neurons, dtype=torch.int64, device=device)
        return normal(shape, device, batch, k), distinct(batch, neurons, k, device), counts

    def library(given: Any) -> None:
        values, indices, counts = given
        counts.index_add_(0, indices.flatten(), (values > 0).flatten().long())

    providers = impls(
        "count_active", device, lambda given, impl: ours.count_active(*given, impl=impl)
    )
    providers["index_add_"] = library
    size = batch * k * (shape.dtype.itemsize + INDEX) + 2 * INDEX * min(batch * k, neurons)
    check = in_place(providers, lambda given: reference.count_active(*given))
    return Case(shape, inputs, providers, check, size)


def code_gram(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k, classes = shape["B R k C"]

    def inputs() -> Any:
        return (
            normal(shape, device, batch, k).abs(),
            distinct(batch, neurons, k, device),
            torch.zeros(neurons, neurons, device=device),
            torch.zeros(neurons, classes, device=device),
            torch.randint(classes, (batch,), device=device),
        )

    def dense(given: Any) -> None:
        values, indices, gram, cross, labels = given
        hidden = gram.new_zeros(batch, neurons).scatter_(1, indices, values.to(gram.dtype))
        gram.addmm_(hidden.T, hidden)
        cross.addmm_(hidden.T, F.one_hot(labels, classes).to(gram.dtype))

    providers = impls("code_gram", device, lambda given, impl: our_code_gram(*given, impl=impl))
    providers[DENSE] = dense
    touched = min(batch * k * k, neurons * neurons) + min(batch * k, neurons * classes)
    size = batch * k * (shape.dtype.itemsize + INDEX) + 2 * 4 * touched
    check = in_place(providers, lambda given: ssd.ops.reference.code_gram(*given))
    return Case(shape, inputs, providers, check, size, 2 * batch * k * k)


def row_update(shape: Shape, device: torch.device) -> Case:
    """The encoder [R, d] and the decoder [R, 10] of one layer, in one step."""
    batch, d, neurons, k = shape["B d R k"]
    widths, lr, normalize = (d, 10), 1e-3, [True, False]
    options = {"lr": lr, "max_norm": 1.0, "nonnegative": True, "normalize": normalize}

    def inputs() -> Any:
        weights = [F.normalize(normal(shape, device, neurons, w).abs(), dim=1) for w in widths]
        coefficients = [normal(shape, device, batch, k) for _ in widths]
        vectors = [normal(shape, device, batch, w) for w in widths]
        indices = distinct(batch, neurons, k, device)
        pairs = zip(coefficients, vectors, strict=True)
        dense = [reference.row_gradient(c, v, indices, neurons) for c, v in pairs]
        return weights, coefficients, vectors, indices, dense

    def library(given: Any) -> Tensor:
        """The dense step on given gradients."""
        weights, *_, dense = given
        norm = torch.stack([g.square().sum() for g in dense]).sum().sqrt()
        scale = reference.clip_scale(norm, 1.0)
        for weight, gradient, unit in zip(weights, dense, normalize, strict=True):
            weight -= lr * scale * gradient
            weight.clamp_(min=0)
            if unit:
                weight /= weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return norm

    def exact(given: Any) -> None:
        reference.row_update(*given[:4], **options, momentum=0.0, buffers=None)

    providers = impls(
        "row_update", device, lambda given, impl: ours.row_update(*given[:4], **options, impl=impl)
    )
    providers["dense step, gradient given"] = library
    number, touched = shape.dtype.itemsize, min(batch * k, neurons)
    size = sum(2 * touched * w + batch * w + batch * k for w in widths) * number
    check, operations = in_place(providers, exact), 2 * batch * k * sum(widths)
    return Case(shape, inputs, providers, check, size + batch * k * INDEX, operations)


BUILDERS: dict[str, Callable[[Shape, torch.device], Case]] = {
    "topk": topk,
    "linear_topk": linear_topk,
    "linear_active": linear_active,
    "linear_inhibit": linear_inhibit,
    "sparse_linear": sparse_linear,
    "count_active": count_active,
    "code_gram": code_gram,
    "row_update": row_update,
}


def build(shape: Shape, device: torch.device) -> Case:
    """The case of a shape, with its inputs on the device."""
    return BUILDERS[shape.op](shape, device)


OTHERS = shapes("""
    linear_topk     full     float32   B=128 d=256 R=10000 k=10
    sparse_linear   forward  bfloat16  B=8192 R=65536 k=64 C=4096
    linear_inhibit  forward  float32   B=128 d=256 R=10000 k=10
    linear_topk     forward  float32   S=10 B=128 d=256 R=10000 k=10
    row_update      step     float32   B=128 d=256 R=10000 k=10
    row_update      step     float32   B=8192 d=1024 R=65536 k=32
    count_active    forward  float32   B=8192 R=131072 k=32
    count_active    forward  float32   B=128 R=10000 k=10
    sparse_linear   full     float32   B=128 R=10000 k=10 C=10
    code_gram       forward  float32   B=8192 R=10000 k=100 C=10
    linear_inhibit  forward  float32   B=1024 d=256 R=10000 k=10
    topk            forward  bfloat16  B=8192 R=131072 k=64
""")
CUDA = targets.SHAPES + OTHERS
CPU = shapes("""
    topk            forward  float32  B=128 R=10000 k=10
    topk            forward  float32  B=128 R=65536 k=64
    linear_topk     forward  float32  B=128 d=256 R=10000 k=10
    linear_topk     full     float32  B=128 d=256 R=10000 k=10
    linear_inhibit  forward  float32  B=128 d=256 R=10000 k=10
    linear_active   forward  float32  B=128 d=256 R=10000 k=10
    sparse_linear   full     float32  B=128 R=10000 k=10 C=256
    row_update      step     float32  B=128 d=256 R=10000 k=10
    count_active    forward  float32  B=128 R=10000 k=10
    code_gram       forward  float32  B=1024 R=1000 k=10 C=10
    code_gram       forward  float32  B=1024 R=1000 k=100 C=10
    code_gram       forward  float32  B=1024 R=4000 k=100 C=10
""")
QUICK = shapes("""
    topk            forward  float32  B=16 R=4096 k=10
    linear_topk     forward  float32  B=16 d=32 R=1000 k=10
    linear_topk     full     float32  B=16 d=32 R=1000 k=10
    linear_topk     forward  float32  S=3 B=16 d=32 R=1000 k=10
    linear_inhibit  forward  float32  B=16 d=32 R=1000 k=10
    linear_active   forward  float32  B=16 d=32 R=1000 k=10
    sparse_linear   full     float32  B=16 R=1000 k=10 C=32
    row_update      step     float32  B=16 d=32 R=1000 k=10
    count_active    forward  float32  B=16 R=1000 k=10
    code_gram       forward  float32  B=16 R=1000 k=10 C=10
""")
