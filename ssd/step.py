"""The training step: encode, inhibit, count, decode, loss, gradient, clip, update, constrain.

`plain_step` is the step of any network, by autograd. It specifies `sparse_step`, the same step for
SDMLPs, in which silent neurons have no gradient: the hidden layer is a code of few neurons per
sample, or the neurons that fire in the batch. On CUDA `sparse_step` reads nothing on the host, so
cuda_graph.py can capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.activations import evaluating
from ssd.learner import Learner, Stack
from ssd.ops.dense_update import dense_update
from ssd.ops.distill import distill
from ssd.ops.distill_code import CodeLoss, distill_code
from ssd.ops.gate_gradient import gate_gradient
from ssd.ops.reference import Update
from ssd.regularizers import Gradient, Map
from ssd_kernels import TopKOutput, row_update
from ssd_kernels._graded_code import ActiveNeurons, Scratch
from ssd_kernels._row_gradient import row_gradients
from ssd_kernels.reference import by_network, clip_scale
from ssd_kernels.row_update import global_norm


def plain_step(learner: Learner, samples: Tensor) -> None:
    """Autograd through a network on samples [B] of its task, then a pass over all weights."""
    config, model, distiller = learner.config, learner.model, learner.distiller
    address, labels = learner.inputs[samples], learner.labels[samples]

    def gradient(loss: Map) -> tuple[Tensor, ...]:
        with evaluating(model), torch.enable_grad():
            return torch.autograd.grad(loss(model.respond(address)), learner.parameters)

    for regularizer in learner.regularizers:
        regularizer.before_step(gradient, labels)
    if distiller is None:
        logits = model.respond(address)
        loss = F.cross_entropy(logits, labels)
    else:
        with distiller.recording() as hidden:
            logits = model.respond(address)
        loss = distiller.loss(logits, labels, samples, hidden)
    gradients = list(torch.autograd.grad(loss, learner.parameters))
    with torch.no_grad():
        for regularizer in learner.regularizers:
            if regularizer.active:
                regularizer.add_gradient(gradients)
        scale = clip_scale(global_norm(gradients), config.max_norm)
        for number, parameter in enumerate(learner.parameters):
            direction = scale * gradients[number]
            if learner.momentum is not None:
                direction = learner.momentum[number].mul_(config.momentum).add_(direction)
            parameter.sub_(config.lr * direction)
        model.constrain()
        learner.loss_sum += loss * len(labels)
        learner.correct += (logits.argmax(-1) == labels).sum()
    for regularizer in learner.regularizers:
        regularizer.after_step()


class Batch(NamedTuple):
    """The samples of a step, B for each of S learners."""

    address: Tensor  # [S B, d]
    labels: Tensor  # [S B]
    weight: Tensor  # [S B]: 1 / (the learner's samples), 0 where there is no sample
    terms: dict[str, Any]  # see Distiller.terms


def step(stack: Stack, samples: Tensor) -> None:
    """The step of a stack of one learner on samples [B] of its task."""
    (learner,), (encoder,) = stack.learners, stack.encoders
    address, labels = (t.index_select(0, samples) for t in (learner.inputs, learner.labels))
    terms = {} if learner.distiller is None else learner.distiller.terms(samples)
    weight = address.new_full((len(samples),), 1 / len(samples))
    hidden = encoder.encode(address, every=stack.reads_scores)
    loss = sparse_step(stack, Batch(address, labels, weight, terms), hidden)
    stack.loss_sum += loss.loss.sum()
    stack.correct += (loss.logits.argmax(-1) == labels).sum()


@torch.no_grad()
def sparse_step(stack: Stack, batch: Batch, hidden: TopKOutput | ActiveNeurons) -> CodeLoss:
    """plain_step, up to rounding, given the hidden layers of the learners.

    Args:
        hidden: of the batch, already counted; indices of a code run over all learners' neurons.

    Returns:
        The loss and its gradients; grad_values has the shape of hidden.values.
    """
    if isinstance(hidden, TopKOutput):
        loss = _code_loss(stack, batch, hidden)
    else:
        loss = _active_loss(stack, batch, hidden)
    for number, learner in enumerate(stack.learners):
        for regularizer in learner.regularizers:
            gradient = _gradient_of(stack, batch, hidden, loss.logits, number)
            regularizer.before_step(gradient, batch.labels[_own(stack, batch, number)])
    if isinstance(hidden, TopKOutput) and not stack.penalized and stack.momentum is None:
        row_update(
            stack.weights,
            [loss.grad_values, hidden.values],
            [batch.address, loss.grad_logits],
            hidden.indices,
            lr=stack.lr,
            max_norm=stack.max_norm,
            nonnegative=True,
            normalize=stack.normalized,
            networks=len(stack),
        )
        stack.written(lambda: _fired(hidden))
    else:
        rows = _moved_rows(stack, hidden)
        slopes, back = loss.grad_logits, loss.grad_values
        gradients = _gradients(stack, batch, hidden, slopes, back, rows, stack.scratch)
        _update(stack, batch, gradients, rows)
    for learner in stack.learners:
        for regularizer in learner.regularizers:
            regularizer.after_step()
    return loss


def _code_loss(stack: Stack, batch: Batch, code: TopKOutput) -> CodeLoss:
    """Decode, loss and its gradients for a code."""
    positions = stack.positions if "target_hidden" in batch.terms else None
    return distill_code(
        code.values,
        code.indices,
        stack.weights[1],
        batch.labels,
        positions=positions,
        weight=batch.weight,
        **batch.terms,
    )


def _active_loss(stack: Stack, batch: Batch, active: ActiveNeurons) -> CodeLoss:
    """Decode, loss and its gradients for the neurons that fire."""
    terms, positions = dict(batch.terms), None
    values = by_network(active.values, len(stack))
    decoder = by_network(_rows(stack.weights[1], active.neurons), len(stack))
    logits = _product(values, decoder).flatten(0, 1).contiguous()
    if "target_hidden" in terms:
        assert stack.positions is not None
        positions = _rows(stack.positions, active.neurons)
        terms["hidden"] = _distilled(stack, batch, active)
    loss = distill(logits, batch.labels, weight=batch.weight, **terms)
    slopes = loss.grad_hidden
    if slopes is not None and stack.reads_scores:
        slopes = slopes * (terms["hidden"] > 0)
    slopes_of = by_network(loss.grad_logits, len(stack))
    back = _product(slopes_of, decoder.mT, stack.scratch).flatten(0, 1)
    gate_gradient(back, active.gate, slopes, positions, gated=not stack.reads_scores)
    return CodeLoss(logits, loss.loss, loss.grad_logits, back)


def _distilled(stack: Stack, batch: Batch, active: ActiveNeurons) -> Tensor:
    """The activations [S B, n] of the neurons that are distilled, after or before inhibition."""
    size, chosen = len(stack), stack.neurons
    assert chosen is not None
    if stack.reads_scores:
        weight = by_network(stack.weights[0], size)
        addresses = weight.gather(1, chosen.unsqueeze(2).expand(-1, -1, weight.shape[2]))
        return _product(by_network(batch.address, size), addresses.mT).flatten(0, 1).relu()
    places, present = chosen, None
    if active.neurons is not None:
        if len(active.neurons) == 0:
            return active.values.new_zeros(len(active.values), chosen.shape[1])
        places = torch.searchsorted(active.neurons, chosen).clamp_(max=len(active.neurons) - 1)
        present = active.neurons[places] == chosen
    values = by_network(active.values, size)
    found = values.gather(2, places.unsqueeze(1).expand(-1, values.shape[1], -1)).flatten(0, 1)
    return found if present is None else found * present


def _gradient_of(
    stack: Stack, batch: Batch, hidden: TopKOutput | ActiveNeurons, logits: Tensor, number: int
) -> Gradient:
    """The gradient that Regularizer.before_step takes, of one learner."""

    def gradient(loss: Map) -> Sequence[Tensor]:
        own, alone = _own(stack, batch, number), stack.alone(number)
        with torch.enable_grad():
            leaf = logits[own].detach().requires_grad_()
            (slopes,) = torch.autograd.grad(loss(leaf), leaf)
        slopes = slopes * (batch.weight[own] > 0).unsqueeze(1)
        code: TopKOutput | ActiveNeurons
        if isinstance(hidden, TopKOutput):
            indices = hidden.indices[own] - number * stack.config.neurons
            code = TopKOutput(hidden.values[own], indices)
            rows = F.embedding(indices, alone.weights[1])
            back = torch.bmm(rows, slopes.unsqueeze(2)).squeeze(2) * (code.values > 0)
        else:
            code = ActiveNeurons(hidden.values[own], hidden.neurons, hidden.gate[own])
            decoder = _rows(alone.weights[1], hidden.neurons)
            back = _product(slopes.unsqueeze(0), decoder.mT.unsqueeze(0)).squeeze(0)
            gate_gradient(back, code.gate)
        part = Batch(batch.address[own], batch.labels[own], batch.weight[own], {})
        return _gradients(alone, part, code, slopes, back)

    return gradient


def _own(stack: Stack, batch: Batch, number: int) -> slice:
    """The samples of one learner."""
    size = len(batch.labels) // len(stack)
    return slice(number * size, (number + 1) * size)


def _gradients(
    stack: Stack,
    batch: Batch,
    hidden: TopKOutput | ActiveNeurons,
    slopes: Tensor,
    back: Tensor,
    rows: Tensor | None = None,
    scratch: Scratch | None = None,
) -> list[Tensor]:
    """Gradients of both weights, of all rows or of ascending `rows` [m] that hold what fires.

    slopes: gradient of the logits [S B, C]; back: of hidden.values.
    """
    count = len(stack.weights[0]) if rows is None else len(rows)
    if isinstance(hidden, TopKOutput):
        places = hidden.indices
        if rows is not None:
            # Slots that are not active add nothing, wherever they point.
            places = torch.searchsorted(rows, places.contiguous()).clamp_(max=count - 1)
        factors = [back, hidden.values], [batch.address, slopes]
        return row_gradients(*factors, places, count, len(stack))
    values, back, address, slopes = (
        by_network(t, len(stack)) for t in (hidden.values, back, batch.address, slopes)
    )
    if back.is_cpu and len(back) == 1:  # bmm takes half as long again
        kept = None if scratch is None else scratch(1, address, back.shape[2], address.shape[2])
        encoder = torch.mm(back[0].T, address[0], out=kept).unsqueeze(0)
    else:
        encoder = torch.bmm(back.mT, address)
    gradients = [encoder, _product(values.mT, slopes)]
    gradients = [g.flatten(0, 1).contiguous() for g in gradients]
    if hidden.neurons is None or hidden.neurons is rows:
        return gradients
    places = hidden.neurons if rows is None else torch.searchsorted(rows, hidden.neurons)
    return [g.new_zeros(count, g.shape[1]).index_copy_(0, places, g) for g in gradients]


def _moved_rows(stack: Stack, hidden: TopKOutput | ActiveNeurons) -> Tensor | None:
    """Ascending neurons [m] that the step moves, firing or pulled by a penalty; None: all."""
    if stack.momentum is not None or not stack.weights[0].is_cpu or len(stack) > 1:
        return None  # momentum moves every row; on CUDA no shape may vary
    fired = _fired(hidden) if isinstance(hidden, TopKOutput) else hidden.neurons
    if fired is None or not stack.penalized:
        return fired
    pulled = stack.learners[0].penalized_rows()
    return None if pulled is None else torch.cat([pulled, fired]).unique()


def _fired(code: TopKOutput) -> Tensor:
    """The neurons that fire [n], unordered, with repeats."""
    return code.indices[code.values > 0]


def _update(stack: Stack, batch: Batch, gradients: list[Tensor], rows: Tensor | None) -> None:
    """Penalties, global-norm clip, momentum, SGD and constraints, on all rows or on some [m]."""
    parts = zip(*(g.chunk(len(stack)) for g in gradients), strict=True)
    for learner, own in zip(stack.learners, parts, strict=True):
        for regularizer in learner.regularizers:
            if not regularizer.active:
                continue
            if rows is None:
                regularizer.add_gradient(own)
            else:
                regularizer.add_row_gradient(own, rows)
    weights = [_rows(weight, rows) for weight in stack.weights]
    update = Update(
        weights,
        gradients,
        lr=stack.lr,
        max_norm=stack.max_norm,
        nonnegative=True,
        normalize=stack.normalized,
        momentum=stack.config.momentum,
        buffers=stack.momentum,
        samples=batch.weight.view(len(stack), -1)[:, 0],
        networks=len(stack),
    )
    dense_update(update)
    if rows is not None:
        for weight, moved in zip(stack.weights, weights, strict=True):
            weight.index_copy_(0, rows, moved)
        stack.written(lambda: rows)


def _rows(matrix: Tensor, rows: Tensor | None) -> Tensor:
    return matrix if rows is None else matrix.index_select(0, rows)


def _product(a: Tensor, b: Tensor, scratch: Scratch | None = None) -> Tensor:
    """[S, m, i] @ [S, i, n] for small m or n, or for a transposed view."""
    if not a.is_cpu:
        return torch.bmm(a, b)
    # A CPU's product with few columns on the right takes several times as long.
    if len(a) > 1:
        return torch.stack([(y.T @ x.T).T for x, y in zip(a, b, strict=True)])
    out = None if scratch is None else scratch(0, a, b.shape[2], a.shape[1])
    return torch.mm(b[0].T, a[0].T, out=out).T.unsqueeze(0)
