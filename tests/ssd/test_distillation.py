"""The distiller: its terms, its selection, and that it attaches to any module with Top-K layers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.distillation import (
    Distiller,
    activations_of,
    count_activations,
    distillation_loss,
    preactivations_of,
    select_subnetwork,
)
from ssd_kernels import topk
from ssd_kernels.nn import KSparseMLP, TopK, TopKLinear


class KWinnersMLP(nn.Module):
    """Three linear layers, two k-winners layers of different k."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.winners1 = nn.Linear(12, 40), TopK(6)
        self.second, self.winners2 = nn.Linear(40, 30), TopK(4)
        self.head = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.winners1(self.first(x))
        return self.head(self.winners2(self.second(hidden)))


class Foreign(nn.Module):
    """A Top-K layer that knows nothing of ours, and has no k."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * (x >= x.topk(3, dim=-1).values[:, -1:])


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_distillation_loss_is_the_formula(kl: str) -> None:
    student, teacher = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    pair = (q.log(), p) if kl == "reverse" else (p.log(), q)
    expected = 9 * F.kl_div(*pair, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0, kl), expected)
    assert distillation_loss(student, student, 3.0, kl) == 0


def test_one_neuron_has_nothing_to_distil() -> None:
    assert distillation_loss(torch.randn(4, 1), torch.randn(4, 1), 8.0) == 0


def test_selection_takes_the_most_frequent_and_the_lower_of_equals() -> None:
    frequency = torch.tensor([3, 9, 3, 0, 9, 3])
    assert select_subnetwork(frequency, 2).tolist() == [1, 4]
    assert select_subnetwork(frequency, 4).tolist() == [0, 1, 2, 4]


def test_activations_of_a_code_are_those_of_the_dense_layer() -> None:
    dense = torch.randn(20, 50).relu()
    values, indices, *_ = topk(dense, 9)
    kept = torch.zeros_like(dense).scatter(1, indices, values)
    for neurons in (torch.tensor([0, 7, 49]), torch.arange(50), torch.tensor([13])):
        sparse = activations_of(topk(dense, 9), neurons)
        assert torch.equal(sparse, activations_of(kept, neurons))


def test_activations_of_a_code_pass_gradients_to_its_values() -> None:
    code = topk(torch.rand(3, 8, dtype=torch.float64), 4)
    neurons = torch.tensor([1, 2, 5])

    def read(values: Tensor) -> Tensor:
        return activations_of(code._replace(values=values), neurons)

    assert torch.autograd.gradcheck(read, code.values.clone().requires_grad_())


def test_preactivations_of_every_kind_of_layer() -> None:
    x, neurons = torch.randn(6, 12), torch.tensor([2, 9])
    layer = TopKLinear(12, 20, 3)
    expected = F.linear(x, layer.weight, layer.bias).relu()[:, neurons]
    torch.testing.assert_close(preactivations_of(layer, x, neurons), expected)
    torch.testing.assert_close(preactivations_of(TopK(3), x, neurons), x[:, neurons].relu())


@pytest.mark.parametrize("hidden", ["after", "before"])
def test_attaches_to_a_three_layer_mlp_with_two_k_winners_layers(hidden: str) -> None:
    model = KWinnersMLP().double()
    distiller = Distiller(model, 0.6, 0.3, 4.0, subnetwork=1.5, hidden=hidden)
    assert distiller.layers == {"winners1": 6, "winners2": 4}
    x, y = torch.randn(50, 12).double(), torch.randint(0, 5, (50,))
    distiller.begin_task(x)
    assert not distiller.teaches
    first = distiller.loss(model(x), y, torch.arange(50))
    torch.testing.assert_close(first, F.cross_entropy(model(x), y))
    distiller.end_task(x)

    teacher = copy.deepcopy(model)
    inner = model.winners1(model.first(x))
    frequency = (inner > 0).sum(0)
    chosen = frequency.sort(descending=True, stable=True).indices[:9].sort().values
    assert torch.equal(distiller.neurons["winners1"], chosen)
    assert len(distiller.neurons["winners2"]) == 6

    new, labels = torch.randn(30, 12).double(), torch.randint(0, 5, (30,))
    distiller.begin_task(new)
    assert distiller.teaches
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    batch = torch.tensor([4, 8, 15, 16])

    def hidden_of(network: KWinnersMLP) -> list[Tensor]:
        a1 = network.first(new[batch])
        h1 = network.winners1(a1)
        a2 = network.second(h1)
        if hidden == "before":
            return [a1.relu(), a2.relu()]
        return [h1, network.winners2(a2)]

    terms = [
        distillation_loss(s[:, n], t.detach()[:, n], 4.0)
        for s, t, n in zip(
            hidden_of(model), hidden_of(teacher), distiller.neurons.values(), strict=True
        )
    ]
    logit_term = distillation_loss(model(new[batch]), teacher(new[batch]).detach(), 4.0)
    cross_entropy = F.cross_entropy(model(new[batch]), labels[batch])
    expected = 0.6 * cross_entropy + 0.4 * (0.3 * (terms[0] + terms[1]) / 2 + 0.7 * logit_term)
    actual = distiller.loss(model(new[batch]), labels[batch], batch)
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_attaches_to_sparse_and_foreign_layers() -> None:
    x, y = torch.randn(20, 12), torch.randint(0, 4, (20,))
    mixed = nn.Sequential(nn.Linear(12, 25), Foreign(), KSparseMLP(25, 30, 4, 5))
    distiller = Distiller(mixed, layers={"1": 3, "2.encoder": 5})
    distiller.end_task(x)
    distiller.begin_task(x)
    assert {n: len(i) for n, i in distiller.neurons.items()} == {"1": 3, "2.encoder": 5}
    distiller.loss(mixed(x), y, torch.arange(20)).backward()
    assert all(p.grad is not None for p in mixed.parameters())
    distiller.remove()
    assert not mixed[1]._forward_hooks


def test_the_teacher_is_frozen_and_run_once_a_task() -> None:
    model = KSparseMLP(6, 20, 3, 4)
    x = torch.randn(10, 6)
    distiller = Distiller(model)
    distiller.end_task(x)
    distiller.begin_task(x)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = distiller.teacher_logits.clone()
    for _ in range(3):
        loss = distiller.loss(model(x), torch.zeros(10, dtype=torch.long), torch.arange(10))
        with torch.no_grad():
            for p, g in zip(
                model.parameters(),
                torch.autograd.grad(loss, list(model.parameters())),
                strict=True,
            ):
                p.sub_(g)
    assert len(calls) == 3
    assert torch.equal(before, distiller.teacher_logits)
    assert not distiller.teacher_logits.requires_grad


def test_counting_leaves_mode_hooks_and_weights_alone() -> None:
    model = KWinnersMLP().train()
    x = torch.randn(30, 12)
    counts = count_activations(model, ["winners1", "winners2"], x)
    assert model.training
    assert not model.winners1._forward_hooks
    assert torch.equal(counts["winners1"], (model.winners1(model.first(x)) > 0).sum(0))
    assert counts["winners1"].sum() <= 30 * 6


@pytest.mark.parametrize("logits", ["all", "seen"])
def test_state_dict_round_trip(logits: str) -> None:
    model, x, y = KWinnersMLP(), torch.randn(25, 12), torch.arange(25) % 3
    one = Distiller(model, logits=logits, frequency="accumulated")
    one.end_task(x, y)
    one.begin_task(x)
    two = Distiller(model, logits=logits, frequency="accumulated")
    two.load_state_dict(one.state_dict())
    batch = torch.arange(5)
    assert torch.equal(
        one.loss(model(x[batch]), y[batch], batch), two.loss(model(x[batch]), y[batch], batch)
    )
    one.end_task(x + 1, y + 2)
    two.end_task(x + 1, y + 2)
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl": "sideways"}, "sideways"),
        ({"layers": ["nowhere"]}, "nowhere"),
        ({"layers": ["first"]}, "first"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distiller(KWinnersMLP(), **arguments)


def test_a_model_without_top_k_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no TopK"):
        Distiller(nn.Linear(3, 2))


def test_seen_logits_need_labels() -> None:
    with pytest.raises(ValueError, match="labels"):
        Distiller(KWinnersMLP(), logits="seen").end_task(torch.randn(3, 12))
