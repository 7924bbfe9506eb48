"""One learner: a network, its method's parts, its stream of tasks and what it has achieved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd.activations import CHUNK, count_activations, evaluating
from ssd.config import Config
from ssd.data import Task, shuffled
from ssd.distillation import Distiller
from ssd.errors import Diverged
from ssd.metrics import finite, predicted
from ssd.models import SDMLP, Network, ReLUMLP, TopKMLP
from ssd.regularizers import EWC, L2, MAS, SI, Regularizer
from ssd.structure import StructureRecorder
from ssd_kernels._graded_code import Scratch

ENCODER = "encoder"
# Gathering more than this share of the rows costs more than a pass over all of them.
PENALIZED_SHARE = 0.3
# Test inputs, of all tasks, on which coverage is measured after every task.
PROBES = 2000


def build_model(config: Config, in_features: int, classes: int) -> Network:
    """The network of a run, its weights drawn from the run's seed."""
    draw = torch.Generator().manual_seed(config.seed)
    with torch.device("cpu"):
        if config.network == "relu-mlp":
            return ReLUMLP(in_features, config.neurons, classes, draw)
        if config.network == "topk-mlp":
            return TopKMLP(in_features, config.neurons, classes, config.k, draw)
        return SDMLP(
            in_features,
            config.neurons,
            classes,
            config.k,
            config.inhibition,
            config.schedule,
            config.anneal_samples,
            generator=draw,
        )


def build_distiller(config: Config, model: Network) -> Distiller | None:
    if not config.parts & {"ssd", "lwf"}:
        return None
    return Distiller(
        model,
        config.alpha,
        0.0 if "lwf" in config.parts else config.lam,
        config.temperature,
        config.subnetwork,
        config.kl,
        config.hidden,
        config.logits,
        config.frequency,
    )


def build_regularizers(config: Config, model: Network) -> list[Regularizer]:
    built: list[Regularizer] = []
    if "ewc" in config.parts:
        built.append(EWC(model, config.ewc_coefficient, config.ewc_beta))
    if "mas" in config.parts:
        built.append(MAS(model, config.mas_coefficient))
    if "si" in config.parts:
        built.append(SI(model, config.si_coefficient, config.si_beta))
    if "l2" in config.parts:
        built.append(L2(model, config.l2_coefficient))
    return built


class Learner:
    """What belongs to one run, of which the trainer may train several at once.

    Args:
        config: settings. tasks: the stream. model: on the device of the tasks' tensors.
        distiller, regularizers: the method's parts; None builds what config.method names.
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
        self.parameters = list(model.parameters())
        self.momentum = (
            [torch.zeros_like(p) for p in self.parameters] if config.momentum > 0 else None
        )
        self.device = self.parameters[0].device
        count = len(tasks)
        self.accuracy = torch.zeros(count, count, dtype=torch.float64, device="cpu")
        self.frequency = torch.zeros(count, config.neurons, dtype=torch.float64, device="cpu")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.structure: StructureRecorder | None = None
        if isinstance(model, SDMLP):
            size = max(config.k, round(config.subnetwork * config.k))
            self.structure = StructureRecorder(min(size, config.neurons))
        # What the first layer sees of the task, [N, d].
        self.inputs = torch.empty(0, device=self.device)
        self.labels = torch.empty(0, device=self.device)

    @property
    def sparse(self) -> bool:
        """Whether sparse_step serves: it knows SDMLPs, and a distillation that is fused."""
        fused = self.distiller is None or self.distiller.fused
        return isinstance(self.model, SDMLP) and fused

    def load_task(self, number: int) -> None:
        """Makes a task the one that is trained."""
        task = self.tasks[number]
        self.inputs, self.labels = self.model.address(task.x_train), task.y_train

    def begin_task(self, number: int) -> None:
        """Takes the teacher's outputs on a new task."""
        if self.distiller is not None:
            self.distiller.begin_task(self.tasks[number].x_train)

    def penalized_rows(self) -> Tensor | None:
        """Neurons [n] that a penalty may pull; None if that is most of them or not known."""
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
        """Accuracy on the test set of each task, all classes in play; Diverged, see predicted."""
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
        """What is logged of an epoch; starts the sums anew.

        Raises:
            Diverged: the loss, a weight or a score on a test set is not finite, or all addresses
                of an SDMLP are 0.
        """
        self.require_finite_loss()
        if not all(map(finite, self.parameters)):
            raise Diverged("a weight is not finite")
        if isinstance(self.model, SDMLP) and self.model.encoder.weight.amax().item() == 0:
            # Nothing fires any more, so there is no gradient either.
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
        return record

    def require_finite_loss(self) -> None:
        """Diverged if the loss of the epoch so far is not finite; the host reads it."""
        loss = self.loss_sum.item()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss}")

    def end_task(self, number: int) -> None:
        """Counts activations, selects the subnetwork, takes in the task's importances."""
        task = self.tasks[number]
        counts = count_activations(self.model, [ENCODER], task.x_train)
        self.frequency[number] = counts[ENCODER].double().cpu() / len(task.y_train)
        if self.structure is not None and isinstance(self.model, SDMLP):
            self.structure.end_task(self.model, self._probes(), self.frequency[number])
        if self.distiller is not None:
            self.distiller.end_task(task.x_train, task.y_train, counts)
        for regularizer in self.regularizers:
            regularizer.end_task(task.x_train, self.order(number, -1))

    def _probes(self) -> Tensor:
        """The same inputs after every task: every so manyth of all test sets."""
        everything = torch.cat([task.x_test for task in self.tasks])
        return everything[:: -(-len(everything) // PROBES)]

    def state(self) -> dict[str, Tensor]:
        """Tensors that load_state needs to go on from here."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {
            "accuracy": self.accuracy,
            "frequency": self.frequency,
            "loss_sum": self.loss_sum,
            "correct": self.correct,
        }
        if self.distiller is not None:
            tensors |= {f"distiller/{n}": t for n, t in self.distiller.state_dict().items()}
        if self.structure is not None:
            tensors |= {f"structure/{n}": t for n, t in self.structure.state_dict().items()}
        for number, regularizer in enumerate(self.regularizers):
            tensors |= {f"regularizer{number}/{n}": t for n, t in regularizer.state_dict().items()}
        for number, buffer in enumerate(self.momentum or []):
            tensors[f"momentum/{number}"] = buffer
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts the learner where state() was taken; KeyError or RuntimeError for another one's."""
        self.model.load_state_dict(part(tensors, "model"))
        for name in ("accuracy", "frequency", "loss_sum", "correct"):
            getattr(self, name).copy_(tensors[name])
        if self.distiller is not None:
            self.distiller.load_state_dict(part(tensors, "distiller"))
        if self.structure is not None:
            self.structure.load_state_dict(part(tensors, "structure"))
        for number, regularizer in enumerate(self.regularizers):
            regularizer.load_state_dict(part(tensors, f"regularizer{number}"))
        for number, buffer in enumerate(self.momentum or []):
            buffer.copy_(tensors[f"momentum/{number}"])


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix/, without it."""
    prefix += "/"
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class Stack:
    """SDMLPs of one shape as one network of S blocks, whose rows follow one another.

    A learner's own tensors become views of the stack's, so either may be written to.

    Args:
        learners: S of them; their settings agree in trainer.together.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners, self.config = list(learners), learners[0].config
        self.models = [sdmlp(each) for each in learners]
        self.encoders = [model.encoder for model in self.models]
        self.weights = [
            _joined([p.detach() for p in own], own)
            for own in zip(*(each.parameters for each in learners), strict=True)
        ]  # [S R, d], [S R, C]
        momentum = [each.momentum for each in learners if each.momentum is not None]
        self.momentum = [_joined(own, own) for own in zip(*momentum, strict=True)] or None
        self.counts = self._each([e.counts for e in self.encoders])  # [S R]
        self.samples = self._each([e.samples for e in self.encoders])  # [S]
        self.dense_until = self._each([e.dense_until for e in self.encoders])  # [S]
        self.loss_sum = self._each([each.loss_sum for each in learners])  # [S]
        self.correct = self._each([each.correct for each in learners])  # [S]
        self.scratch = Scratch()
        self.lr, self.max_norm = self.setting("lr"), self.setting("max_norm")
        self.normalized = self.models[0].normalized
        self.neurons: Tensor | None = None  # [S, n] distilled
        self.positions: Tensor | None = None  # [S R]: where a neuron stands among them, else n

    @staticmethod
    def _each(own: Sequence[Tensor]) -> Tensor:
        return _joined([t.view(-1) for t in own], own)

    def __len__(self) -> int:
        return len(self.learners)

    def setting(self, name: str) -> Any:
        """A number of the config: itself, or [S] where there are several learners."""
        values = [getattr(each.config, name) for each in self.learners]
        if len(values) == 1:
            return values[0]
        return torch.tensor(values, dtype=self.weights[0].dtype, device=self.weights[0].device)

    @property
    def teaches(self) -> bool:
        distiller = self.learners[0].distiller
        return distiller is not None and distiller.teaches

    @property
    def penalized(self) -> bool:
        return any(r.active for each in self.learners for r in each.regularizers)

    @property
    def reads_scores(self) -> bool:
        """Whether the hidden term takes scores before inhibition, so of silent neurons too."""
        return self.distils_hidden and self.config.hidden == "before"

    @property
    def distils_hidden(self) -> bool:
        """Whether the loss has a hidden term, in a task with a teacher."""
        distillers = [each.distiller for each in self.learners]
        return any(d is not None and d.teaches and d.lam > 0 for d in distillers)

    def alone(self, number: int) -> Stack:
        """The stack of one learner, which shares its tensors."""
        return self if len(self) == 1 else Stack([self.learners[number]])

    def written(self, neurons: Callable[[], Tensor]) -> None:
        """Says that the weights of these neurons alone were written to since they were read."""
        for encoder in self.encoders:
            if encoder.shadowed:
                encoder.updated(neurons())

    def load_task(self) -> None:
        """Notes which neurons are distilled in the task that begins."""
        if not self.distils_hidden:
            return
        distillers = [each.distiller for each in self.learners]
        self.neurons = torch.stack([d.neurons[ENCODER] for d in distillers if d is not None])
        size, device = self.neurons.shape[1], self.neurons.device
        if self.positions is None:
            self.positions = torch.empty_like(self.counts)
        places = self.positions.fill_(size).view(len(self), -1)
        places.scatter_(1, self.neurons, torch.arange(size, device=device).expand_as(self.neurons))


def _joined(own: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other; `views` then show their parts of the whole."""
    if len(own) == 1:
        return own[0]
    whole = torch.cat(list(own))
    for view, part in zip(views, whole.chunk(len(own)), strict=True):
        view.data = part.view(view.shape)
    return whole


def sdmlp(learner: Learner) -> SDMLP:
    assert isinstance(learner.model, SDMLP)
    return learner.model
