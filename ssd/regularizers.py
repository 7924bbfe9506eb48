"""Weight regularisers: quadratic penalties on what earlier tasks need, and slower learning.

The penalties are coefficient * sum over terms and parameters of importance * (p - p*)^2, no factor
1/2, from the second task on. EWC has one term per task, the others have one.

PENALTIES lists them. A new one is a class and a row there, and its settings in ssd.config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.activations import evaluating
from ssd.errors import UserError
from ssd.models import Network
from ssd_kernels._checks import in_range

# Batches from which EWC ("memory" variant) and MAS take importance, as in the SDMLP code.
IMPORTANCE_BATCHES = 6
IMPORTANCE_BATCH_SIZE = 512
FISHER_DIVISOR = 5 * 512  # of EWC's squared gradients, whatever the number of samples
SI_DAMPING = 0.1  # added to the squared change of a parameter in a task

Map = Callable[[Tensor], Tensor]
Gradient = Callable[[Map], Sequence[Tensor]]  # of a function of the logits [B, C]


class Regularizer(Protocol):
    """What the trainer asks of a penalty on the model's trained parameters, in their order."""

    @property
    def active(self) -> bool:
        """Whether it changes gradients yet."""
        ...

    def penalty(self) -> Tensor:
        """The penalty, 0-d float64."""
        ...

    def add_gradient(self, gradients: Sequence[Tensor]) -> None:
        """Adds the penalty's gradient to the gradients of the parameters, or scales them."""
        ...

    def rows(self) -> Tensor | None:
        """Ascending rows [n] of the parameters [R, ..] that it pulls; None: all."""
        ...

    def add_row_gradient(self, gradients: Sequence[Tensor], rows: Tensor) -> None:
        """add_gradient for some rows [n] only: gradients [n, ..], one per parameter."""
        ...

    def before_step(self, gradient: Gradient, labels: Tensor) -> None:
        """Called before a step writes, whether active or not.

        Args:
            gradient: of f(logits [B, C]) on the step's batch, in evaluation mode, per parameter.
            labels: [B].
        """
        ...

    def after_step(self) -> None:
        """Called when the step has written the parameters."""
        ...

    def followed(self) -> Sequence[Tensor]:
        """The penalty's own tensors that a step writes to."""
        ...

    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        """Learns what a finished task needs.

        Args:
            x: [N, d], its training inputs.
            order: [N], a random order of them.
            frequency: [R] float64, the share of them for which each neuron of the layer is active.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Quadratic:
    """The penalty sum of curvature / 2 * (p - anchor)^2 + constant, the form of them all.

    EWC's sum over tasks too: with A = sum_t F_t and B = sum_t F_t p_t, its gradient 2 (A p - B) is
    2 A (p - B / A). So two buffers per parameter suffice: curvature = 2 * coefficient * A and the
    anchor B / A, which loses no digits where p is close to it, unlike A p - B.

    Args:
        model: x [B, d] -> logits [B, C], with the parameters that its first task begins with.
        coefficient: strength.
    """

    BUFFERS: tuple[str, ...] = ("curvature", "anchor")  # in checkpoints, one tensor per parameter

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        self.model, self.coefficient = model, coefficient
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.curvature = [torch.zeros_like(p) for p in self.parameters]
        self.anchor = [p.detach().clone() for p in self.parameters]
        self.constant = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)
        self.tasks = 0
        self._rows = self._find_rows()

    @property
    def active(self) -> bool:
        return self.tasks > 0

    @torch.no_grad()
    def penalty(self) -> Tensor:
        total = self.constant.clone()
        for p, curvature, anchor in self._terms():
            total += (curvature.double() * (p.double() - anchor.double()).square()).sum() / 2
        return total

    @torch.no_grad()
    def add_gradient(self, gradients: Sequence[Tensor]) -> None:
        for gradient, (p, curvature, anchor) in zip(gradients, self._terms(), strict=True):
            gradient.addcmul_(curvature, p - anchor)

    def rows(self) -> Tensor | None:
        return self._rows

    @torch.no_grad()
    def add_row_gradient(self, gradients: Sequence[Tensor], rows: Tensor) -> None:
        for gradient, term in zip(gradients, self._terms(), strict=True):
            p, curvature, anchor = (tensor.index_select(0, rows) for tensor in term)
            gradient.addcmul_(curvature, p.sub_(anchor))

    def before_step(self, gradient: Gradient, labels: Tensor) -> None: ...

    def after_step(self) -> None: ...

    def followed(self) -> Sequence[Tensor]:
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        numbers = {"constant": self.constant, "tasks": torch.tensor(self.tasks, device="cpu")}
        return numbers | self._buffers()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.constant.copy_(state["constant"])
        self.tasks = int(state["tasks"])
        for name, tensor in self._buffers().items():
            tensor.copy_(state[name])
        self._rows = self._find_rows()

    def _buffers(self) -> dict[str, Tensor]:
        return {f"{b}/{n}": t for b in self.BUFFERS for n, t in enumerate(getattr(self, b))}

    def _terms(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.parameters, self.curvature, self.anchor, strict=True)

    @torch.no_grad()
    def _accumulate(self, importance: Sequence[Tensor]) -> None:
        """Adds importance to a single term and moves its anchor to the parameters."""
        for (p, curvature, anchor), added in zip(self._terms(), importance, strict=True):
            curvature.add_(added, alpha=2 * self.coefficient)
            anchor.copy_(p)
        self._count_task()

    def _count_task(self) -> None:
        self.tasks += 1
        self._rows = self._find_rows()

    def _find_rows(self) -> Tensor | None:
        if len({p.shape[:1] for p in self.parameters}) > 1:
            return None  # a neuron is not one row of each parameter
        pulled = torch.stack([c.reshape(len(c), -1).any(1) for c in self.curvature]).any(0)
        return None if pulled.all() else pulled.nonzero().squeeze(1)

    def _measure(self, x: Tensor, order: Tensor, loss: Map, importance: Map) -> list[Tensor]:
        """importance(gradient of loss(logits)) of each parameter, added up over the batches."""
        totals = [torch.zeros_like(p) for p in self.parameters]
        sampled = order[: IMPORTANCE_BATCHES * IMPORTANCE_BATCH_SIZE]
        for batch in sampled.split(IMPORTANCE_BATCH_SIZE):
            # In evaluation mode the GABA counters stand still.
            with evaluating(self.model), torch.enable_grad():
                gradients = torch.autograd.grad(loss(self.model(x[batch])), self.parameters)
            for total, gradient in zip(totals, gradients, strict=True):
                total += importance(gradient)
        return totals


def beta_loss(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """nll(log_softmax(beta logits), labels) summed over the batch, 0-d.

    Raises:
        ValueError: a label outside 0..C-1, on a CPU.
    """
    in_range("beta_loss", "labels", labels, logits.shape[-1])
    return F.nll_loss(F.log_softmax(beta * logits, dim=-1), labels, reduction="sum")


class EWC(Quadratic):
    """Elastic weight consolidation (Kirkpatrick et al. 2017), as the SDMLP code's "memory" variant.

    Args:
        model, coefficient: see Quadratic.
        beta: inverse temperature of the importance's loss.
    """

    def __init__(self, model: nn.Module, coefficient: float, beta: float) -> None:
        super().__init__(model, coefficient)
        self.beta = beta

    @torch.no_grad()
    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        """Merges the task's term: the anchor becomes the mean of both, weighted by importance.

        Importance: squared gradients of batch sums of the beta-softmax loss, label = prediction.
        """
        importance = self._measure(
            x,
            order,
            lambda z: beta_loss(z, z.argmax(-1), self.beta),
            lambda g: g**2 / FISHER_DIVISOR,
        )
        for (p, curvature, anchor), fisher in zip(self._terms(), importance, strict=True):
            added = 2 * self.coefficient * fisher
            total = curvature + added
            share = torch.where(total > 0, added / total, 0)
            self.constant += ((curvature * share).double() * (p - anchor).double() ** 2).sum() / 2
            curvature.copy_(total)
            anchor.lerp_(p, share)
        self._count_task()


class MAS(Quadratic):
    """Memory aware synapses (Aljundi et al. 2018), as in the SDMLP code.

    Importance is |gradient of mean(logits^2)|, added up over the batches and divided by the number
    of batches in the whole task.
    """

    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        batches = ceil(len(x) / IMPORTANCE_BATCH_SIZE)
        self._accumulate(
            self._measure(x, order, lambda z: z.square().mean(), lambda g: g.abs() / batches)
        )


class SI(Quadratic):
    """Synaptic intelligence (Zenke et al. 2017), as in the SDMLP code.

    At every step w -= g * (change of p), where g is the gradient of the batch's beta-softmax loss
    without penalty. At the end of a task importance += w / ((change of p in the task)^2 + 0.1),
    not clamped: after uphill steps it can be negative.

    Args:
        model, coefficient: see Quadratic.
        beta: inverse temperature of the loss.
    """

    BUFFERS = (*Quadratic.BUFFERS, "path")

    def __init__(self, model: nn.Module, coefficient: float, beta: float) -> None:
        super().__init__(model, coefficient)
        self.beta = beta
        self.path = [torch.zeros_like(p) for p in self.parameters]  # w
        self.before = [torch.zeros_like(p) for p in self.parameters]
        self.gradient: Sequence[Tensor] = ()

    def before_step(self, gradient: Gradient, labels: Tensor) -> None:
        self.gradient = gradient(lambda logits: beta_loss(logits, labels, self.beta))
        for before, p in zip(self.before, self.parameters, strict=True):
            before.copy_(p.detach())

    def followed(self) -> Sequence[Tensor]:
        return self.path

    @torch.no_grad()
    def after_step(self) -> None:
        for w, gradient, before, p in zip(
            self.path, self.gradient, self.before, self.parameters, strict=True
        ):
            w.addcmul_(gradient, before.sub_(p))

    @torch.no_grad()
    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        for w, (p, _, anchor) in zip(self.path, self._terms(), strict=True):
            w /= (p - anchor).square() + SI_DAMPING
        self._accumulate(self.path)
        for w in self.path:
            w.zero_()


class L2(Quadratic):
    """Pulls every parameter alike to its value at the end of the last task."""

    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        added = torch.zeros_like if self.active else torch.ones_like
        self._accumulate([added(p) for p in self.parameters])


class Metaplasticity:
    """Slows the addresses of neurons that earlier tasks use; their output weights stay plastic.

    The gradient of neuron j's address is divided by 1 + coefficient * use_j. use_j adds up, over
    the tasks so far, the neuron's activation frequency divided by the mean over neurons.

    Args:
        model: a Network; the parameters of its layer have a row for each neuron.
        coefficient: strength.
    """

    def __init__(self, model: Network, coefficient: float) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        own = {id(p) for p in model.get_submodule(model.layer).parameters()}
        self.numbers = [n for n, p in enumerate(trained) if id(p) in own]
        if not self.numbers:
            raise UserError(
                f"metaplasticity needs a layer with weights, and {model.layer!r} has none; leave "
                "it out, and use --protection none with ssd"
            )
        self.coefficient, self.tasks = coefficient, 0
        first = trained[self.numbers[0]]
        self.use = first.new_zeros(len(first))
        self.rates = torch.ones_like(self.use)

    @property
    def active(self) -> bool:
        return self.tasks > 0

    def penalty(self) -> Tensor:
        return self.use.new_zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add_gradient(self, gradients: Sequence[Tensor]) -> None:
        self._scale(gradients, self.rates)

    def rows(self) -> Tensor | None:
        return torch.empty(0, dtype=torch.int64, device=self.use.device)

    @torch.no_grad()
    def add_row_gradient(self, gradients: Sequence[Tensor], rows: Tensor) -> None:
        self._scale(gradients, self.rates.index_select(0, rows))

    def before_step(self, gradient: Gradient, labels: Tensor) -> None: ...

    def after_step(self) -> None: ...

    def followed(self) -> Sequence[Tensor]:
        return ()

    @torch.no_grad()
    def end_task(self, x: Tensor, order: Tensor, frequency: Tensor) -> None:
        mean = frequency.mean().clamp(min=torch.finfo(frequency.dtype).tiny)
        self.use += (frequency / mean).to(self.use)
        self.tasks += 1
        self._rate()

    def state_dict(self) -> dict[str, Tensor]:
        return {"use": self.use, "tasks": torch.tensor(self.tasks, device="cpu")}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.use.copy_(state["use"])
        self.tasks = int(state["tasks"])
        self._rate()

    def _rate(self) -> None:
        self.rates.copy_(1 / (1 + self.coefficient * self.use))

    def _scale(self, gradients: Sequence[Tensor], rates: Tensor) -> None:
        for number in self.numbers:
            gradient = gradients[number]
            gradient.mul_(rates.view(-1, *[1] * (gradient.dim() - 1)))


# {name in a method: class}. The class takes the model and, by name, the settings of ssd.config that
# begin with the penalty's name: ewc_beta is its argument beta. Metaplasticity comes last, as it
# slows the pull of the penalties too.
PENALTIES: dict[str, Callable[..., Regularizer]] = {
    "ewc": EWC,
    "mas": MAS,
    "si": SI,
    "l2": L2,
    "metaplasticity": Metaplasticity,
}
