"""The specification of the ops of ssd in plain PyTorch, like ssd_kernels.reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels.reference import accumulation_dtype, sgd_step


class Stored(NamedTuple):
    """What `draw_batch` draws from: N samples and R neurons of each of S learners."""

    inputs: Tensor  # [S N, d] floating
    labels: Tensor  # [S N] int64
    order: Tensor  # [S, M] int64 in 0..N-1
    samples: Tensor  # [S] int64, how many entries of its order a learner takes; 0: it rests
    position: Tensor  # 0-d int64, number of the batch
    size: int  # B
    target_logits: Tensor | None = None  # [S N, C]
    target_hidden: Tensor | None = None  # [S N, n]
    counts: Tensor | None = None  # [S R] int64, how often each neuron was active
    # [S] int64 or in the dtype of inputs, see response_to_inhibition; goes with counts
    anneal_samples: Tensor | None = None


def draw_batch(stored: Stored) -> tuple[Tensor | None, ...]:
    """Rows [S B, ..] at order[s, position B ..] of each learner s, zeros past samples[s]."""
    inputs, order, samples = stored.inputs, stored.order, stored.samples
    learners, longest = order.shape
    place = stored.position * stored.size + torch.arange(stored.size, device=order.device)
    real = place < samples.unsqueeze(1)  # [S, B]
    first = torch.arange(learners, device=order.device).unsqueeze(1) * (len(inputs) // learners)
    row = (order[:, place.clamp(max=longest - 1)] + first).flatten()

    def drawn(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        there = real.view(-1, *[1] * (rows.dim() - 1))
        return rows.index_select(0, row).masked_fill_(~there, 0)

    weight = real.to(accumulation_dtype(inputs.dtype)) / real.sum(1, keepdim=True).clamp(min=1)
    inhibited = gaba(stored.counts, stored.anneal_samples, inputs.dtype)
    if inhibited is not None:
        inhibited.view(learners, -1).masked_fill_(samples.unsqueeze(1) == 0, 1.0)
    targets = drawn(stored.target_logits), drawn(stored.target_hidden)
    return drawn(inputs), drawn(stored.labels), weight.flatten(), *targets, inhibited


def gaba(counts: Tensor | None, anneal_samples: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """response_to_inhibition [S R] of counts [S R] under anneal_samples [S]; None without."""
    if counts is None or anneal_samples is None:
        return None
    by_learner = counts.view(len(anneal_samples), -1)
    return response_to_inhibition(by_learner, anneal_samples.unsqueeze(1), dtype).flatten()


def response_to_inhibition(
    counts: Tensor, anneal_samples: int | Tensor, dtype: torch.dtype
) -> Tensor:
    """The GABA switch of neurons that were active so often: -1 (excited) to 1 (inhibited)."""
    wide = torch.promote_types(dtype, torch.float32)  # float16 ends at 65,504
    return (2 * counts.to(wide) / anneal_samples - 1).clamp(-1, 1).to(dtype)


class Update(NamedTuple):
    """A step of `dense_update` on S networks whose rows follow one another."""

    weights: Sequence[Tensor]  # [S R, d_i] each, updated in place
    gradients: Sequence[Tensor]  # [S R, d_i] each
    lr: float | Tensor  # learning rate, or one for each network [S]
    # Bound on the L2 norm of a network's gradients, as in clip_grad_norm_, or [S]; None: no clip.
    max_norm: float | Tensor | None = None
    nonnegative: bool = False  # clamps the weights at 0 after the step
    # Whether the rows of each matrix are then scaled to unit L2 norm; a row of zeros stays zero.
    normalize: Sequence[bool] | None = None
    momentum: float = 0.0  # of heavy-ball SGD; goes with buffers
    buffers: Sequence[Tensor] | None = None  # shaped like weights, updated in place
    # [S], 0 where a network has no sample in the batch: it keeps its bits, whatever its gradients
    # hold. None: all networks have samples.
    samples: Tensor | None = None
    networks: int = 1  # S


def dense_update(update: Update) -> None:
    """One clipped, projected SGD step on all rows of the networks that have samples."""
    options = update._asdict()
    weights, gradients, samples = (options.pop(n) for n in ("weights", "gradients", "samples"))
    moves = torch.ones(update.networks, dtype=torch.bool, device=weights[0].device)
    if samples is not None:
        moves = samples > 0
    wide = accumulation_dtype(reduce(torch.promote_types, (w.dtype for w in weights)))
    rows = moves.repeat_interleave(len(weights[0]) // update.networks)
    sgd_step(weights, [g.to(wide) for g in gradients], rows, **options)


def gate_gradient(
    gradient: Tensor, gate: Tensor, slopes: Tensor | None, positions: Tensor | None, gated: bool
) -> None:
    """Zeros where gate [S B, R] <= 0; the neurons at positions [S R] add slopes [S B, n] first."""
    slope = torch.zeros_like(gradient)
    if slopes is not None and positions is not None:
        places = positions.view(-1, gradient.shape[1])  # [S, R]
        place = places.repeat_interleave(len(gradient) // len(places), dim=0)
        slope = F.pad(slopes, (0, 1)).gather(1, place)
    closed = gate <= 0
    if gated:
        gradient.copy_((gradient + slope).masked_fill(closed, 0.0))
    else:
        gradient.copy_(gradient.masked_fill(closed, 0.0) + slope)


class Tally(NamedTuple):
    """A batch of S learners, and the sums to which `tally` adds it in place."""

    loss: Tensor  # [S B]
    logits: Tensor  # [S B, C]
    labels: Tensor  # [S B] int64 in 0..C-1
    weight: Tensor  # [S B], 0 where there is no sample: such rows do not count
    loss_sum: Tensor  # [S] float64, adds the losses in a fixed order
    correct: Tensor  # [S] int64, adds the samples whose label is torch.argmax of their logits
    seen: Tensor  # [S] int64, adds the number of samples
    position: Tensor  # 0-d int64, adds 1
    wider: Tensor | None = None  # [S B] bool; goes with overflow
    overflow: Tensor | None = None  # [S] bool, set where a sample is wider


def tally(batch: Tally) -> None:
    """Sums over each learner's samples of weight > 0, in place; position += 1."""
    loss, logits, labels, weight, loss_sum, correct, seen, position, wider, overflow = batch
    learners, real = len(loss_sum), weight > 0
    loss_sum += torch.where(real, loss, 0.0).view(learners, -1).sum(1, dtype=loss_sum.dtype)
    correct += ((logits.argmax(-1) == labels) & real).view(learners, -1).sum(1)
    seen += real.view(learners, -1).sum(1)
    if wider is not None and overflow is not None:
        overflow |= (wider & real).view(learners, -1).any(1)
    position += 1


def code_gram(
    values: Tensor, indices: Tensor, gram: Tensor, cross: Tensor | None, targets: Tensor | None
) -> None:
    """gram += H^T H, cross += H^T Y for the dense form H [B, R] of a code; Y [B, C] or labels."""
    neurons = gram.shape[0]
    dense = gram.new_zeros(values.shape[0], neurons)
    dense.scatter_add_(1, indices, values.detach().to(gram.dtype))
    gram += dense.T @ dense
    if cross is not None and targets is not None:
        if targets.dim() == 1:
            targets = F.one_hot(targets, cross.shape[1])
        cross += dense.T @ targets.detach().to(cross.dtype)


def distill(
    logits: Tensor,
    labels: Tensor,
    target_logits: Tensor | None = None,
    hidden: Tensor | None = None,
    target_hidden: Tensor | None = None,
    *,
    alpha: float | Tensor = 1.0,
    lam: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    kl: str = "reverse",
    columns: Tensor | None = None,
    hidden_loss: str = "kl",
    hidden_weight: float | Tensor = 1.0,
) -> Tensor:
    """alpha CE + (1 - alpha) ((1 - lam) KL of logits + lam hidden_weight H of hidden), per sample.

    H is the KL, or the sum of squared differences for hidden_loss="mse".
    """
    wide = accumulation_dtype(logits.dtype)  # T^2 magnifies rounding
    loss = F.cross_entropy(logits.to(wide), labels, reduction="none")
    if target_logits is not None:
        student, teacher = logits.to(wide), target_logits.to(wide)
        distilled = (1 - lam) * divergence(student, teacher, temperature, kl, columns)
        if hidden is not None and target_hidden is not None:
            student, teacher = hidden.to(wide), target_hidden.to(wide)
            if hidden_loss == "mse":
                term = squared_error(student, teacher)
            else:
                term = divergence(student, teacher, temperature, kl)
            distilled = distilled + lam * hidden_weight * term
        loss = alpha * loss + (1 - alpha) * distilled
    return loss.to(logits.dtype)


def distill_code(
    values: Tensor,
    indices: Tensor,
    decoder: Tensor,
    labels: Tensor,
    target_logits: Tensor | None = None,
    target_hidden: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The logits of a code, which are its dense form H [B, R] times the decoder, and their loss.

    The hidden activations are those of H at the neurons with a position in 0..n-1.
    """
    wide = accumulation_dtype(values.dtype)
    logits = (values.unsqueeze(2).to(wide) * decoder[indices].to(wide)).sum(1).to(values.dtype)
    hidden = None
    if target_hidden is not None and positions is not None:
        hidden = at_places(values, positions[indices], target_hidden.shape[1])
    return logits, distill(logits, labels, target_logits, hidden, target_hidden, **options)


def at_places(values: Tensor, places: Tensor, size: int) -> Tensor:
    """values [B, K] at their places in rows [B, n], zeros elsewhere; place n drops a value."""
    return values.new_zeros(len(values), size + 1).scatter_add(1, places, values)[:, :size]


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences over the last dimension, [..]."""
    return (student - teacher).square().sum(-1)


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None = None,
) -> Tensor:
    """T^2 KL between softmax(student / T) and softmax(teacher / T) over some columns, [..]."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    _, terms, _ = divergence_terms(student, teacher, scale, kl, columns)
    return terms.sum(-1) * temperature


def divergence_terms(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """w, the terms w T log(w / v) whose row sums are T KL, and log v, each [.., n].

    w is the softmax that weighs the logarithms: the student's if kl is "reverse", else the
    teacher's. v is the other one. The temperature is a number or [.., 1].
    """
    student, teacher = student / temperature, teacher / temperature
    if columns is not None:
        student = student.masked_fill(~columns, -torch.inf)
        teacher = teacher.masked_fill(~columns, -torch.inf)
    log_w, log_v = (F.log_softmax(z, dim=-1) for z in (student, teacher))
    if kl == "forward":
        log_w, log_v = log_v, log_w
    w = log_w.exp()
    # T now, not T^2 later: T^2 may leave the range of the dtype where T^2 KL does not.
    scaled = (log_w - log_v) * temperature
    # 0 (log 0 - log 0) and 0 log 0 are 0.
    return w, w * scaled.masked_fill(w == 0, 0.0), log_v
