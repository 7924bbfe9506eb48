"""Weight regularisers: quadratic penalties on what earlier tasks need.

A regulariser sees the model at the end of each task and gives the gradient of its penalty. The
penalty is coefficient * sum over tasks t and parameters of F_t (p - p_t)^2 (no factor 1/2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.config import FISHER_BATCH_SIZE, FISHER_BATCHES, FISHER_DIVISOR
from ssd.distillation import evaluating


class Regularizer(Protocol):
    """What the trainer asks of a regulariser; parameters are those of the model, in order."""

    @property
    def active(self) -> bool:
        """Whether there is a penalty yet."""
        ...

    def penalty(self) -> Tensor:
        """The penalty, 0-d."""
        ...

    def add_gradient(self, gradients: list[Tensor]) -> None:
        """Adds the penalty's gradient to the gradients of the parameters, in place."""
        ...

    def before_step(self, x: Tensor, y: Tensor) -> None: ...

    def after_step(self) -> None: ...

    def end_task(self, x: Tensor, order: Tensor) -> None:
        """Takes in a finished task: inputs [N, d] and a random order [N] to sample them in."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017), as the SDMLP code's "memory" variant.

    sum_t F_t (p - p_t)^2 = A p^2 - 2 B p + c with A = sum_t F_t, B = sum_t F_t p_t and
    c = sum_t F_t p_t^2: two buffers a parameter, whatever the number of tasks.

    Args:
        model: x [B, d] -> logits [B, C].
        coefficient: strength. beta: inverse temperature of the importance's loss.
    """

    def __init__(self, model: nn.Module, coefficient: float, beta: float) -> None:
        self.model, self.coefficient, self.beta = model, coefficient, beta
        parameters = list(model.parameters())
        self.importance = [torch.zeros_like(p) for p in parameters]  # A
        self.pull = [torch.zeros_like(p) for p in parameters]  # B
        self.constant = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self.tasks = 0

    @property
    def active(self) -> bool:
        return self.tasks > 0

    def before_step(self, x: Tensor, y: Tensor) -> None: ...

    def after_step(self) -> None: ...

    def penalty(self) -> Tensor:
        """The penalty at the present parameters, 0-d float64 (differences of large sums)."""
        total = self.constant.clone()
        for p, a, b in zip(self.model.parameters(), self.importance, self.pull, strict=True):
            point = p.detach().double()
            total += ((a * point - 2 * b) * point).sum()
        return self.coefficient * total

    @torch.no_grad()
    def add_gradient(self, gradients: list[Tensor]) -> None:
        for gradient, p, a, b in zip(
            gradients, self.model.parameters(), self.importance, self.pull, strict=True
        ):
            gradient.add_(torch.addcmul(-b, a, p), alpha=2 * self.coefficient)

    def end_task(self, x: Tensor, order: Tensor) -> None:
        for total, pull, p, fisher in zip(
            self.importance, self.pull, self.model.parameters(), self.fisher(x, order), strict=True
        ):
            total += fisher
            pull += fisher * p.detach()
            self.constant += (fisher.double() * p.detach().double().square()).sum()
        self.tasks += 1

    def fisher(self, x: Tensor, order: Tensor) -> list[Tensor]:
        """Importance of each parameter: squared gradients of batch sums of the loss.

        The loss is nll(log_softmax(beta logits), label), summed over a batch; the label is the
        model's own prediction.
        """
        parameters = list(self.model.parameters())
        fisher = [torch.zeros_like(p) for p in parameters]
        with evaluating(self.model), torch.enable_grad():
            for batch in order[: FISHER_BATCHES * FISHER_BATCH_SIZE].split(FISHER_BATCH_SIZE):
                logits = self.model(x[batch])
                scaled = F.log_softmax(self.beta * logits, dim=-1)
                loss = F.nll_loss(scaled, logits.argmax(-1), reduction="sum")
                for total, gradient in zip(
                    fisher, torch.autograd.grad(loss, parameters), strict=True
                ):
                    total += gradient.square() / FISHER_DIVISOR
        return fisher

    def state_dict(self) -> dict[str, Tensor]:
        state = {"constant": self.constant, "tasks": torch.tensor(self.tasks)}
        for number, (a, b) in enumerate(zip(self.importance, self.pull, strict=True)):
            state |= {f"importance/{number}": a, f"pull/{number}": b}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.constant.copy_(state["constant"])
        self.tasks = int(state["tasks"])
        for number, (a, b) in enumerate(zip(self.importance, self.pull, strict=True)):
            a.copy_(state[f"importance/{number}"])
            b.copy_(state[f"pull/{number}"])
