"""A step on the neurons that fire in a batch, dense among them.

While inhibition is being switched on, a sample may activate too many neurons for a sparse code, and
yet a batch leaves a good part of the layer silent. A silent neuron has no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd.learner import ENCODER
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
    rows = _rows(trainer, number, hidden)
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
    trainer.update(each, [back.T @ address, hidden.T @ slopes], rows)
    trainer.note(each, output.loss.sum(), logits, labels)


def _rows(trainer: Trainer, number: int, hidden: Tensor) -> Tensor | None:
    """Ascending neurons [n] that fire or that a penalty may pull; None: all, or most."""
    each = trainer.learners[number]
    firing = hidden.amax(0) > 0
    if any(r.active for r in each.regularizers):
        penalized = each.penalized_rows()
        if penalized is None:
            return None
        firing[penalized] = True
    rows = firing.nonzero().squeeze(1)
    return rows if len(rows) < MOST * len(firing) else None
