"""A network that is not ours in the trainer: the method's parts, resumption, frequencies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.config import Config, resolve
from ssd.data import PARALLEL, Dataset, Task, class_order, mean_cosine, split
from ssd.learner import Learner, build_model
from ssd.models import NETWORKS, SDMLP, Kind, Network
from ssd.runs import RunOptions, run
from ssd.trainer import Trainer
from ssd_kernels.nn import TopK

CONFIG = Config(
    dataset="features",
    features="none",
    method="ssd+ewc",
    tasks=2,
    epochs=4,
    batch_size=16,
    neurons=30,
    k=4,
    lr=0.3,
    temperature=2.0,
    subnetwork=2.0,
    ewc_coefficient=3.0,
    ewc_beta=0.5,
    eval_every=2,
)


class Deep(Network):
    """Two hidden layers and a normalisation between them; the last layer is k-sparse."""

    layer = "winners"

    def __init__(
        self, in_features: int, neurons: int, classes: int, k: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(generator.initial_seed())
            self.first = nn.Sequential(nn.Linear(in_features, 24), nn.LayerNorm(24), nn.GELU())
            self.second = nn.Linear(24, neurons)
            self.out = nn.Linear(neurons, classes)
        self.winners = TopK(k)
        self.constrained = 0

    def address(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)

    def respond(self, address: Tensor) -> Tensor:
        return self.out(self.winners(self.second(self.first(address))))

    @torch.no_grad()
    def constrain(self) -> None:
        self.out.weight.clamp_(min=-0.5)
        self.constrained += 1


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "deep", Kind(Deep, ("neurons", "k")))


def make_data() -> Dataset:
    draw = torch.Generator().manual_seed(1)
    y = torch.arange(160) % 4
    x = 2 * torch.randn(4, 10, generator=draw)[y] + torch.randn(160, 10, generator=draw)
    return Dataset("features", x, y, x, y)


def make_tasks(config: Config) -> list[Task]:
    return split(make_data(), config.tasks, class_order(4, config.seed))


def make_trainer(method: str, **changes: object) -> Trainer:
    config = replace(CONFIG, method=f"deep+{method}", **changes)
    config.validate()
    return Trainer([Learner(config, make_tasks(config), build_model(config, 10, 4))])


def finish(trainer: Trainer) -> Learner:
    for _ in trainer.run():
        pass
    return trainer.learners[0]


def test_it_learns_is_constrained_and_its_layer_is_counted() -> None:
    learner = finish(make_trainer("ssd+ewc", epochs=20, alpha=0.95, ewc_coefficient=0.1))
    assert learner.accuracy[1].min() > 0.9  # of both tasks, after the second
    assert learner.structure is None
    assert learner.model.constrained == 2 * 20 * 5
    assert learner.model.out.weight.min() >= -0.5
    model, task = learner.model.eval(), learner.tasks[1]
    h = model.winners(model.second(model.first(model.address(task.x_train))))
    assert torch.equal(learner.frequency[1], (h > 0).double().mean(0))
    assert learner.distiller.neurons["winners"].shape == (8,)


@pytest.mark.parametrize("part", ["ssd", "lwf", "ewc", "mas", "si", "l2"])
def test_every_part_acts_from_the_second_task_on(part: str) -> None:
    """Up to there the weights are those of the network alone, and not from there on."""
    plain, acting = make_trainer("joint", si_beta=0.5), make_trainer(f"joint+{part}", si_beta=0.5)
    streams = zip(plain.run(), acting.run(), strict=True)
    for event, _ in streams:
        pair = [trainer.learners[0].parameters for trainer in (plain, acting)]
        equal = all(torch.equal(p, q) for p, q in zip(*pair, strict=True))
        if event.kind == "task":
            assert equal == (event.task == 0)


def test_gradient_norms_are_of_each_weighted_term() -> None:
    trainer = make_trainer("ssd+ewc", hidden_weight=5.0)
    (learner,) = trainer.learners
    for event in trainer.run():
        if event.kind == "epoch" and event.task == 0 and event.records[0].get("gradient_norms"):
            assert event.records[0]["gradient_norms"].keys() == {"cross_entropy"}
        if (event.kind, event.task, event.epoch) == ("epoch", 1, 1):
            found = event.records[0]["gradient_norms"]
            break
    model, distiller, task = learner.model.eval(), learner.distiller, learner.tasks[1]
    config, samples = learner.config, learner.order(1, -1)
    x, y = task.x_train[samples], task.y_train[samples]
    pre = model.second(model.first(model.address(x)))
    logits, z = model.out(model.winners(pre)), model.winners(pre)[:, distiller.neurons["winners"]]

    def norm(loss: Tensor) -> float:
        gradients = torch.autograd.grad(
            loss, learner.parameters, retain_graph=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in gradients]).norm().item()

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (t.div(2.0).log_softmax(1) for t in (student, teacher))
        return 4 * F.kl_div(q, p, reduction="batchmean", log_target=True)

    rest = 1 - config.alpha
    of_logits = divergence(logits, distiller.teacher_logits[samples])
    of_hidden = divergence(z, distiller.teacher_hidden["winners"][samples])
    pull = [torch.zeros_like(p) for p in learner.parameters]
    learner.regularizers[0].add_gradient(pull)
    assert found == pytest.approx(
        {
            "cross_entropy": norm(config.alpha * F.cross_entropy(logits, y)),
            "logits": norm(rest * (1 - config.lam) * of_logits),
            "hidden": norm(rest * config.lam * 5.0 * of_hidden),
            "penalty": torch.cat([g.flatten() for g in pull]).norm().item(),
        },
        rel=1e-4,
    )
    assert min(found.values()) > 0


@pytest.mark.parametrize("stop", [3, 23, 27, 40])
@pytest.mark.parametrize("method", ["ssd+ewc", "lwf+si"])
def test_a_saved_state_goes_on_to_the_same_bits(method: str, stop: int) -> None:
    whole, first, second = (make_trainer(method, momentum=0.5) for _ in range(3))
    finish(whole)
    for number, _ in enumerate(first.run()):
        if number == stop:
            break
    tensors, numbers = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, numbers)
    finish(second)
    expected, actual = whole.state()[0], second.state()[0]
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_a_run_in_its_folder(tmp_path: Path) -> None:
    config = replace(CONFIG, method="deep+ssd+ewc")
    summary = run(config, make_data(), tmp_path / "run", RunOptions(torch.device("cpu")))
    assert summary["method"] == "deep+ssd+ewc"
    assert summary["mean_active"] == pytest.approx([4, 4], abs=1)
    for term in ("logits", "hidden", "penalty"):
        first, second = summary[f"{term}_gradient"]
        assert first is None
        assert second > 0
    assert min(summary["cross_entropy_gradient"]) > 0
    assert "structure" not in summary


def test_what_is_frozen_is_not_trained() -> None:
    config = replace(CONFIG, method="deep+ssd+mas", momentum=0.5)
    model = build_model(config, 10, 4)
    model.first.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    finish(Trainer([Learner(config, make_tasks(config), model)]))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) != p.requires_grad


def test_a_layer_of_another_size_or_that_never_runs_is_refused() -> None:
    model = build_model(replace(CONFIG, method="deep+ssd"), 10, 4)
    wide = replace(CONFIG, method="sdmlp", neurons=31)
    with pytest.raises(ValueError, match=r"'winners' has 30 neurons, config\.neurons is 31"):
        Learner(wide, make_tasks(wide), model)
    model.spare = TopK(2)
    model.layer = "spare"
    with pytest.raises(ValueError, match="'spare'"):
        Learner(CONFIG, make_tasks(CONFIG), model, distiller=None, regularizers=[])


def offset(mean: float) -> list[Task]:
    """Two tasks whose inputs share a mean."""
    draw = torch.Generator().manual_seed(3)
    x, y = mean + torch.randn(240, 12, generator=draw), torch.arange(240) % 4
    x += 2 * torch.randn(4, 12, generator=draw)[y]
    return split(Dataset("f", x[:160], y[:160], x[160:], y[160:]), 2, class_order(4, 0))


@pytest.mark.parametrize("when", ["never", "auto", "always"])
@pytest.mark.parametrize("mean", [0.5, 30.0])
def test_center(when: str, mean: float) -> None:
    """The mean of the first task alone, where inputs are almost parallel or always."""
    tasks = offset(mean)
    assert (mean_cosine(tasks[0].x_train) > PARALLEL) is (mean == 30)
    config = replace(CONFIG, method="sdmlp", center=when)
    learner = Learner(config, tasks, build_model(config, 12, 4))
    model = learner.model
    assert isinstance(model, SDMLP)
    centred = when == "always" or (when == "auto" and mean == 30)
    shift = tasks[0].x_train.mean(0) if centred else torch.zeros(12)
    torch.testing.assert_close(model.shift, shift)
    x = tasks[1].x_test
    torch.testing.assert_close(model.address(x), F.normalize((x - shift).relu(), dim=1))
    model.eval()  # else every call counts
    assert torch.equal(model(x), model.respond(model.address(x)))


def test_centred_inputs_are_learned_and_resumed() -> None:
    """What parallel inputs cost, and that a checkpoint holds the mean."""
    accuracy, trained = {}, {}
    for when in ("never", "auto"):
        config = replace(CONFIG, method="sdmlp", center=when, tasks=2, epochs=20)
        learner = Learner(config, offset(30.0), build_model(config, 12, 4))
        for _ in Trainer([learner]).run():
            pass
        accuracy[when], trained[when] = learner.accuracy[0, 0].item(), learner
    assert accuracy["auto"] > accuracy["never"] + 0.2
    other = build_model(CONFIG, 12, 4)
    assert isinstance(other, SDMLP)
    state = trained["auto"].model.state_dict()
    other.load_state_dict(state)
    assert other.shift.any()
    del state["shift"]  # as in a checkpoint from before there was one
    other.load_state_dict(state)
    assert not other.shift.any()
    assert resolve({}).center == "auto"
    assert resolve({"preset": "paper-1k"}).center == "never"
