"""The specification of the ops of ssd in plain PyTorch, as ssd_kernels.reference is of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd_kernels.reference import accumulation_dtype


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


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float | Tensor,
    kl: str,
    columns: Tensor | None = None,
) -> Tensor:
    """T^2 KL between softmax(student / T) and softmax(teacher / T), over the columns that count."""
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    student, teacher = student / scale, teacher / scale
    if columns is not None:
        student = student.masked_fill(~columns, -torch.inf)
        teacher = teacher.masked_fill(~columns, -torch.inf)
    p, q = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    if kl == "forward":
        p, q = q, p
    weight = p.exp()
    # 0 (log 0 - log 0) and 0 log 0 are 0.
    return temperature**2 * (weight * (p - q).masked_fill(weight == 0, 0.0)).sum(-1)
