"""A step on the neurons that fire in a batch, dense among them.

While inhibition is being switched on, a sample may activate too many neurons for a sparse code, and
yet a batch leaves a good part of the layer silent. A silent neuron has no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssd.distill import distill
from ssd.learner import ENCODER, Learner
from ssd.sdmlp import SDMLP

if TYPE_CHECKING:
    from ssd.trainer import Trainer


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
    hidden, rows = each.model.encoder.active(address)
    own = hidden.T  # [n, B], as it lies in memory
    decoder = each.parameters[1].detach()
    everything = len(rows) == len(decoder)
    if not everything:
        decoder = decoder.index_select(0, rows)
    labels = each.labels[samples]
    # Classes first: a CPU's product with few columns on the right takes several times as long.
    logits = (decoder.T @ own).T.contiguous()
    terms = trainer.terms([number], [samples])
    places, present = rows, None
    if trainer.positions is not None and terms:
        assert each.distiller is not None
        chosen = each.distiller.neurons[ENCODER]
        terms["target_hidden"] = each.distiller.teacher_hidden[ENCODER][samples]
        terms["hidden"] = logits.new_zeros(len(labels), len(chosen))
        if len(rows) > 0:
            places = torch.searchsorted(rows, chosen).clamp_(max=len(rows) - 1)
            present = (rows[places] == chosen).to(own.dtype).unsqueeze(1)
            terms["hidden"] = (own.index_select(0, places) * present).T
    output = distill(logits, labels, **terms)
    slopes = output.grad_logits / len(samples)
    back = decoder @ slopes.T
    if output.grad_hidden is not None and present is not None:
        back.index_add_(0, places, output.grad_hidden.T * (present / len(samples)))
    # In place what the gradient of relu is: a product with a mask takes far longer.
    torch.ops.aten.threshold_backward.grad_input(back, own, 0.0, grad_input=back)
    gradients = [back @ address, (slopes.T @ hidden).T.contiguous()]
    trainer.update(each, *_widened(each, gradients, None if everything else rows))
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
