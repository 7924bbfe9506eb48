"""The specification of the ops of ssd in plain PyTorch, as ssd_kernels.reference is of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels.reference import accumulation_dtype

# Rows of fewer columns are not vectorised: log_softmax of [128, 10] takes 20 us on one core of an
# AMD EPYC with AVX-512, 6 us over the first dimension of a transposed copy.
VECTOR = 16


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
) -> Tensor:
    """alpha CE + (1 - alpha) ((1 - lam) KL of the logits + lam KL of the hidden), per sample."""
    wide = accumulation_dtype(logits.dtype)  # T^2 magnifies rounding
    loss = F.cross_entropy(logits.to(wide), labels, reduction="none")
    if target_logits is not None:
        student, teacher = logits.to(wide), target_logits.to(wide)
        distilled = (1 - lam) * divergence(student, teacher, temperature, kl, columns)
        if hidden is not None and target_hidden is not None:
            student, teacher = hidden.to(wide), target_hidden.to(wide)
            distilled = distilled + lam * divergence(student, teacher, temperature, kl)
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
    """The logits H decoder of a code, H [B, R] being its dense form, and `distill` of each sample.

    The hidden activations are those of H at the neurons that have a position in 0..n-1.
    """
    wide = accumulation_dtype(values.dtype)
    logits = (values.unsqueeze(2).to(wide) * decoder[indices].to(wide)).sum(1).to(values.dtype)
    hidden = None
    if target_hidden is not None and positions is not None:
        hidden = at_places(values, positions[indices], target_hidden.shape[1])
    return logits, distill(logits, labels, target_logits, hidden, target_hidden, **options)


def at_places(values: Tensor, places: Tensor, size: int) -> Tensor:
    """values [B, K] at their places in rows [B, n], zeros elsewhere; a place of n is none."""
    return values.new_zeros(len(values), size + 1).scatter_add(1, places, values)[:, :size]


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None = None,
) -> Tensor:
    """T^2 KL between softmax(student / T) and softmax(teacher / T), over the columns that count."""
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
    log_w, log_v = log_softmax(student), log_softmax(teacher)
    if kl == "forward":
        log_w, log_v = log_v, log_w
    w = log_w.exp()
    # T now, not T^2 later: T^2 may leave the range of the dtype where T^2 KL does not.
    scaled = (log_w - log_v) * temperature
    # 0 (log 0 - log 0) and 0 log 0 are 0.
    return w, w * scaled.masked_fill(w == 0, 0.0), log_v


def log_softmax(rows: Tensor) -> Tensor:
    """F.log_softmax over the last dimension; its strides may differ from those of rows."""
    if rows.is_cpu and rows.shape[-1] < VECTOR:
        return F.log_softmax(rows.mT.contiguous(), dim=-2).mT
    return F.log_softmax(rows, dim=-1)
