"""The training step as one writes it first: dense eager autograd and an optimiser.

The baseline of train_bench. As in public code, SSD's teacher runs at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainSDMLP(nn.Module):
    """SDMLP, dense: x [B, d] -> logits [B, C] and hidden [B, R].

    Args:
        encoder: [R, d]. decoder: [R, C]. k: active neurons.
        counts: [R] how often each neuron was active; None: the GABA switch is over.
        anneal_samples: activations until a neuron is inhibited in full.
    """

    counts: Tensor | None

    def __init__(
        self,
        encoder: Tensor,
        decoder: Tensor,
        k: int,
        counts: Tensor | None = None,
        anneal_samples: int = 1,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(encoder.shape[1], encoder.shape[0], bias=False)
        self.decoder = nn.Linear(decoder.shape[0], decoder.shape[1], bias=False)
        self.k, self.anneal_samples = k, anneal_samples
        self.register_buffer("counts", None if counts is None else counts.clone())
        with torch.no_grad():
            self.encoder.weight.copy_(encoder)
            self.decoder.weight.copy_(decoder.T)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.encoder(F.normalize(x.relu(), dim=1)).relu()
        inhibition = a.detach().topk(self.k + 1).values[:, -1:]
        if self.counts is not None:
            inhibition = inhibition * (2 * self.counts / self.anneal_samples - 1).clamp(-1, 1)
        hidden = (a - inhibition).relu()
        if self.training and self.counts is not None:
            self.counts += (hidden > 0).sum(0)
        return self.decoder(hidden), hidden


class PlainStep:
    """Forward, loss, backward, clip, SGD, projection; with a teacher it is SSD's step."""

    def __init__(
        self, model: PlainSDMLP, teacher: PlainSDMLP | None, neurons: Tensor, lr: float
    ) -> None:
        self.model, self.teacher, self.neurons = model, teacher, neurons
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.loss = self._loss

    def compiled(self) -> PlainStep:
        torch.compiler.reset()  # another size would count as one more recompilation
        self.loss = torch.compile(self._loss)
        return self

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits, hidden = self.model(x)
        loss = F.cross_entropy(logits, y)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher_logits, teacher_hidden = self.teacher(x)
        columns = self.neurons
        l_hidden = _kl(hidden[:, columns], teacher_hidden[:, columns])
        return 0.7 * loss + 0.3 * (0.1 * l_hidden + 0.9 * _kl(logits, teacher_logits))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.clamp_(min=0)
            encoder = self.model.encoder.weight
            encoder /= encoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return loss.detach()


def _kl(student: Tensor, teacher: Tensor, temperature: float = 8.0) -> Tensor:
    p = F.log_softmax(student / temperature, dim=1)
    q = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)
