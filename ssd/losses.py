"""The losses that compare a student with its teacher; a new one is a function and a row here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real

import torch
from torch import Tensor

from ssd.ops.reference import divergence

KL = ("reverse", "forward")
# Losses of hidden activations: f(student [B, .., n], teacher [B, .., n], temperature, kl) gives
# [B, ..]. Both are at least float32. ssd.ops.distill computes "kl" alone: a step with another loss
# goes through autograd.
HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor, float, str], Tensor]] = {"kl": divergence}


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    kl: str = "reverse",
    hidden_loss: str = "kl",
) -> Tensor:
    """Mean of a loss between student and teacher, 0-d.

    "kl", the default, is T^2 KL between softmax(student / T) and softmax(teacher / T).

    Args:
        student: [B, .., n], logits or activations.
        teacher: [B, .., n]; entries that are -inf in both are left out of the KL.
        temperature: T > 0; in float32 the KL is good to about T^2 1e-7.
        kl: "reverse" is KL(student || teacher), as the paper writes it; "forward" is
            KL(teacher || student), as distillation usually has it.
        hidden_loss: a name in HIDDEN_LOSSES.

    Raises:
        ValueError: shapes that differ, a T that is not above 0, or an unknown name.
    """
    choice("kl", kl, KL)
    choice("hidden_loss", hidden_loss, HIDDEN_LOSSES)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape"
        )
    positive("temperature", temperature)
    return HIDDEN_LOSSES[hidden_loss](wide(student), wide(teacher), temperature, kl).mean()


def wide(z: Tensor) -> Tensor:
    """float32 of a shorter dtype: T^2 magnifies rounding."""
    return z.float() if z.dtype.itemsize < 4 else z


def choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def positive(name: str, value: float) -> None:
    if not (real(value) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a finite number above 0")


def real(value: object) -> bool:
    return isinstance(value, (Real, torch.SymFloat)) and not isinstance(value, bool)
