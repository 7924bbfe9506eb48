"""A step on the neurons that fire in a batch, dense among them.

While inhibition is being switched on, a sample may activate too many neurons for a sparse code, and
yet a batch leaves a good part of the layer silent. A silent neuron has no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd.learner import ENCODER, Learner
from ssd.sdmlp import SDMLP
from ssd_kernels import distill

if TYPE_CHECKING:
    from ssd.trainer import Trainer

# A larger share of the neurons is not worth gathering.
MOST = 0.8


@torch.no_grad()
def active_step(trainer: Trainer, number: int, address: Tensor, samples: Tensor) -> None:
    """One step of a learner: what the dense step does, up to rounding, at less cost.

    No neuron may be excited: with g > 0 whatever fires has a positive activation, so that one mask
    serves both layers. The hidden term must be that after inhibition.

    Args:
        number: of the learner. address: [B, d]. samples: [B], positions in its training set.
    """
    each = trainer.learners[number]
    assert isinstance(each.model, SDMLP)
    hidden = each.model.encoder.activations(address)
    decoder = each.parameters[1].detach()
    firing = (hidden.amax(0) > 0).nonzero().squeeze(1)
    rows = firing if 0 < len(firing) < MOST * hidden.shape[1] else None
    if rows is not None:
        hidden, decoder = hidden.index_select(1, rows), decoder.index_select(0, rows)
    labels = each.labels[samples]
    logits = hidden @ decoder
    terms = trainer.terms([number], [samples])
    chosen = places = torch.empty(0, dtype=torch.int64)
    if trainer.positions is not None and terms:
        assert each.distiller is not None
        chosen = each.distiller.neurons[ENCODER]
        places = chosen if rows is None else torch.searchsorted(rows, chosen)
        if rows is not None:
            places = places.clamp_(max=len(rows) - 1)
            places = torch.where(rows[places] == chosen, places, -1)
        terms["target_hidden"] = each.distiller.teacher_hidden[ENCODER][samples]
        terms["hidden"] = torch.where(places < 0, 0.0, hidden[:, places])
    output = distill(logits, labels, **terms)
    slopes = output.grad_logits / len(samples)
    back = slopes @ decoder.T
    if output.grad_hidden is not None:
        inside = places >= 0
        back.index_add_(1, places[inside], output.grad_hidden[:, inside] / len(samples))
    back *= hidden > 0
    trainer.update(each, *_widened(each, [back.T @ address, hidden.T @ slopes], rows))
    trainer.note(each, output.loss.sum(), logits, labels)


def _widened(
    each: Learner, gradients: list[Tensor], rows: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the firing rows with zeros for those that a penalty alone may pull."""
    if rows is None or not any(r.active for r in each.regularizers):
        return gradients, rows
    penalized, count, places = each.penalized_rows(), each.config.neurons, rows
    if penalized is not None:
        every = torch.cat([rows, penalized]).unique()
        penalized, count, places = every, len(every), torch.searchsorted(every, rows)
    wide = [g.new_zeros(count, g.shape[1]).index_copy_(0, places, g) for g in gradients]
    return wide, penalized
