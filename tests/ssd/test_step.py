"""The product's training step against the paper's formulas written naively, in fp64.

The naive version is dense autograd on two matrices, with a frozen copy of the teacher that is
run at every step, a sum over the terms of every penalty, and projection of every row.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd import models as models_module
from ssd import step as step_module
from ssd import trainer as trainer_module
from ssd.config import PENALTIES, Config
from ssd.data import Task, shuffled
from ssd.learner import Learner, Stack, build_model
from ssd.models import SDMLP, AnnealedTopKLinear
from ssd.trainer import Trainer
from ssd_kernels import TopKOutput

FEATURES, CLASSES = 20, 6
BASE = Config(
    dataset="features",
    features="none",
    tasks=3,
    epochs=10,
    batch_size=15,
    neurons=200,
    k=5,
    anneal_samples=500,
    lr=0.3,
    temperature=2.0,
    lam=0.4,
    subnetwork=2.0,
    eval_every=10,
    ewc_coefficient=3.0,
    ewc_beta=0.5,
    mas_coefficient=30.0,
    si_coefficient=1.0,  # importance may be negative: more would amplify rounding at every step
    si_beta=0.5,
    l2_coefficient=0.3,
)


def make_tasks() -> list[Task]:
    draw = torch.Generator().manual_seed(3)
    centres = torch.randn(CLASSES, FEATURES, generator=draw, dtype=torch.float64)
    tasks = []
    for first in range(0, CLASSES, 2):
        y = torch.arange(100) % 2 + first
        noise = torch.randn(100, FEATURES, generator=draw, dtype=torch.float64)
        x = centres[y] + 0.7 * noise
        tasks.append(Task((first, first + 1), x, y, x, y))
    return tasks


class Naive:
    """paper.md, steps 1 to 5 of SDMLP and steps 1 to 5 of SSD; W2 [C, R] as in the paper."""

    def __init__(self, config: Config, model: SDMLP) -> None:
        self.c = config
        self.w1 = model.encoder.weight.detach().clone()
        self.w2 = model.decoder.weight.detach().T.clone()
        self.active = torch.zeros(config.neurons, dtype=torch.float64)
        self.samples = 0
        self.teacher: tuple[Tensor, Tensor] | None = None
        self.chosen = torch.zeros(0, dtype=torch.int64)
        self.norm = 1.0
        self.use = torch.zeros(config.neurons, dtype=torch.float64)
        self.counted = torch.zeros(config.neurons, dtype=torch.float64)
        self.seen: set[int] = set()
        # Of each penalty its terms: importance of both matrices, and where it pulls them.
        self.terms: dict[str, list[tuple[Tensor, ...]]] = {}
        self.path = [torch.zeros_like(self.w1), torch.zeros_like(self.w2)]
        self.start = [self.w1, self.w2]  # of the task
        self.buffers = [torch.zeros_like(self.w1), torch.zeros_like(self.w2)]

    def forward(self, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        x = x.relu()
        x = x / x.norm(dim=1, keepdim=True)
        a = (x @ w1.T).relu()
        k, g = c.k, torch.ones(c.neurons, dtype=torch.float64)
        if c.schedule == "gaba":
            g = (-1 + 2 * self.active / c.anneal_samples).clamp(-1, 1)
        elif c.schedule == "linear":
            left = max(0.0, 1 - self.samples / c.anneal_samples)
            k = c.k + round(left * (c.neurons - c.k))
        if k == c.neurons:
            i = torch.zeros(len(x), 1, dtype=torch.float64)
        else:
            i = a.detach().sort(dim=1, descending=True).values[:, k : k + 1]
        h = (a - g * i).relu()
        if c.inhibition == "mask":
            h = torch.where(h > 0, a, 0.0)
        return h @ w2.T, h, a

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.c.temperature
        p, q = (student / t).softmax(1), (teacher / t).softmax(1)
        if self.c.kl == "forward":
            p, q = q, p
        return t * t * (p * (p.log() - q.log())).sum() / len(p)

    def loss(self, x: Tensor, y: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        logits, h, a = self.forward(x, w1, w2)
        loss = -logits.log_softmax(1)[torch.arange(len(y)), y].mean()
        if self.teacher is not None and c.parts & {"ssd", "lwf"}:
            with torch.no_grad():
                t_logits, t_h, t_a = self.forward_teacher(x)
            z, t_z = (h, t_h) if c.hidden == "after" else (a, t_a)
            columns = sorted(self.seen) if c.logits == "seen" else list(range(CLASSES))
            student, taught = z[:, self.chosen], t_z[:, self.chosen]
            if c.hidden_loss == "mse":
                l_hidden = ((student - taught) ** 2).sum() / len(x) / self.norm
            else:
                l_hidden = self.divergence(student, taught)
            l_hidden = c.hidden_weight * l_hidden
            l_logits = self.divergence(logits[:, columns], t_logits[:, columns])
            lam = 0.0 if "lwf" in c.parts else c.lam
            distilled = lam * l_hidden + (1 - lam) * l_logits
            loss = c.alpha * loss + (1 - c.alpha) * distilled
        return loss + self.penalty(w1, w2), h

    def penalty(self, w1: Tensor, w2: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for name, terms in self.terms.items():
            for o1, o2, p1, p2 in terms:
                pull = (o1 * (w1 - p1) ** 2).sum() + (o2 * (w2 - p2) ** 2).sum()
                total = total + getattr(self.c, f"{name}_coefficient") * pull
        return total

    def pull(self) -> float:
        """The largest entry of the gradient of the penalty."""
        if not self.terms:
            return 0.0
        w1, w2 = self.w1.clone().requires_grad_(), self.w2.clone().requires_grad_()
        slopes = torch.autograd.grad(self.penalty(w1, w2), [w1, w2])
        return max(g.abs().max().item() for g in slopes)

    def gradient(self, x: Tensor, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of a function of the logits, without any penalty."""
        w1, w2 = self.w1.clone().requires_grad_(), self.w2.clone().requires_grad_()
        return list(torch.autograd.grad(of(self.forward(x, w1, w2)[0]), [w1, w2]))

    def forward_teacher(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher keeps the GABA state it had when it was frozen."""
        w1, w2, active, samples = self.teacher
        now, self.active = self.active, active
        now_samples, self.samples = self.samples, samples
        try:
            return self.forward(x, w1, w2)
        finally:
            self.active, self.samples = now, now_samples

    def step(self, x: Tensor, y: Tensor) -> None:
        c, before = self.c, [self.w1, self.w2]
        slopes = before
        if "si" in c.parts:
            slopes = self.gradient(x, lambda z: beta_loss(z, y, c.si_beta))
        w1, w2 = self.w1.clone().requires_grad_(), self.w2.clone().requires_grad_()
        loss, h = self.loss(x, y, w1, w2)
        loss.backward()
        if "metaplasticity" in c.parts or c.protection == "use":
            w1.grad /= (1 + c.metaplasticity_coefficient * self.use).unsqueeze(1)
        self.active = self.active + (h > 0).sum(0)
        self.samples += len(x)
        torch.nn.utils.clip_grad_norm_([w1, w2], c.max_norm)
        for buffer, w in zip(self.buffers, (w1, w2), strict=True):
            buffer.mul_(c.momentum).add_(w.grad)
        self.w1 = (self.w1 - c.lr * self.buffers[0]).clamp(min=0)
        self.w2 = (self.w2 - c.lr * self.buffers[1]).clamp(min=0)
        length = self.w1.norm(dim=1, keepdim=True)
        self.w1 = torch.where(length > 0, self.w1 / length, self.w1)
        moved = [self.w1 - before[0], self.w2 - before[1]]
        self.path = [w - g * m for w, g, m in zip(self.path, slopes, moved, strict=True)]

    def begin_task(self, x: Tensor) -> None:
        if self.teacher is None:
            return
        with torch.no_grad():
            _, h, a = self.forward_teacher(x)
        z = h if self.c.hidden == "after" else a
        self.norm = (z**2).sum(1).mean()
        score = self.counted * (z.mean(0) if self.c.selection == "activation" else 1)
        n = self.c.neurons if self.c.selection == "all" else round(self.c.subnetwork * self.c.k)
        self.chosen = score.sort(descending=True, stable=True).indices[:n]

    def end_task(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        with torch.no_grad():
            counted = (self.forward(x, self.w1, self.w2)[1] > 0).sum(0).double()
        self.counted = counted + (self.counted if self.c.frequency == "accumulated" else 0)
        self.use = self.use + counted / counted.mean()
        self.seen |= set(y.tolist())
        self.teacher = (self.w1.clone(), self.w2.clone(), self.active.clone(), self.samples)
        now = [self.w1, self.w2]
        for name in self.c.parts & set(PENALTIES) - {"metaplasticity"}:
            new = self.importance(name, x[order], now)
            if name == "ewc":
                self.terms.setdefault(name, []).append((*new, *now))
                continue
            for o1, o2, *_ in self.terms.get(name, []) if name != "l2" else ():
                new = [o1 + new[0], o2 + new[1]]
            self.terms[name] = [(*new, *now)]
        self.start = now
        self.path = [torch.zeros_like(w) for w in self.path]

    def importance(self, name: str, x: Tensor, now: list[Tensor]) -> list[Tensor]:
        """Of the task alone, which has fewer samples than one batch of 512."""
        if name == "ewc":
            slopes = self.gradient(x, lambda z: beta_loss(z, z.argmax(1), self.c.ewc_beta))
            return [g**2 / (5 * 512) for g in slopes]
        if name == "mas":
            return [g.abs() for g in self.gradient(x, lambda z: (z**2).mean())]
        if name == "si":
            ways = zip(self.path, now, self.start, strict=True)
            return [w / ((p - start) ** 2 + 0.1) for w, p, start in ways]
        return [torch.ones_like(p) for p in now]


def beta_loss(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    return -(beta * logits).log_softmax(1)[torch.arange(len(labels)), labels].sum()


# So many neurons that most never fire when importance is measured: the penalty pulls few rows.
FEW = {"neurons": 600, "k": 2, "anneal_samples": 30, "ewc_coefficient": 30.0}
FLAT = {"neurons": 1000, "k": 2, "schedule": "flat", "ewc_coefficient": 30.0}
VARIANTS = {
    "ssd": {},
    "sdmlp": {"method": "sdmlp"},
    "lwf": {"method": "lwf"},
    "mask": {"inhibition": "mask"},
    "linear": {"schedule": "linear", "anneal_samples": 900},
    "flat": {"schedule": "flat"},
    "forward KL": {"kl": "forward"},
    "before inhibition": {"hidden": "before"},
    "before inhibition, flat": {"hidden": "before", "schedule": "flat"},
    "seen logits": {"logits": "seen"},
    "accumulated": {"frequency": "accumulated"},
    "momentum": {"momentum": 0.9, "lr": 0.03},
    "no clip": {"max_norm": 1e6, "lr": 0.05},
    "ssd+ewc": {"method": "ssd+ewc"},
    "ssd+ewc, few": {"method": "ssd+ewc", **FEW},
    "ssd+ewc, flat": {"method": "ssd+ewc", **FLAT},
    "mas": {"method": "mas"},
    "mas, few": {"method": "mas", **FEW},
    "ssd+mas": {"method": "ssd+mas"},
    "ssd+mas, flat": {"method": "ssd+mas", **FLAT},
    "si": {"method": "si"},
    "si, flat": {"method": "si", **FLAT},
    "ssd+si": {"method": "ssd+si"},
    "ssd+si, flat": {"method": "ssd+si", **FLAT},
    "l2": {"method": "l2"},
    "ssd+l2": {"method": "ssd+l2"},
    "ssd+l2, flat": {"method": "ssd+l2", **FLAT},
    "ssd+ewc+mas, flat": {"method": "ssd+ewc+mas", **FLAT, "neurons": 2000},
    "mse": {"hidden_loss": "mse", "hidden_weight": 0.5},
    "mse, flat": {"hidden_loss": "mse", "hidden_weight": 0.5, "schedule": "flat"},
    "mse of all": {"hidden_loss": "mse", "hidden_weight": 0.5, "selection": "all"},
    "mse of all, flat": {"hidden_loss": "mse", "selection": "all", "schedule": "flat"},
    "mse before inhibition": {"hidden_loss": "mse", "hidden": "before", "selection": "activation"},
    "heavier KL of all": {"hidden_weight": 50.0, "selection": "all"},
    "active on new inputs": {"hidden_weight": 50.0, "selection": "activation"},
    "metaplasticity": {"method": "metaplasticity"},
    "metaplasticity, flat": {"method": "metaplasticity", **FLAT},
    "protection": {"protection": "use"},
    "ssd+ewc+metaplasticity": {"method": "ssd+ewc+metaplasticity"},
    "ssd+ewc+metaplasticity, flat": {"method": "ssd+ewc+metaplasticity", **FLAT},
}
LONG = (
    *("ssd", "flat", "mask", "linear", "momentum", "before inhibition"),
    *("ssd+ewc", "ssd+ewc, flat", "mas, few"),
)
# The code under graded inhibition is not computed as a code where neurons are few, as here; "code"
# has it by force, and "plain" is the step of any network.
CASES = [
    (variant, path)
    for variant, settings in VARIANTS.items()
    for path in ("active", "code", "plain")
    if path == "code" or settings.get("schedule") != "flat" or variant == "flat"
]
# The path that takes most steps, where it is not the one that the case names.
MOSTLY = {
    ("linear", "active"): "code",
    ("flat", "active"): "code",
    ("before inhibition", "code"): "active",  # from the second task on: the loss reads all
    ("before inhibition, flat", "code"): "active",
    ("mse before inhibition", "code"): "active",
}


def watch(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps by the path they take, and those under a penalty by the rows they move."""
    taken: Counter[str] = Counter()
    encode, plain_step, update = (
        AnnealedTopKLinear.encode,
        step_module.plain_step,
        step_module._update,
    )

    def encoded(layer: AnnealedTopKLinear, *given: Any, **options: Any) -> Any:
        hidden = encode(layer, *given, **options)
        taken["code" if isinstance(hidden, TopKOutput) else "active"] += 1
        return hidden

    def plain(*given: Any) -> None:
        taken["plain"] += 1
        plain_step(*given)

    def updated(stack: Stack, batch: Any, gradients: Any, rows: Tensor | None) -> None:
        if stack.penalized:
            taken["penalty on all" if rows is None else "penalty on some"] += 1
        update(stack, batch, gradients, rows)

    monkeypatch.setattr(AnnealedTopKLinear, "encode", encoded)
    monkeypatch.setattr(trainer_module, "plain_step", plain)
    monkeypatch.setattr(step_module, "_update", updated)
    return taken


@pytest.mark.parametrize(("variant", "path"), CASES)
def test_step_equals_naive_dense_autograd(
    variant: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks, from all neurons excited to (almost) k-sparse."""
    epochs = 24 if variant in LONG else 10
    config = replace(BASE, epochs=epochs, **{"method": "ssd", **VARIANTS[variant]})
    tasks = make_tasks()
    shape = FEATURES, config.neurons, CLASSES, config.k
    schedule = config.inhibition, config.schedule, config.anneal_samples
    draw = torch.Generator().manual_seed(7)
    model = SDMLP(*shape, *schedule, generator=draw, dtype=torch.float64)
    naive = Naive(config, model)
    trainer = Trainer([Learner(config, tasks, model)])
    (learner,) = trainer.learners
    taken = watch(monkeypatch)
    if path == "code":
        monkeypatch.setattr(AnnealedTopKLinear, "_computes_all", lambda *_: False)
        monkeypatch.setattr(models_module, "RETRY", 8)  # the run is short
    elif path == "plain":
        trainer.stacks = []
    steps, pull = 0, 0.0
    moved = model.encoder.weight.detach().clone()
    for event in trainer.run():
        task = tasks[event.task]
        if event.kind == "step":
            order = shuffled(100, config.seed, event.task, 1 + event.epoch)
            batch = order.split(config.batch_size)[event.step - 1]
            if event.epoch == 0 and event.step == 1:
                naive.begin_task(task.x_train)
                if learner.distiller is not None and learner.distiller.teaches:
                    chosen = learner.distiller.neurons["encoder"]
                    assert torch.equal(chosen, naive.chosen.sort().values)
            naive.step(task.x_train[batch], task.y_train[batch])
            steps += 1
            for ours, theirs in (
                (model.encoder.weight, naive.w1),
                (model.decoder.weight.T, naive.w2),
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
            assert torch.equal(model.encoder.counts.double(), naive.active)
            pull = max(pull, config.lr * naive.pull())
        elif event.kind == "task":
            order = shuffled(100, config.seed, event.task, 0)
            naive.end_task(task.x_train, task.y_train, order)
    assert steps == 21 * epochs
    assert variant not in LONG or steps >= 500
    # The comparison must have covered the paths, the penalties and real learning.
    assert taken[MOSTLY.get((variant, path), path)] > steps / 2
    assert taken["plain"] + taken["active"] + taken["code"] == steps
    if config.parts & set(PENALTIES) and path != "plain":
        few = "few" in variant or config.method == "metaplasticity"
        some = few or ("flat" in variant and "l2" not in variant)
        assert taken["penalty on some" if some else "penalty on all"] == steps * 2 // 3
        assert (
            config.method == "metaplasticity" or pull > 1e-8
        )  # some hundred times the tolerance, in one step
    assert (model.encoder.weight - moved).abs().max() > 0.03


def test_untouched_rows_keep_their_bits() -> None:
    """Plain SGD on a k-sparse layer moves the rows of active neurons and no other."""
    config = replace(BASE, method="sdmlp", schedule="flat")
    task = make_tasks()[0]
    model = SDMLP(
        FEATURES,
        config.neurons,
        CLASSES,
        config.k,
        schedule="flat",
        generator=torch.Generator().manual_seed(7),
    )
    task = replace(task, x_train=task.x_train.float())
    trainer = Trainer([Learner(replace(config, tasks=1), [task], model)])
    before = [p.detach().clone() for p in model.parameters()]
    trainer.step([torch.arange(4)])
    active = model.encoder.counts > 0
    assert 0 < active.sum() <= 4 * config.k
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old[~active], new[~active])
        assert not torch.equal(old[active], new[active])


def test_a_batch_in_which_no_neuron_fires() -> None:
    """Inputs of zeros, as a dark image: no gradient, and no neuron to gather."""
    task = make_tasks()[0]
    dark = replace(task, x_train=torch.zeros_like(task.x_train))
    config = replace(BASE, method="ssd", tasks=2)
    learner = Learner(config, [dark, dark], build_model(config, FEATURES, CLASSES).double())
    learner.model.encoder.counts.fill_(400)  # on its way from excitation to inhibition
    trainer = Trainer([learner])
    before = [p.detach().clone() for p in learner.model.parameters()]
    learner.end_task(0)
    learner.begin_task(1)
    trainer.task = 1
    trainer.step([torch.arange(15)])
    for old, new in zip(before, learner.model.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=1e-6, atol=0)  # renormalised
