"""The autoencoders against dense PyTorch in fp64: codes, losses, gradients, dead neurons."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssd_kernels import sae as module
from ssd_kernels.sae import BatchTopKSAE, TopKSAE, annealed_k, fvu, l0

WIDTH, NEURONS, K = 6, 40, 5
KINDS = [TopKSAE, BatchTopKSAE]


def drawn(kind: type[TopKSAE], device: str, **settings: object) -> TopKSAE:
    """Of random weights, biases included, in fp64."""
    settings = {"device": device, "dtype": torch.float64, **settings}
    sae = kind(WIDTH, NEURONS, settings.pop("k", K), **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae


def inputs(device: str, *batch: int) -> Tensor:
    return torch.randn(*(batch or (30,)), WIDTH, device=device, dtype=torch.float64)


def scores(sae: TopKSAE, x: Tensor) -> Tensor:
    return (x - sae.decoder.bias) @ sae.encoder.weight.T + sae.encoder.bias


def dense_code(sae: TopKSAE, x: Tensor) -> Tensor:
    """[B, R], by torch.topk over the rows or over the batch."""
    hidden = scores(sae, x).relu()
    if not isinstance(sae, BatchTopKSAE):
        least = hidden.topk(sae.k).values[:, -1:]
    elif sae.training:
        least = hidden.flatten().topk(int(sae.k * len(x))).values[-1]
    else:
        return hidden * (hidden > sae.threshold)
    return hidden * (hidden >= least)


def dense_losses(sae: TopKSAE, x: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """FVU and AuxK loss, each from its formula."""
    output = dense_code(sae, x) @ sae.decoder.weight + sae.decoder.bias
    variance = (x - x.mean(0)).square().sum()
    error = x - output
    count = int(dead.sum())
    if count == 0:
        return error.square().sum() / variance, x.new_zeros(())
    candidates = scores(sae, x).masked_fill(~dead, -torch.inf)
    top = candidates.topk(min(sae.auxk, count))
    code = torch.zeros_like(candidates).scatter(1, top.indices, top.values)
    estimate = code @ sae.decoder.weight
    auxk = (estimate - error.detach()).square().sum() / variance * min(1, count / sae.auxk)
    return error.square().sum() / variance, auxk


def scattered(sae: TopKSAE, values: Tensor, indices: Tensor) -> Tensor:
    return values.new_zeros(*values.shape[:-1], sae.neurons).scatter(-1, indices, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", [0, 2, 20])
def test_losses_and_gradients_equal_the_dense_ones(
    kind: type[TopKSAE], dead: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORKSPACE", 64)  # several blocks of rows
    sae = drawn(kind, device, dead_after=100, auxk=4)
    with torch.no_grad():
        sae.encoder.bias[:dead] -= 50  # negative everywhere
    x = inputs(device).requires_grad_()
    sae.samples += 90
    sae.last_active[dead:] = 90
    out = sae(x)
    assert sae.dead.tolist() == [True] * dead + [False] * (NEURONS - dead)
    expected = dense_losses(sae, x, sae.dead)
    torch.testing.assert_close((out.fvu, out.auxk), expected)
    torch.testing.assert_close(scattered(sae, out.values, out.indices), dense_code(sae, x))
    leaves = [x, *sae.parameters()]
    got = torch.autograd.grad(out.fvu + out.auxk / 32, leaves)
    want = torch.autograd.grad(expected[0] + expected[1] / 32, leaves)
    torch.testing.assert_close(got, want)
    if dead <= sae.auxk:
        assert bool((got[1][:dead] != 0).any(1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_leaves_the_state_alone(kind: type[TopKSAE], device: str) -> None:
    sae = drawn(kind, device, dead_after=1).eval()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    out = sae(inputs(device))
    assert out.auxk == 0
    torch.testing.assert_close(sae.state_dict(), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (0,), (2, 3), (1, 1, 4)])
def test_any_batch(kind: type[TopKSAE], batch: tuple[int, ...], device: str) -> None:
    sae = drawn(kind, device)
    x = inputs(device)[0] if batch == () else inputs(device, *batch)
    for mode in (True, False):
        out = sae.train(mode)(x)
        assert out.output.shape == (*batch, WIDTH)
        assert out.values.shape == out.indices.shape
        assert out.values.shape[:-1] == batch
    assert sae.samples == x.numel() // WIDTH


def test_batch_cut_gives_ties_to_the_first(device: str) -> None:
    sae = BatchTopKSAE(1, 4, 1.5, device=device)
    with torch.no_grad():
        sae.encoder.weight.copy_(torch.tensor([[1.0], [2.0], [2.0], [2.0]]))
    code = sae.encode(torch.ones(3, 1, device=device))
    expected = [[0, 2.0, 2, 2], [0, 2, 0, 0], [0, 0, 0, 0]]  # int(1.5 * 3) entries
    assert scattered(sae, code.values, code.indices).tolist() == expected


@pytest.mark.parametrize("training", [True, False])
def test_one_sample_may_take_all(
    training: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample that needs more slots than were reserved gets them, also in the next batch."""
    sae = drawn(BatchTopKSAE, device, k=2).train(training)
    sae.threshold.fill_(3.0)
    x = 0.1 * inputs(device)
    x[7] *= 1000
    for _ in range(2):
        code = sae.encode(x)
        torch.testing.assert_close(
            scattered(sae, code.values, code.indices), dense_code(sae, x), atol=0, rtol=1e-12
        )
        assert code.values.shape[1] > 4
    # An ordinary batch again takes few slots.
    sae.threshold.fill_(1000)
    taken = []
    largest = sae._largest
    monkeypatch.setattr(sae, "_largest", lambda x, k: taken.append(k) or largest(x, k))
    sae.encode(1e-3 * x[:3])
    sae.encode(1e-3 * x[:3])
    assert taken[0] > taken[1] == 4


def test_thresholds_of_single_neurons(device: str) -> None:
    sae = drawn(BatchTopKSAE, device).eval()
    sae.threshold.uniform_(-1, 4)
    x = inputs(device)
    code = sae.encode(x)
    torch.testing.assert_close(scattered(sae, code.values, code.indices), dense_code(sae, x))


def test_threshold_is_the_mean_of_the_least_activations(device: str) -> None:
    sae = drawn(BatchTopKSAE, device, k=2.5)
    least = []
    for _ in range(3):
        values = sae(inputs(device)).values
        least.append(values[values > 0].min())
    expected = torch.stack(least).mean().float().expand(NEURONS)
    torch.testing.assert_close(sae.threshold, expected)


def test_threshold_forgets(device: str) -> None:
    """After many batches each new one has its fixed share."""
    sae = drawn(BatchTopKSAE, device)
    sae.samples += 10**6
    sae.threshold.fill_(8.0)
    values = sae(inputs(device)).values
    expected = 8 + 0.01 * (values[values > 0].min() - 8)
    torch.testing.assert_close(sae.threshold, expected.float().expand(NEURONS))
    with torch.no_grad():
        sae.encoder.bias -= 1000  # nothing fires
    before = sae.threshold.clone()
    assert sae(inputs(device)).values.shape[1] == 0
    assert torch.equal(sae.threshold, before)


@pytest.mark.parametrize("kind", KINDS)
def test_activity_is_counted(kind: type[TopKSAE], device: str) -> None:
    sae = drawn(kind, device, dead_after=60)
    active, last = torch.zeros(NEURONS, dtype=torch.int64), torch.zeros(NEURONS, dtype=torch.int64)
    for step in range(1, 5):
        x = inputs(device)
        fires = (dense_code(sae, x) > 0).sum(0).cpu()
        sae(x)
        active += fires
        last[fires > 0] = 30 * step
        assert torch.equal(sae.counts.cpu(), active)
        assert torch.equal(sae.last_active.cpu(), last)
        assert torch.equal(sae.dead.cpu(), 30 * step - last >= 60)
    assert sae.dead.any()
    assert not sae.dead.all()


def test_no_auxk(device: str) -> None:
    sae = drawn(TopKSAE, device, dead_after=1, auxk=0)
    sae.encoder.bias.data[:9] -= 1000
    assert sae(inputs(device)).auxk == 0
    assert sae.dead[:9].all()


def test_a_fresh_one_is_tied(device: str) -> None:
    sae = TopKSAE(WIDTH, NEURONS, K, device=device)
    assert torch.equal(sae.encoder.weight, sae.decoder.weight)
    torch.testing.assert_close(sae.decoder.weight.norm(dim=1), torch.ones(NEURONS, device=device))
    assert not sae.encoder.bias.any()
    assert not sae.decoder.bias.any()


def test_rows_of_the_decoder_keep_their_length(device: str) -> None:
    sae = drawn(TopKSAE, device)
    with torch.no_grad():
        sae.decoder.weight[3] = 0
    with pytest.raises(RuntimeError, match="after backward"):
        sae.project_gradient()
    sae(inputs(device)).fvu.backward()
    assert (sae.decoder.weight.grad * sae.decoder.weight).sum(1).abs().max() > 1e-3
    sae.project_gradient()
    along = (sae.decoder.weight.grad * sae.decoder.weight).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along))
    before = sae.decoder.weight.detach().clone()
    sae.normalize_decoder()
    norms = torch.ones_like(along)
    norms[3] = 0
    torch.testing.assert_close(sae.decoder.weight.norm(dim=1), norms)
    cosines = torch.cosine_similarity(before, sae.decoder.weight)
    torch.testing.assert_close(cosines, norms)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_revives_the_dead(kind: type[TopKSAE], device: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(512, 3, device=device) @ torch.randn(3, WIDTH, device=device)
    sae = kind(WIDTH, NEURONS, 3, dead_after=512, device=device)
    sae.encoder.bias.data[:10] -= 2
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
    first = sae(data).fvu.item()
    for _ in range(200):
        out = sae(data[torch.randint(512, (128,))])
        (out.fvu + out.auxk / 32).backward()
        sae.project_gradient()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
    assert sae(data).fvu.item() < 0.2 * first
    assert sae.counts[:10].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: type[TopKSAE], dtype: torch.dtype, device: str) -> None:
    sae = drawn(kind, device, dtype=dtype, dead_after=1)
    sae.encoder.bias.data[:9] -= 50
    x = inputs(device).to(dtype)
    out = sae(x)
    assert (out.output.dtype, out.fvu.dtype, out.auxk.dtype) == (dtype, *[torch.float32] * 2)
    (out.fvu + out.auxk).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in sae.parameters())


def test_a_nan_is_seen(device: str) -> None:
    x = inputs(device)
    x[2] = torch.nan
    for kind in KINDS:
        for training in (True, False):
            assert drawn(kind, device).train(training)(x).fvu.isnan()


def test_losses(device: str) -> None:
    x = torch.tensor([[0.0, 0], [2, 4]], device=device)
    assert fvu(x + 1, x) == pytest.approx(4 / 10)
    assert l0(torch.tensor([[1.0, 0], [2, 3], [0, 0]], device=device)) == 1


def test_annealed_k() -> None:
    ks = [annealed_k(step, 10, 55, 5) for step in range(13)]
    assert (ks[0], ks[5], ks[10:]) == (55, 30, [5, 5, 5])
    assert all(a >= b for a, b in pairwise(ks))
    sae = TopKSAE(WIDTH, NEURONS, K)
    sae.k = 9
    assert sae(torch.randn(3, WIDTH)).values.shape == (3, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: type[TopKSAE], device: str) -> None:
    torch._dynamo.reset()
    sae = drawn(kind, device, dead_after=1)
    sae.encoder.bias.data[:9] -= 50
    compiled = torch.compile(sae, backend="aot_eager")
    x = inputs(device)
    for mode in (True, False):
        twin = copy.deepcopy(sae).train(mode)
        out, expected = compiled.train(mode)(x), twin(x)
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.fvu + out.auxk, list(sae.parameters()))
        want = torch.autograd.grad(expected.fvu + expected.auxk, list(twin.parameters()))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(sae.state_dict(), twin.state_dict())


def test_inference_compiles_in_one_graph(device: str) -> None:
    torch._dynamo.reset()
    sae = drawn(TopKSAE, device).eval()
    x = inputs(device)
    out = torch.compile(sae, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, sae(x))


def test_state_dict_resumes(device: str) -> None:
    sae = drawn(BatchTopKSAE, device)
    sae(inputs(device))
    twin = drawn(BatchTopKSAE, device)
    twin.load_state_dict(sae.state_dict())
    x = inputs(device)
    torch.testing.assert_close(twin(x).fvu, sae(x).fvu, rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), sae.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "arguments", "settings", "message"),
    [
        (TopKSAE, (4, 8, 9), {}, "k=9"),
        (TopKSAE, (0, 8, 2), {}, "in_features=0"),
        (TopKSAE, (4, 0, 2), {}, "neurons=0"),
        (TopKSAE, (4, 8, 2), {"dead_after": 0}, "dead_after=0"),
        (TopKSAE, (4, 8, 2), {"auxk": -1}, "auxk=-1"),
        (BatchTopKSAE, (4, 8, 8.5), {}, "k=8.5"),
        (BatchTopKSAE, (4, 8, 0), {}, "k=0"),
    ],
)
def test_errors(
    kind: type[TopKSAE], arguments: tuple[int, ...], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **settings)


def test_training_needs_k() -> None:
    sae = BatchTopKSAE(4, 8, None)
    with pytest.raises(ValueError, match=r"set sae\.k"):
        sae(torch.randn(2, 4))
    sae.k = 2
    assert l0(sae(torch.randn(2, 4)).values) <= 2
