"""One learner: a network, its method's parts, its stream of tasks and its results.

A Stack lays the tensors of several learners side by side, so that one step serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.activations import CHUNK, count_activations, evaluating
from ssd.config import DISTILLATIONS, Config, penalty_settings
from ssd.data import PARALLEL, Task, mean_cosine, shuffled
from ssd.distillation import Distiller, subnetwork_size
from ssd.errors import Diverged
from ssd.metrics import finite, predicted
from ssd.models import NETWORKS, SDMLP, Network
from ssd.regularizers import PENALTIES, Metaplasticity, Regularizer
from ssd.structure import StructureRecorder
from ssd_kernels._graded_code import Scratch
from ssd_kernels.row_update import global_norm

# Gathering more than this share of the rows costs more than a pass over all of them.
PENALIZED_SHARE = 0.3
# Test inputs, of all tasks, on which coverage is measured after every task.
PROBES = 2000
# Tensors of a Learner that a checkpoint keeps, beside its parts.
RESULTS = ("accuracy", "frequency", "gradients", "loss_sum", "correct")
# What has a gradient: the terms of the loss, and all penalties together.
TERMS = ("cross_entropy", "logits", "hidden", "penalty")
TERM_SAMPLES = 512  # training inputs on which the gradients of the terms are measured


def build_model(config: Config, in_features: int, classes: int) -> Network:
    """The network of a run, its weights drawn from weight_seed, by default seed."""
    kind = NETWORKS[config.network]
    settings = {name: getattr(config, name) for name in kind.settings}
    seed = config.seed if config.weight_seed is None else config.weight_seed
    draw = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        return kind.build(in_features=in_features, classes=classes, generator=draw, **settings)


def center(model: SDMLP, when: str, x: Tensor) -> None:
    """Makes the model subtract the mean of the first task's inputs x [N, d], if `when` says so."""
    if when == "always" or (when == "auto" and mean_cosine(x) > PARALLEL):
        model.shift.copy_(x.double().mean(0))


def build_distiller(config: Config, model: Network) -> Distiller | None:
    if not config.parts & set(DISTILLATIONS):
        return None
    names = ["alpha", "temperature", "subnetwork", "kl", "hidden", "logits", "frequency"]
    names += ["hidden_loss", "hidden_weight", "selection"]
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    return Distiller(model, lam=0.0 if "lwf" in config.parts else config.lam, **settings)


def build_regularizers(config: Config, model: Network) -> list[Regularizer]:
    return [
        PENALTIES[p](
            model, **{n.removeprefix(f"{p}_"): getattr(config, n) for n in penalty_settings(p)}
        )
        for p in config.penalties
    ]


class Learner:
    """All that belongs to one run; a trainer may train several at once.

    Args:
        config: settings.
        tasks: the stream.
        model: any Network, on the device of the tasks' tensors.
        distiller: of the method; None builds the one that config.method names.
        regularizers: of the method; None builds those that config.method names.

    Raises:
        ValueError: model.layer has not config.neurons neurons, or does not run exactly once.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[Task],
        model: Network,
        distiller: Distiller | None = None,
        regularizers: Sequence[Regularizer] | None = None,
    ) -> None:
        self.config, self.tasks, self.model = config, tasks, model
        self.distiller = build_distiller(config, model) if distiller is None else distiller
        self.regularizers = (
            build_regularizers(config, model) if regularizers is None else list(regularizers)
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.momentum = (
            [torch.zeros_like(p) for p in self.parameters] if config.momentum > 0 else None
        )
        self.device = self.parameters[0].device
        count = len(tasks)
        self.accuracy = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        self.frequency = torch.zeros(count, config.neurons, dtype=torch.float64, device="cpu")
        # [T, 4], gradient_norms at the end of each task; -1 where there is no such term
        self.gradients = torch.full((count, len(TERMS)), -1.0, dtype=torch.float64, device="cpu")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.structure: StructureRecorder | None = None
        if isinstance(model, SDMLP):
            center(model, config.center, tasks[0].x_train)
            size = subnetwork_size(config.k, config.neurons, config.subnetwork)
            self.structure = StructureRecorder(size)
        else:
            found = len(self._count(tasks[0].x_train[:1])[model.layer])
            if found != config.neurons:
                raise ValueError(
                    f"layer {model.layer!r} has {found} neurons, config.neurons is {config.neurons}"
                )
        # Of the task that load_task chose: model.address of its training inputs [N, d], and labels.
        self.inputs = self.labels = torch.empty(0, device=self.device)

    @property
    def sparse(self) -> bool:
        """Whether sparse_step can train it: an SDMLP, with fused distillation or none."""
        fused = self.distiller is None or self.distiller.fused
        return isinstance(self.model, SDMLP) and fused

    def _count(self, x: Tensor) -> dict[str, Tensor]:
        """Activation counts of the recorded layer and of the distilled ones."""
        distilled = {} if self.distiller is None else self.distiller.layers
        layers = list(dict.fromkeys([self.model.layer, *distilled]))
        return count_activations(self.model, layers, x)

    def load_task(self, number: int) -> None:
        """Readies the inputs and labels of a task for training."""
        task = self.tasks[number]
        self.inputs, self.labels = self.model.address(task.x_train), task.y_train

    def begin_task(self, number: int) -> None:
        """Takes the teacher's outputs on a new task."""
        if self.distiller is not None:
            self.distiller.begin_task(self.tasks[number].x_train)

    def penalized_rows(self) -> Tensor | None:
        """Neurons [n] that a penalty may pull; None if these are unknown or too many."""
        found = [r.rows() for r in self.regularizers if r.active]
        if any(rows is None for rows in found):
            return None
        rows = torch.cat([r for r in found if r is not None])
        return rows if len(rows) < PENALIZED_SHARE * self.config.neurons else None

    def order(self, task: int, epoch: int) -> Tensor:
        """The order of a task's samples in an epoch; epoch -1 is drawn at the task's end."""
        count = len(self.tasks[task].y_train)
        return shuffled(count, self.config.seed, task, 1 + epoch, device=self.device)

    def evaluate(self) -> list[float]:
        """Accuracy on each task's test set among all classes; raises Diverged as `predicted`."""
        accuracies = []
        with evaluating(self.model):
            for task in self.tasks:
                correct = sum(
                    int((predicted(self.model(x)) == y).sum())
                    for x, y in zip(task.x_test.split(CHUNK), task.y_test.split(CHUNK), strict=True)
                )
                accuracies.append(correct / len(task.y_test))
        return accuracies

    def end_epoch(self, task: int, evaluate: bool) -> dict[str, Any]:
        """The log's record of an epoch; resets the sums.

        Raises:
            Diverged: the loss, a weight or a score on a test set is not finite, or all addresses
                of an SDMLP are 0.
        """
        self.require_finite_loss()
        if not all(map(finite, self.parameters)):
            raise Diverged("a weight is not finite")
        if isinstance(self.model, SDMLP) and self.model.encoder.weight.amax().item() == 0:
            # Nothing fires, so there is no gradient.
            raise Diverged("every address is 0 for good")
        samples = len(self.tasks[task].y_train)
        record: dict[str, Any] = {
            "loss": self.loss_sum.item() / samples,
            "train_accuracy": self.correct.item() / samples,
        }
        self.loss_sum.zero_()
        self.correct.zero_()
        if evaluate:
            record["test_accuracy"] = self.evaluate()
            self.accuracy[task] = self.accuracy.new_tensor(record["test_accuracy"])
            record["gradient_norms"] = norms = self.gradient_norms(task)
            found = [norms.get(term, -1.0) for term in TERMS]
            self.gradients[task] = self.gradients.new_tensor(found)
        return record

    def gradient_norms(self, task: int) -> dict[str, float]:
        """The norm of each term's weighted gradient, without clip, on inputs of the loaded task."""
        samples = self.order(task, -1)[:TERM_SAMPLES]
        address, labels = self.inputs[samples], self.labels[samples]
        with evaluating(self.model), torch.enable_grad():
            if self.distiller is None:
                losses = {"cross_entropy": F.cross_entropy(self.model.respond(address), labels)}
            else:
                with self.distiller.recording() as hidden:
                    logits = self.model.respond(address)
                losses = self.distiller.losses(logits, labels, samples, hidden)
            norms = {
                term: global_norm(
                    torch.autograd.grad(
                        loss, self.parameters, retain_graph=True, materialize_grads=True
                    )
                ).item()
                for term, loss in losses.items()
            }
        pulls = [r for r in self.regularizers if r.active and not isinstance(r, Metaplasticity)]
        if pulls:
            gradients = [torch.zeros_like(p) for p in self.parameters]
            for regularizer in pulls:
                regularizer.add_gradient(gradients)
            norms["penalty"] = global_norm(gradients).item()
        for term, norm in norms.items():
            if not math.isfinite(norm):
                raise Diverged(f"the norm of the gradient of {term} is {norm}")
        return norms

    def require_finite_loss(self) -> None:
        """Diverged unless the loss of the epoch so far is finite; reads the device."""
        loss = self.loss_sum.item()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")

    def end_task(self, number: int) -> None:
        """Counts activations, selects the subnetwork, adds the task to the penalties."""
        task = self.tasks[number]
        counts = self._count(task.x_train)
        self.frequency[number] = counts[self.model.layer].double().cpu() / len(task.y_train)
        if self.structure is not None and isinstance(self.model, SDMLP):
            self.structure.end_task(self.model, self._probes(), self.frequency[number])
        if self.distiller is not None:
            own = {name: counts[name] for name in self.distiller.layers}
            self.distiller.end_task(task.x_train, task.y_train, own)
        for regularizer in self.regularizers:
            regularizer.end_task(
                task.x_train, self.order(number, -1), self.frequency[number].to(self.device)
            )

    def _probes(self) -> Tensor:
        """Up to PROBES test inputs, evenly spaced over all tasks; the same after every task."""
        everything = torch.cat([task.x_test for task in self.tasks])
        return everything[:: -(-len(everything) // PROBES)]

    def state(self) -> dict[str, Tensor]:
        """Tensors that load_state needs to go on from here."""
        parts = self._parts().items()
        tensors = {f"{p}/{n}": t for p, owner in parts for n, t in owner.state_dict().items()}
        tensors |= {name: getattr(self, name) for name in RESULTS}
        tensors |= {f"momentum/{n}": buffer for n, buffer in enumerate(self.momentum or [])}
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what state() returned; KeyError or RuntimeError if it does not fit."""
        for prefix, owner in self._parts().items():
            owner.load_state_dict(part(tensors, prefix))
        for name in RESULTS:
            getattr(self, name).copy_(tensors[name])
        for number, buffer in enumerate(self.momentum or []):
            buffer.copy_(tensors[f"momentum/{number}"])

    def _parts(self) -> dict[str, Any]:
        """The parts with a state of their own, by their prefix in state()."""
        parts = {name: getattr(self, name) for name in ("model", "distiller", "structure")}
        parts |= {f"regularizer{n}": r for n, r in enumerate(self.regularizers)}
        return {name: part for name, part in parts.items() if part is not None}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix/, without it."""
    prefix += "/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class Stack:
    """SDMLPs of one shape as one network, whose S blocks of rows follow one another.

    The learners' tensors become views of the stack's, so either may be written to.

    Args:
        learners: S of them; their settings agree in trainer.together.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners, self.config = list(learners), learners[0].config
        models = [learner.model for learner in learners if isinstance(learner.model, SDMLP)]
        self.encoders = encoders = [model.encoder for model in models]
        # [S R, d], [S R, C]
        self.weights = [_joined(own) for own in zip(*(m.parameters() for m in models), strict=True)]
        momentum = [learner.momentum or [] for learner in learners]
        self.momentum = [_joined(own) for own in zip(*momentum, strict=True)] or None
        self.counts = _joined([encoder.counts for encoder in encoders])  # [S R]
        self.samples = _joined([encoder.samples for encoder in encoders])  # [S]
        self.dense_until = _joined([encoder.dense_until for encoder in encoders])  # [S]
        self.loss_sum = _joined([learner.loss_sum for learner in learners])  # [S]
        self.correct = _joined([learner.correct for learner in learners])  # [S]
        self.scratch = Scratch()
        self.lr, self.max_norm = self.setting("lr"), self.setting("max_norm")
        self.normalized = models[0].normalized
        self.neurons: Tensor | None = None  # [S, n] distilled
        self.positions: Tensor | None = None  # [S R]: a neuron's position among them, or n

    def __len__(self) -> int:
        return len(self.learners)

    def setting(self, name: str) -> Any:
        """A number of the config: itself, or [S] where there are several learners."""
        values = [getattr(learner.config, name) for learner in self.learners]
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=self.weights[0].dtype, device=self.weights[0].device)

    @property
    def teaches(self) -> bool:
        distiller = self.learners[0].distiller
        return distiller is not None and distiller.teaches

    @property
    def penalized(self) -> bool:
        return any(r.active for learner in self.learners for r in learner.regularizers)

    @property
    def reads_scores(self) -> bool:
        """Whether the hidden term takes scores before inhibition, also of silent neurons."""
        return self.distils_hidden and self.config.hidden == "before"

    @property
    def distils_hidden(self) -> bool:
        """Whether the loss has a hidden term, in a task with a teacher."""
        distillers = [learner.distiller for learner in self.learners]
        return any(d is not None and d.teaches and d.lam > 0 for d in distillers)

    def alone(self, number: int) -> Stack:
        """The stack of one learner, which shares its tensors."""
        return self if len(self) == 1 else Stack([self.learners[number]])

    def written(self, neurons: Callable[[], Tensor]) -> None:
        """To be called if only the weights of neurons() [n] were written since encode()."""
        for encoder in self.encoders:
            encoder.updated(neurons)

    def load_task(self) -> None:
        """Notes which neurons are distilled in the task that begins."""
        if not self.distils_hidden:
            return
        distillers = [learner.distiller for learner in self.learners]
        chosen = torch.stack([d.neurons[SDMLP.layer] for d in distillers if d is not None])
        if self.neurons is None:
            self.neurons = torch.empty_like(chosen)
        self.neurons.copy_(chosen)  # in place: a CUDA graph reads it where it is
        size, device = chosen.shape[1], chosen.device
        if self.positions is None:
            self.positions = torch.empty_like(self.counts)
        places = self.positions.fill_(size).view(len(self), -1)
        places.scatter_(1, self.neurons, torch.arange(size, device=device).expand_as(self.neurons))


def _joined(own: Sequence[Tensor]) -> Tensor:
    """The tensors one after the other, of which they become views; one alone stays as it is."""
    parts = [torch.atleast_1d(tensor.detach()) for tensor in own]
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat(parts)
    for tensor, part in zip(own, whole.chunk(len(own)), strict=True):
        tensor.data = part.view(tensor.shape)
    return whole
