"""EWC against its formula, written as the sum over tasks."""

import torch
from torch import nn
from torch.nn import functional as F

from ssd.config import IMPORTANCE_BATCH_SIZE, IMPORTANCE_BATCHES
from ssd.regularizers import EWC


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double()


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def test_two_buffers_equal_the_sum_over_tasks() -> None:
    model = small_model()
    ewc = EWC(model, coefficient=7.0, beta=0.3)
    assert not ewc.active
    snapshots = []
    for _ in range(4):
        perturb(model)
        x = torch.randn(40, 6).double()
        fisher = ewc.fisher(x, torch.randperm(40))
        ewc.end_task(x, torch.arange(40))
        snapshots.append((fisher, [p.detach().clone() for p in model.parameters()]))
    perturb(model)
    parameters = list(model.parameters())
    naive = 7.0 * sum(
        (f * (p - anchor) ** 2).sum()
        for fisher, anchors in snapshots
        for f, p, anchor in zip(fisher, parameters, anchors, strict=True)
    )
    torch.testing.assert_close(ewc.penalty(), naive.detach(), rtol=1e-10, atol=1e-14)
    gradients = [torch.zeros_like(p) for p in parameters]
    ewc.add_gradient(gradients)
    for ours, expected in zip(gradients, torch.autograd.grad(naive, parameters), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_importance_is_the_squared_gradient_of_batch_sums() -> None:
    """Six batches of 512 at most; label = own prediction; divided by 5 * 512."""
    model, beta = small_model(), 0.4
    x = torch.randn(IMPORTANCE_BATCHES * IMPORTANCE_BATCH_SIZE + 100, 6).double()
    order = torch.randperm(len(x))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for number in range(6):
        batch = x[order[512 * number : 512 * (number + 1)]]
        logits = model(batch)
        loss = sum(-F.log_softmax(beta * row, dim=0)[row.argmax()] for row in logits)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = [e + g**2 / (5 * 512) for e, g in zip(expected, gradients, strict=True)]
    for ours, theirs in zip(EWC(model, 1.0, beta).fisher(x, order), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_importance_changes_nothing_in_the_model() -> None:
    """The public code's Fisher pass advances the GABA counters; ours must not."""
    from ssd.sdmlp import SDMLP

    model = SDMLP(6, 30, 4, 3, anneal_samples=50).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    EWC(model, 1.0, 0.5).end_task(torch.randn(20, 6), torch.arange(20))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_state_dict_round_trip() -> None:
    model = small_model()
    one, two = EWC(model, 2.0, 0.3), EWC(model, 2.0, 0.3)
    one.end_task(torch.randn(20, 6).double(), torch.arange(20))
    two.load_state_dict(one.state_dict())
    perturb(model)
    assert one.penalty() > 0
    assert torch.equal(one.penalty(), two.penalty())
    assert two.active
