"""Slots by neuron: the list for the torch path, the sorted form and the walk of the Triton path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssd_kernels import _segments, linear_topk, reference, sparse_linear
from ssd_kernels._segments import row_gradients, segments, sorted_slots
from tests.kernels.conftest import INTERPRETED, triton_only


def test_segments_by_hand() -> None:
    indices = torch.tensor([[4, 1], [1, 4], [1, 0]])
    kept = torch.tensor([[True, True], [False, True], [True, False]])
    group = segments(indices, kept)
    assert group.neurons.tolist() == [1, 4]
    assert group.offsets.tolist() == [0, 2]
    assert group.slots.tolist() == [1, 4, 0, 3]


def test_segments_of_nothing() -> None:
    group = segments(torch.tensor([[3]]), torch.tensor([[False]]))
    assert [len(field) for field in group] == [0, 0, 0]


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 30), (2, 150)])
@pytest.mark.parametrize("neurons", [1, 7, 2**15, 2**31])
@pytest.mark.parametrize("most", [0, 20, 8192])  # slots that are ranked
def test_slots_are_sorted_stably(
    impl: str,
    shape: tuple[int, int],
    neurons: int,
    most: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_segments, "MAX_RANKED", most)
    indices = torch.randint(neurons, shape, device=device)
    indices[-1, -1] = neurons - 1
    expected = indices.flatten().sort(stable=True)
    order = sorted_slots(indices, neurons, by_neuron=False)
    assert torch.equal(order.neurons.long(), expected.values)
    assert torch.equal(order.slots, expected.indices)
    assert order.offsets is None
    assert order.programs == indices.numel()


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (3, 5), (2, 150)])
@pytest.mark.parametrize("neurons", [1, 7, 300])
@pytest.mark.parametrize("most", [0, 20, 300, 8192])
def test_offsets_of_every_neuron(
    impl: str,
    shape: tuple[int, int],
    neurons: int,
    most: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the ranking kernel, and by bisection after it or after a sort."""
    monkeypatch.setattr(_segments, "MAX_RANKED", most)
    indices = torch.randint(neurons, shape, device=device)
    order = sorted_slots(indices, neurons)
    counts = torch.bincount(indices.flatten(), minlength=neurons)
    assert order.offsets is not None
    assert order.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert order.programs == neurons
    assert torch.equal(order.slots, indices.flatten().sort(stable=True).indices)


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("width", [0, 1, 33, 300, 2054])
@pytest.mark.parametrize("gated", [False, True])
def test_row_gradients(impl: str, width: int, gated: bool, device: str) -> None:
    indices = torch.randint(6, (7, 5), device=device)
    coefficients = torch.randn(7, 5, device=device).relu()
    inputs = torch.randn(7, width, device=device)
    gates = torch.randint(-1, 2, (7, 5), device=device).float()
    gates[0] = torch.nan
    given = coefficients, inputs, indices, 11, True, gates if gated else None
    gradient, sums = row_gradients(*given, ())
    if gated:
        coefficients = torch.where(gates <= 0, 0.0, coefficients)
    exact = reference.row_gradient(coefficients.double(), inputs.double(), indices, 11)
    torch.testing.assert_close(gradient, exact.float(), rtol=1e-5, atol=1e-5)
    expected = torch.zeros(11, device=device, dtype=torch.float64).index_add_(
        0, indices.flatten(), coefficients.double().flatten()
    )
    torch.testing.assert_close(sums, expected.float())
    assert not gradient[6:].any()


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_row_gradients_repeat_bit_for_bit(impl: str, device: str) -> None:
    indices = torch.randint(3, (40, 4), device=device)
    coefficients, inputs = torch.randn(40, 4, device=device), torch.randn(40, 20, device=device)
    given = coefficients, inputs, indices, 3, False, None, ()
    first, _ = row_gradients(*given)
    for _ in range(3 if INTERPRETED else 20):
        assert torch.equal(row_gradients(*given)[0], first)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_row_gradients_of_nothing(impl: str, device: str) -> None:
    empty = torch.zeros(0, 4, device=device)
    given = empty, torch.zeros(0, 3, device=device), empty.long(), 5, True, None, ()
    gradient, sums = row_gradients(*given)
    assert torch.equal(gradient, torch.zeros(5, 3, device=device))
    assert torch.equal(sums, torch.zeros(5, device=device))


class Layers:
    """An encoder and a decoder; how often a backward through both sorts the slots."""

    def __init__(self, device: str) -> None:
        self.x = torch.randn(6, 5, device=device)
        self.weights = [torch.randn(9, n, device=device, requires_grad=True) for n in (5, 4)]

    def loss(self, x: Tensor | None = None) -> Tensor:
        code = linear_topk(self.x if x is None else x, self.weights[0], 3, impl="triton")
        out = sparse_linear(code.values, code.indices, self.weights[1], impl="triton")
        return out.square().sum()

    def sorts(self, loss: Tensor, **options: bool) -> int:
        with mock.patch.object(_segments, "sorted_slots", wraps=sorted_slots) as sort:
            torch.autograd.backward(loss, **options)
        assert _segments._kept is None
        return sort.call_count


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_decoder_and_encoder_share_one_order(impl: str, device: str) -> None:
    layers = Layers(device)
    loss = layers.loss()
    assert layers.sorts(loss, retain_graph=True) == 1
    assert layers.sorts(loss) == 1  # and none is left from the backward before
    got = [w.grad for w in layers.weights]
    layers.weights = [w.detach().requires_grad_() for w in layers.weights]
    code = reference.linear_topk(layers.x, layers.weights[0], 3)
    out = reference.sparse_linear(code.values, code.indices, layers.weights[1])
    (2 * out.square().sum()).backward()
    for ours, theirs in zip(got, [w.grad for w in layers.weights], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_codes_do_not_share_an_order(impl: str, device: str) -> None:
    layers = Layers(device)
    assert layers.sorts(layers.loss() + layers.loss(layers.x.flip(0))) == 2
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        again = torch.utils.checkpoint.checkpoint(layers.loss, use_reentrant=False)
    assert layers.sorts(again) == 1


def through_a_view(indices: Tensor) -> Tensor:
    indices[0].fill_(2)
    return indices


CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "none": (lambda indices: indices.view(2, 2), 4),
    "in place": (lambda indices: indices.fill_(2), 4),
    "through a view": (through_a_view, 4),
    "other memory": (lambda indices: indices.clone(), 4),
    "other strides": (lambda indices: indices.t(), 4),
    "fewer samples": (lambda indices: indices[:1], 4),
    "more neurons": (lambda indices: indices, 5),
}


@pytest.mark.parametrize("impl", [triton_only("triton")])
@pytest.mark.parametrize("change", CHANGES)
def test_an_order_serves_one_state_of_the_indices(impl: str, change: str, device: str) -> None:
    indices = torch.tensor([[0, 1], [2, 3]], device=device)
    orders: list[Sequence[Tensor]] = []

    def hook(_: Tensor) -> None:
        orders.append(_segments.shared_order(indices, 4))
        alter, neurons = CHANGES[change]
        other = alter(indices)
        orders.append(_segments.shared_order(other, neurons))
        orders.append(sorted_slots(other, neurons))  # type: ignore[arg-type]

    leaf = torch.ones(1, requires_grad=True)
    product = leaf * 2
    product.register_hook(hook)
    product.sum().backward()
    first, again, expected = orders
    assert (again is first) == (change == "none")
    for got, want in zip(again, expected, strict=True):
        assert torch.equal(got, want)
    assert _segments._kept is None


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_outside_a_backward_no_order_is_kept(impl: str, device: str) -> None:
    indices = torch.tensor([[0, 1]], device=device)
    assert _segments.shared_order(indices, 2) is not _segments.shared_order(indices, 2)
    assert _segments._kept is None


@pytest.mark.parametrize("impl", [triton_only("triton")])
def test_the_next_backward_takes_no_order_of_one_that_failed(impl: str, device: str) -> None:
    indices = torch.tensor([[0, 1]], device=device)
    orders: list[Sequence[Tensor]] = []

    def hook(_: Tensor) -> None:
        orders.append(_segments.shared_order(indices, 2))
        if len(orders) == 1:
            raise RuntimeError("out of memory")

    product = torch.ones(1, requires_grad=True) * 2
    product.register_hook(hook)
    with pytest.raises(RuntimeError, match="out of memory"):
        product.sum().backward(retain_graph=True)
    product.sum().backward()
    assert orders[0] is not orders[1]


@pytest.mark.cuda
def test_a_captured_backward_sorts_at_every_replay() -> None:
    layers = Layers("cuda")

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layers.loss(), layers.weights)

    gradients()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    layers.x.normal_()
    graph.replay()
    for got, want in zip(captured, gradients(), strict=True):
        assert torch.equal(got, want)
