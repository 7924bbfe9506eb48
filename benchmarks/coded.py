"""Cases of the ops that take a sparse code: sparse_linear, count_active, code_gram, row_update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import ssd.ops.code_gram
import ssd.ops.reference
import ssd_kernels as ours
from benchmarks import gate, peers
from benchmarks.cases import Case, Provider, Shape
from benchmarks.common import distinct, impls, normal
from ssd_kernels import reference


def sparse_linear(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k, outputs = (shape.sizes[name] for name in ("B", "R", "k", "C"))
    full = shape.mode == "full"

    def inputs() -> Any:
        values = normal(shape, device, batch, k)
        indices = distinct(batch, neurons, k, device)
        weight = normal(shape, device, neurons, outputs).requires_grad_(full)
        dense = values.new_zeros(batch, neurons).scatter_(1, indices, values).requires_grad_(full)
        grad = normal(shape, device, batch, outputs)
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

    providers = impls("sparse_linear", device, call)
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


def count_active(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k = (shape.sizes[name] for name in ("B", "R", "k"))

    def inputs() -> Any:
        counts = torch.zeros(neurons, dtype=torch.int64, device=device)
        return normal(shape, device, batch, k), distinct(batch, neurons, k, device), counts

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
        impls("count_active", device, call) | {"index_add_": library},
        check,
        batch * k * (each + 8) + 2 * 8 * min(batch * k, neurons),
    )
    return case


def code_gram(shape: Shape, device: torch.device) -> Case:
    batch, neurons, k, classes = (shape.sizes[name] for name in ("B", "R", "k", "C"))

    def inputs() -> Any:
        return (
            normal(shape, device, batch, k).abs(),
            distinct(batch, neurons, k, device),
            torch.zeros(neurons, neurons, device=device),
            torch.zeros(neurons, classes, device=device),
            torch.randint(classes, (batch,), device=device),
        )

    def call(given: Any, impl: str | None) -> None:
        ssd.ops.code_gram.code_gram(*given, impl=impl)

    def dense(given: Any) -> None:
        values, indices, gram, cross, labels = given
        hidden = gram.new_zeros(batch, neurons).scatter_(1, indices, values.to(gram.dtype))
        gram.addmm_(hidden.T, hidden)
        cross.addmm_(hidden.T, F.one_hot(labels, classes).to(gram.dtype))

    def check(name: str, given: Any, _: Any) -> str:
        values, indices, gram, cross, labels = given
        mine = gram.zero_().clone(), cross.zero_().clone()
        case.providers[name]((values, indices, *mine, labels))
        exact = gram.double(), cross.double()
        ssd.ops.reference.code_gram(values.double(), indices, *exact, labels)
        return gate.close("gram", mine[0], exact[0]) or gate.close("cross", mine[1], exact[1])

    each = shape.dtype.itemsize
    touched = min(batch * k * k, neurons * neurons) + min(batch * k, neurons * classes)
    case = Case(
        shape.op,
        shape.mode,
        shape.dtype,
        shape.sizes,
        inputs,
        impls("code_gram", device, call) | {"dense matmul": dense},
        check,
        batch * k * (each + 8) + 2 * 4 * touched,
        2 * batch * k * k,
    )
    return case


LEARNING: dict[str, Any] = {
    "lr": 1e-3,
    "max_norm": 1.0,
    "nonnegative": True,
    "normalize": [True, False],
}


def row_update(shape: Shape, device: torch.device) -> Case:
    """The encoder [R, d] and the decoder [R, 10] of one layer, in one step."""
    batch, d, neurons, k = (shape.sizes[name] for name in ("B", "d", "R", "k"))
    widths = (d, 10)

    def inputs() -> Any:
        weights = [F.normalize(normal(shape, device, neurons, w).abs(), dim=1) for w in widths]
        coefficients = [normal(shape, device, batch, k) for _ in widths]
        vectors = [normal(shape, device, batch, w) for w in widths]
        indices = distinct(batch, neurons, k, device)
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
        impls("row_update", device, call) | {"dense step, gradient given": library},
        check,
        size,
        2 * batch * k * sum(widths),
    )
    return case
