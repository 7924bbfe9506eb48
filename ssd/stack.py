"""What a step reads and writes of learners side by side: one tensor where each has its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd.learner import ENCODER, Learner
from ssd.sdmlp import SDMLP
from ssd_kernels._graded_code import Scratch


class Stack:
    """SDMLPs of one shape as one network of S blocks, whose rows follow one another.

    A learner's own tensors become views of the stack's, so either may be written to.

    Args:
        learners: S of them; their settings agree in trainer.together.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners, self.config = list(learners), learners[0].config
        self.models = [sdmlp(each) for each in learners]
        self.encoders = [model.encoder for model in self.models]
        self.weights = [
            _joined([p.detach() for p in own], own)
            for own in zip(*(each.parameters for each in learners), strict=True)
        ]  # [S R, d], [S R, C]
        momentum = [each.momentum for each in learners if each.momentum is not None]
        self.momentum = [_joined(own, own) for own in zip(*momentum, strict=True)] or None
        self.counts = self._each([e.counts for e in self.encoders])  # [S R]
        self.samples = self._each([e.samples for e in self.encoders])  # [S]
        self.dense_until = self._each([e.dense_until for e in self.encoders])  # [S]
        self.loss_sum = self._each([each.loss_sum for each in learners])  # [S]
        self.correct = self._each([each.correct for each in learners])  # [S]
        self.scratch = Scratch()
        self.lr, self.max_norm = self.setting("lr"), self.setting("max_norm")
        self.normalized = self.models[0].normalized
        self.neurons: Tensor | None = None  # [S, n] distilled
        self.positions: Tensor | None = None  # [S R]: where a neuron stands among them, else n

    @staticmethod
    def _each(own: Sequence[Tensor]) -> Tensor:
        return _joined([t.view(-1) for t in own], own)

    def __len__(self) -> int:
        return len(self.learners)

    def setting(self, name: str) -> Any:
        """A number of the config: itself, or [S] where there are several learners."""
        values = [getattr(each.config, name) for each in self.learners]
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=self.weights[0].dtype, device=self.weights[0].device)

    @property
    def teaches(self) -> bool:
        distiller = self.learners[0].distiller
        return distiller is not None and distiller.teaches

    @property
    def penalized(self) -> bool:
        return any(r.active for each in self.learners for r in each.regularizers)

    @property
    def reads_scores(self) -> bool:
        """Whether the hidden term takes scores before inhibition, so of silent neurons too."""
        return self.distils_hidden and self.config.hidden == "before"

    @property
    def distils_hidden(self) -> bool:
        """Whether the loss has a hidden term, in a task with a teacher."""
        distillers = [each.distiller for each in self.learners]
        return any(d is not None and d.teaches and d.lam > 0 for d in distillers)

    def alone(self, number: int) -> Stack:
        """The stack of one learner, which shares its tensors."""
        return self if len(self) == 1 else Stack([self.learners[number]])

    def written(self, neurons: Callable[[], Tensor]) -> None:
        """Says that the weights of these neurons alone were written to since they were read."""
        for encoder in self.encoders:
            if encoder.shadowed:
                encoder.updated(neurons())

    def load_task(self) -> None:
        """Notes which neurons are distilled in the task that begins."""
        if not self.distils_hidden:
            return
        distillers = [each.distiller for each in self.learners]
        self.neurons = torch.stack([d.neurons[ENCODER] for d in distillers if d is not None])
        size, device = self.neurons.shape[1], self.neurons.device
        if self.positions is None:
            self.positions = torch.empty_like(self.counts)
        places = self.positions.fill_(size).view(len(self), -1)
        places.scatter_(1, self.neurons, torch.arange(size, device=device).expand_as(self.neurons))


def _joined(own: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other; `views` then show their parts of the whole."""
    if len(own) == 1:
        return own[0]
    whole = torch.cat(list(own))
    for view, part in zip(views, whole.chunk(len(own)), strict=True):
        view.data = part.view(view.shape)
    return whole


def sdmlp(learner: Learner) -> SDMLP:
    assert isinstance(learner.model, SDMLP)
    return learner.model
