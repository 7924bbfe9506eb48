"""A trained network's code with a closed-form decoder: that it trains, then reads."""

import copy
from dataclasses import replace

import pytest
import torch

from ssd.config import Config
from ssd.data import Task
from ssd.errors import UserError
from ssd.learner import Learner, build_model
from ssd.peers.learners import evaluate_stream
from ssd.peers.readout import CodeReadout, LearnedCode
from ssd.peers.trained_readout import InputMoments, TrainedReadout
from ssd.trainer import Trainer

D, C = 12, 4
CONFIG = Config(
    method="ssd",
    tasks=2,
    neurons=40,
    k=4,
    epochs=3,
    batch_size=16,
    lr=0.5,
    anneal_samples=200,
    subnetwork=2.0,
)


def stream() -> list[Task]:
    torch.manual_seed(0)
    centres = 3 * torch.randn(C, D)
    y = torch.arange(240) % 2
    tasks = []
    for first in (0, 2):
        x = (centres[first + y] + torch.randn(240, D)).relu()
        train, test = slice(0, 160), slice(160, 240)
        labels = first + y
        tasks.append(Task((first, first + 1), x[train], labels[train], x[test], labels[test]))
    return tasks


@pytest.mark.parametrize("freeze", [False, True])
def test_reads_the_code_as_it_is_after_each_task(freeze: bool) -> None:
    """Or as it is after the first one, where the network is frozen then."""
    tasks = stream()
    learner = TrainedReadout(CONFIG, tasks, C, share=0.25, strength=1e-2, freeze=freeze)
    accuracy = evaluate_stream(learner, tasks)
    assert accuracy[1].mean() > 0.6
    assert accuracy[0, 1] == 0

    model = build_model(CONFIG, D, C)
    events = Trainer([Learner(CONFIG, tasks, model)]).run()
    expected = CodeReadout(LearnedCode(model, 10), C, "lda", 1e-2)
    for number, task in enumerate(tasks):
        if number == 0 or not freeze:
            next(event for event in events if event.kind == "task")
        expected.fit_task(task.x_train, task.y_train)
    x = torch.cat([task.x_test for task in tasks])
    assert torch.equal(learner.predict(x), expected.predict(x))
    assert not torch.equal(model.encoder.weight, build_model(CONFIG, D, C).encoder.weight)


def test_statistics_follow_a_code_that_changes() -> None:
    """Neurons that change places are a linear map, so nothing is lost."""
    tasks = stream()
    x, y = tasks[0].x_train, tasks[0].y_train
    learner = TrainedReadout(CONFIG, tasks, C, share=0.25, follow=1e-9)
    learner.fit_task(x, y)
    assert isinstance(learner.encoder, LearnedCode)
    before, layer = copy.deepcopy(learner.encoder), learner.encoder.model.encoder
    with torch.no_grad():
        layer.weight.copy_(layer.weight.roll(3, 0))
    learner._follow(before, x, 1e-9)
    expected = CodeReadout(learner.encoder, C)
    expected.fit_task(x, y)
    torch.testing.assert_close(learner.gram, expected.gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.cross, expected.cross, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected.gram, expected.gram.roll((-3, -3), (0, 1)))


def test_inputs_are_drawn_with_the_moments_of_their_classes() -> None:
    roots = 5 + torch.randn(4000, D) @ torch.randn(D, D) / D  # far from 0, where relu cuts
    y = torch.arange(4000) % 2 + 1
    roots[y == 2] += 1
    moments = InputMoments(D, C, 3, torch.device("cpu"))
    for part in (slice(0, 1000), slice(1000, 4000)):
        moments.add(roots[part].square(), y[part])
    drawn = moments.draw(20_001).sqrt().double().view(2, -1, D)
    assert drawn.shape[1] == 10_001
    assert not torch.equal(moments.draw(20_001), moments.draw(20_001))
    covariance = sum(roots[y == c].double().T.cov(correction=0) for c in (1, 2)) / 2
    for found, c in zip(drawn, (1, 2), strict=True):
        torch.testing.assert_close(found.mean(0), roots[y == c].double().mean(0), rtol=0, atol=0.08)
        torch.testing.assert_close(found.T.cov(), covariance, rtol=0, atol=0.08)


def test_a_readout_that_follows_forgets_less() -> None:
    config = replace(CONFIG, method="sdmlp", lr=2.0, epochs=8)
    stale, following = (
        evaluate_stream(TrainedReadout(config, stream(), C, 0.5, "lda", 1e-2, follow=r), stream())
        for r in (None, 1e-2)
    )
    assert torch.equal(stale[0], following[0])  # before anything has changed
    assert following[1, 0] > stale[1, 0] + 0.05


def test_the_network_s_own_k() -> None:
    tasks = stream()
    own, same = (TrainedReadout(CONFIG, tasks, C, share) for share in (None, 0.1))
    for learner in (own, same):
        learner.fit_task(tasks[0].x_train, tasks[0].y_train)
    x = tasks[0].x_test
    assert torch.equal(own.predict(x), same.predict(x))


def test_a_network_without_a_code_is_refused() -> None:
    with pytest.raises(UserError, match="relu-mlp"):
        TrainedReadout(Config(method="naive", tasks=2), stream(), C, share=0.25)
