"""The losses that compare a student with its teacher; a new one is a function and a row here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ssd.ops.reference import divergence, squared_error

KL = ("reverse", "forward")


class HiddenLoss(NamedTuple):
    """A loss of hidden activations."""

    # f(student [B, .., n], teacher [B, .., n], temperature, kl) -> [B, ..]; at least float32
    function: Callable[[Tensor, Tensor, float, str], Tensor]
    relative: bool = False  # whether a Distiller divides it by the mean squared norm of a code


# Steps with a loss that ssd.ops.distill does not compute use autograd.
HIDDEN_LOSSES = {
    "kl": HiddenLoss(divergence),
    "mse": HiddenLoss(lambda student, teacher, *_: squared_error(student, teacher), relative=True),
}


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    kl: str = "reverse",
    hidden_loss: str = "kl",
) -> Tensor:
    """Mean of a loss between student and teacher, 0-d.

    "kl", the default, is T^2 KL between softmax(student / T) and softmax(teacher / T); "mse" the
    sum of (student - teacher)^2.

    Args:
        student: [B, .., n], logits or activations.
        teacher: [B, .., n]; the KL leaves out entries that are -inf in both.
        temperature: T > 0; in float32 the KL is accurate to about T^2 1e-7.
        kl: "reverse" is KL(student || teacher), as in the paper; "forward" is
            KL(teacher || student), as usual in distillation.
        hidden_loss: a name in HIDDEN_LOSSES.

    Raises:
        ValueError: shapes that differ, T <= 0, or an unknown name.
    """
    choice("kl", kl, KL)
    choice("hidden_loss", hidden_loss, HIDDEN_LOSSES)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape"
        )
    positive("temperature", temperature)
    loss = HIDDEN_LOSSES[hidden_loss].function
    return loss(wide(student), wide(teacher), temperature, kl).mean()


def wide(z: Tensor) -> Tensor:
    """At least float32: T^2 magnifies rounding."""
    return z.float() if z.dtype.itemsize < 4 else z


def choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def positive(name: str, value: float) -> None:
    if not (real(value) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a finite number above 0")


def real(value: object) -> bool:
    return isinstance(value, (Real, torch.SymFloat)) and not isinstance(value, bool)
