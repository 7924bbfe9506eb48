"""The closed-form readouts against batch solutions, and what the encoder may know."""

import pytest
import torch
from torch import Tensor

from ssd.data import Task
from ssd.errors import UserError
from ssd.models import SDMLP
from ssd.peers.learners import evaluate_stream
from ssd.peers.readout import (
    CodeReadout,
    LearnedCode,
    RandomCode,
    discriminant,
    local_addresses,
    ridge_solution,
)

D, R, C, K = 12, 30, 4, 6


def data(samples: int = 200) -> tuple[Tensor, Tensor]:
    """Classes that lie apart, labels 0..C-1 in order."""
    y = torch.arange(samples) * C // samples
    return 3 * torch.randn(C, D)[y] + torch.randn(samples, D), y


def dense(code: RandomCode | LearnedCode, x: Tensor) -> Tensor:
    values, indices, *_ = code(x)
    return torch.zeros(len(x), code.neurons).scatter_(1, indices, values).double()


def random_code() -> RandomCode:
    return RandomCode(torch.randn(R, D, generator=torch.Generator().manual_seed(3)), K)


def fitted(x: Tensor, y: Tensor, classes: list[list[int]], **settings: object) -> CodeReadout:
    """Fitted to tasks of these classes; the mean is that of all data, whatever comes first."""
    code = random_code()
    code.begin(x)
    learner = CodeReadout(code, C, **settings)  # type: ignore[arg-type]
    for task in classes:
        chosen = torch.isin(y, torch.tensor(task))
        learner.fit_task(x[chosen], y[chosen])
    return learner


def test_ridge_task_by_task_is_the_batch_solution() -> None:
    x, y = data()
    learner = fitted(x, y, [[0], [1, 2], [3]], readout="ridge", strength=1e-2)
    hidden = dense(learner.encoder, x)
    targets = torch.nn.functional.one_hot(y, C).double()
    ridge = 1e-2 * hidden.square().sum(0).mean()
    # As least squares on data with the penalty's rows below it, without a Gram matrix.
    penalty = ridge.sqrt() * torch.eye(R, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([hidden, penalty]), torch.cat([targets, torch.zeros(R, C)])
    ).solution
    weight = ridge_solution(learner.gram, learner.cross, 1e-2)
    torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(learner.predict(x).argmax(1), (hidden @ expected).argmax(1))


def test_lda_task_by_task_is_the_batch_solution() -> None:
    x, y = data()
    learner = fitted(x, y, [[3], [0, 2], [1]], readout="lda", strength=0.1)
    hidden = dense(learner.encoder, x)
    means = torch.stack([hidden[y == c].mean(0) for c in range(C)])
    covariance = (hidden - means[y]).T @ (hidden - means[y]) / len(x)
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / R * torch.eye(R, dtype=torch.float64)
    weight, bias = discriminant(learner.gram, learner.cross, learner.counts, 0.1)
    torch.testing.assert_close(shrunk @ weight, means.T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bias, -(means.T * weight).sum(0) / 2, rtol=1e-8, atol=1e-8)
    scores = hidden @ weight + bias
    assert torch.equal(learner.predict(x).argmax(1), scores.argmax(1))
    assert (scores.argmax(1) == y).double().mean() > 0.8


@pytest.mark.parametrize("readout", ["ridge", "lda"])
def test_the_order_of_the_tasks_does_not_matter(readout: str) -> None:
    x, y = data()
    decoders = [
        fitted(x, y, order, readout=readout).decoder()
        for order in ([[0, 1], [2, 3]], [[2, 3], [0, 1]], [[3], [1], [0], [2]])
    ]
    for weight, bias in decoders[1:]:
        torch.testing.assert_close(weight, decoders[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, decoders[0][1], rtol=1e-5, atol=1e-6)


def test_the_code_takes_its_mean_from_the_first_task_alone() -> None:
    x, y = data()
    code = random_code()
    learner = CodeReadout(code, C)
    learner.fit_task(x[y < 2], y[y < 2])
    assert code.mean is not None
    torch.testing.assert_close(code.mean, x[y < 2].mean(0))
    before = code.mean.clone()
    learner.fit_task(x[y >= 2], y[y >= 2])
    assert torch.equal(code.mean, before)


def test_codes_of_test_sets_that_are_kept_change_nothing() -> None:
    class Anew(CodeReadout):
        fixed = False  # type: ignore[assignment]

    x, y = data()
    tasks = [
        Task(tuple(c), x[own][::2], y[own][::2], x[own][1::2], y[own][1::2])
        for c in ([0, 1], [2], [3])
        for own in [torch.isin(y, torch.tensor(c))]
    ]
    kept, anew = (evaluate_stream(cls(random_code(), C), tasks) for cls in (CodeReadout, Anew))
    assert torch.equal(kept, anew)
    assert kept[-1].mean() > 0.8


def test_random_code_by_hand() -> None:
    addresses = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    code = RandomCode(addresses, 1, power=0.5)
    code.begin(torch.tensor([[4.0, 0.0], [0.0, 0.0]]))  # roots 2 and 0: mean 1, 0
    values, indices, *_ = code(torch.tensor([[16.0, 16.0]]))  # roots 4, 4, so 3, 4, then / 5
    assert indices.tolist() == [[2]]
    assert values[0, 0] == pytest.approx(1.0 - 0.8)


def test_the_input_beside_the_code() -> None:
    x, _ = data()
    plain = random_code()
    both = RandomCode(plain.addresses, K, beside=True)
    for code in (plain, both):
        code.begin(x[:100])
    hidden = dense(both, x)
    assert hidden.shape == (len(x), R + D)
    assert torch.equal(hidden[:, :R], dense(plain, x))
    centred = torch.nn.functional.normalize(x - x[:100].mean(0), dim=1)
    torch.testing.assert_close(hidden[:, R:].float(), D**0.5 * centred)


def test_classes_not_seen_are_never_predicted() -> None:
    x, y = data()
    scores = fitted(x, y, [[1], [3]]).predict(x)
    assert torch.isneginf(scores[:, [0, 2]]).all()
    assert torch.isfinite(scores[:, [1, 3]]).all()


def test_code_of_a_trained_network() -> None:
    model = SDMLP(D, R, C, K, generator=torch.Generator().manual_seed(0))
    x, y = data()
    hidden = dense(LearnedCode(model), x)
    a = (model.address(x) @ model.encoder.weight.T).relu()
    expected = (a - a.topk(K + 1).values[:, -1:]).relu()
    torch.testing.assert_close(hidden.float(), expected)
    learner = CodeReadout(LearnedCode(model), C, strength=1e-2)
    learner.fit_task(x, y)
    assert (learner.predict(x).argmax(1) == y).double().mean() > 0.6
    assert not learner.gram.requires_grad


def test_local_addresses_lie_around_one_pixel() -> None:
    addresses = local_addresses(50, 16, torch.Generator().manual_seed(1), width=1.5)
    energy = addresses.view(50, 16, 16).square()
    energy = energy / energy.sum((1, 2), keepdim=True)
    grid = torch.arange(16.0)
    for axis, other in ((1, 2), (2, 1)):
        along = energy.sum(other)
        centre = (along * grid).sum(1, keepdim=True)
        spread = (along * (grid - centre).square()).sum(1).sqrt()
        assert spread.mean() < 1.5  # noise over all pixels would have 4.6
        assert centre.min() < 4
        assert centre.max() > 11
        assert axis != other


def test_unknown_readout() -> None:
    with pytest.raises(UserError, match="readout 'mean' is unknown; use lda or ridge"):
        CodeReadout(random_code(), C, readout="mean")
