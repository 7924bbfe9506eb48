"""The modules: shapes, gradients, state_dict, torch.compile, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssd_kernels import linear_topk
from ssd_kernels.nn import KSparseMLP, SparseLinear, TopK, TopKLinear


@pytest.mark.parametrize("batch", [(), (0,), (4,), (2, 3)])
def test_shapes(batch: tuple[int, ...], device: str) -> None:
    x = torch.randn(*batch, 8, device=device)
    layer = TopKLinear(8, 30, 5, device=device)
    code = layer(x)
    assert code.values.shape == code.indices.shape == (*batch, 5)
    assert SparseLinear(30, 7, device=device)(code.values, code.indices).shape == (*batch, 7)
    assert KSparseMLP(8, 30, 7, 5, device=device)(x).shape == (*batch, 7)
    assert TopK(3)(x).shape == x.shape


def test_topk_keeps_the_largest_positive(device: str) -> None:
    x = torch.tensor([[1.0, -1.0, 3.0, 2.0], [-1.0, -2.0, 5.0, 0.0]], device=device)
    x.requires_grad_()
    out = TopK(2)(x)
    assert out.tolist() == [[0.0, 0.0, 3.0, 2.0], [0.0, 0.0, 5.0, 0.0]]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inhibition", ["mask", "subtract"])
def test_mlp_equals_the_dense_computation(bias: bool, inhibition: str, device: str) -> None:
    model = KSparseMLP(6, 20, 4, 3, bias, inhibition, device, torch.float64)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 6, device=device, dtype=torch.float64, requires_grad=True)
    leaves = [x, *model.parameters()]
    got = torch.autograd.grad(model(x).square().sum(), leaves)
    want = torch.autograd.grad(dense(model, x, inhibition).square().sum(), leaves)
    torch.testing.assert_close(model(x), dense(model, x, inhibition))
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected)


def dense(model: KSparseMLP, x: Tensor, inhibition: str) -> Tensor:
    """With [B, R] activations, by torch.topk."""
    encoder, decoder = model.encoder, model.decoder
    hidden = torch.relu(nn.functional.linear(x, encoder.weight, encoder.bias))
    ranked = hidden.topk(encoder.k + 1).values
    kept = hidden * (hidden >= ranked[:, -2:-1])
    if inhibition == "subtract":
        kept = (kept - ranked[:, -1:].detach()).relu()
    return nn.functional.linear(kept, decoder.weight.t(), decoder.bias)


def test_state_dict_round_trip(device: str) -> None:
    model = KSparseMLP(6, 20, 4, 3, device=device)
    names = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
    assert sorted(model.state_dict()) == sorted(names)
    twin = KSparseMLP(6, 20, 4, 3, device=device)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 6, device=device)
    assert torch.equal(twin(x), model(x))
    assert set(KSparseMLP(6, 20, 4, 3, bias=False).state_dict()) == set(names[::2])


def test_dtype_and_device_are_taken(device: str) -> None:
    model = KSparseMLP(6, 20, 4, 3, device=device, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, device)}
    assert model(torch.randn(2, 6, device=device, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_compiled_mlp(device: str) -> None:
    torch._dynamo.reset()
    model = KSparseMLP(6, 20, 4, 3, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(compiled(x), model(x))
    parameters = list(model.parameters())
    got = torch.autograd.grad(compiled(x).square().sum(), parameters)
    want = torch.autograd.grad(model(x).square().sum(), parameters)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_learns(device: str) -> None:
    x = torch.randn(64, 8, device=device)
    model = KSparseMLP(8, 64, 8, 8, device=device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_inhibition_reaches_the_op(device: str) -> None:
    layer = TopKLinear(6, 20, 3, inhibition="subtract", device=device)
    x = torch.randn(4, 6, device=device)
    expected = linear_topk(x, layer.weight, 3, layer.bias, inhibition="subtract")
    assert torch.equal(layer(x).values, expected.values)


def test_repr_names_the_sizes() -> None:
    text = repr(KSparseMLP(6, 20, 4, 3, bias=False, inhibition="subtract"))
    assert "in_features=6, neurons=20, k=3, bias=False, inhibition=subtract" in text
    assert "neurons=20, out_features=4, bias=False" in text
    assert repr(TopK(3)) == "TopK(k=3)"
