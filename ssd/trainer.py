"""The task loop: one step, teacher hand-over, regularisers, evaluation; resumable at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.config import Config
from ssd.data import Task
from ssd.distillation import CHUNK, Distiller, activations_of, count_activations, evaluating
from ssd.regularizers import EWC, Regularizer
from ssd.sdmlp import SDMLP
from ssd_kernels import TopKOutput, row_gradient, row_update, sparse_linear
from ssd_kernels.reference import clip_scale, project

ENCODER = "encoder"


@dataclass(frozen=True)
class Event:
    """What has just been finished: a "step", an "epoch" or a "task", numbered from 0."""

    kind: str
    task: int
    epoch: int
    step: int
    record: Mapping[str, Any]


def build_model(config: Config, in_features: int, classes: int) -> SDMLP:
    """The network of a run, its weights drawn from the run's seed."""
    return SDMLP(
        in_features,
        config.neurons,
        classes,
        config.k,
        config.inhibition,
        config.schedule,
        config.anneal_samples,
        generator=generator(config.seed, 0),
    )


def build_distiller(config: Config, model: SDMLP) -> Distiller | None:
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


def build_regularizers(config: Config, model: SDMLP) -> list[Regularizer]:
    if "ewc" not in config.parts:
        return []
    return [EWC(model, config.ewc_coefficient, config.ewc_beta)]


def generator(*key: int) -> torch.Generator:
    """A generator that depends on the key alone, so that a resumed run draws the same numbers."""
    seed = 0
    for part in key:
        # Odd multiplier of a 64-bit linear congruential generator: mixes every part into the seed.
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


class Trainer:
    """Trains a model on a stream of tasks.

    Args:
        config: settings. tasks: the stream. model: on the device of the tasks' tensors.
        distiller, regularizers: the method's parts.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[Task],
        model: SDMLP,
        distiller: Distiller | None = None,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        self.config, self.tasks, self.model = config, tasks, model
        self.distiller, self.regularizers = distiller, regularizers
        self.parameters = list(model.parameters())
        self.momentum = (
            [torch.zeros_like(p) for p in self.parameters] if config.momentum > 0 else None
        )
        device = self.parameters[0].device
        count = len(tasks)
        self.accuracy = torch.zeros(count, count, dtype=torch.float64)
        self.frequency = torch.zeros(count, config.neurons, dtype=torch.float64)
        self.task = self.epoch = self.position = self.steps = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)

    def run(self) -> Iterator[Event]:
        """Trains from where the trainer stands; at each event its state can be saved."""
        config = self.config
        self.model.train()
        while self.task < len(self.tasks):
            task = self.tasks[self.task]
            if self.distiller is not None and self.epoch == self.position == 0:
                self.distiller.begin_task(task.x_train)
            while self.epoch < config.epochs:
                order = self._order(self.epoch)
                batches = order.split(config.batch_size)
                while self.position < len(batches):
                    samples = batches[self.position]
                    self.step(task.x_train[samples], task.y_train[samples], samples)
                    self.position += 1
                    yield Event("step", self.task, self.epoch, self.position, {})
                record = self._end_epoch(len(order))
                yield Event("epoch", self.task, self.epoch - 1, len(batches), record)
            self._end_task(task)
            yield Event("task", self.task - 1, config.epochs, 0, {})

    def step(self, x: Tensor, y: Tensor, samples: Tensor) -> None:
        """One step on inputs [B, d], labels [B] at positions [B] of the task's training set."""
        address = self.model.address(x)
        code = None if self._hidden_reaches_encoder() else self.model.encoder.code(address)
        if code is None:
            logits = self.model.read(self.model.encoder(address))
            loss = self._loss(logits, y, samples)
            self._update(list(torch.autograd.grad(loss, self.parameters)))
        else:
            logits, loss = self._sparse_step(address, code, y, samples)
        self.steps += 1
        self.loss_sum += loss.detach() * len(y)
        self.correct += (logits.detach().argmax(-1) == y).sum()

    def _hidden_reaches_encoder(self) -> bool:
        """Whether the loss reads the encoder beside its code: z before inhibition."""
        return (
            self.distiller is not None
            and self.distiller.teaches
            and self.distiller.hidden == "before"
            and self.distiller.lam > 0
        )

    def _sparse_step(
        self, address: Tensor, code: TopKOutput, y: Tensor, samples: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Backward and update on the rows of the active neurons: the dense step at less cost."""
        encoder, decoder = (p.detach() for p in self.parameters)
        values, indices = code.values.requires_grad_(), code.indices
        logits = sparse_linear(values, indices, decoder)
        loss = self._loss(logits, y, samples, TopKOutput(values, indices))
        grad_values, grad_logits = torch.autograd.grad(loss, [values, logits])
        values = values.detach()
        coefficients = [grad_values * (values > 0), values]
        inputs = [address, grad_logits]
        if self.momentum is not None or any(r.active for r in self.regularizers):
            self._update(
                [
                    row_gradient(c, i, indices, self.config.neurons)
                    for c, i in zip(coefficients, inputs, strict=True)
                ]
            )
        else:
            row_update(
                [encoder, decoder],
                coefficients,
                inputs,
                indices,
                lr=self.config.lr,
                max_norm=self.config.max_norm,
                nonnegative=True,
                normalize=self.model.normalized,
            )
            self.model.encoder.updated(code._replace(values=values))
        return logits, loss

    def _loss(
        self, logits: Tensor, y: Tensor, samples: Tensor, code: TopKOutput | None = None
    ) -> Tensor:
        if self.distiller is None:
            return F.cross_entropy(logits, y)
        hidden = None
        if code is not None:
            hidden = {n: activations_of(code, i) for n, i in self.distiller.neurons.items()}
        return self.distiller.loss(logits, y, samples, hidden)

    @torch.no_grad()
    def _update(self, gradients: list[Tensor]) -> None:
        """Dense step: penalties, global-norm clip, SGD, projection."""
        for regularizer in self.regularizers:
            if regularizer.active:
                regularizer.add_gradient(gradients)
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        scale = clip_scale(norm, self.config.max_norm)
        for number, (parameter, gradient) in enumerate(
            zip(self.parameters, gradients, strict=True)
        ):
            gradient *= scale
            if self.momentum is not None:
                buffer = self.momentum[number]
                gradient = buffer.mul_(self.config.momentum).add_(gradient)
            parameter.sub_(gradient, alpha=self.config.lr)
            parameter.copy_(project(parameter, True, self.model.normalized[number]))

    def evaluate(self, tasks: Sequence[Task]) -> list[float]:
        """Accuracy on the test set of each task, all classes in play."""
        accuracies = []
        with evaluating(self.model):
            for task in tasks:
                correct = sum(
                    int((self.model(x).argmax(-1) == y).sum())
                    for x, y in zip(task.x_test.split(CHUNK), task.y_test.split(CHUNK), strict=True)
                )
                accuracies.append(correct / len(task.y_test))
        return accuracies

    def _order(self, epoch: int) -> Tensor:
        """The order of the training samples in an epoch; epoch -1 is drawn at the task's end."""
        task = self.tasks[self.task]
        drawn = torch.randperm(
            len(task.y_train), generator=generator(self.config.seed, 1 + self.task, 1 + epoch)
        )
        return drawn.to(task.y_train.device)

    def _end_epoch(self, samples: int) -> dict[str, Any]:
        record: dict[str, Any] = {
            "loss": self.loss_sum.item() / samples,
            "train_accuracy": self.correct.item() / samples,
        }
        self.epoch, self.position = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.correct.zero_()
        if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
            record["test_accuracy"] = self.evaluate(self.tasks)
            self.accuracy[self.task] = torch.tensor(record["test_accuracy"], dtype=torch.float64)
        return record

    def _end_task(self, task: Task) -> None:
        counts = count_activations(self.model, [ENCODER], task.x_train)
        self.frequency[self.task] = counts[ENCODER].double().cpu() / len(task.y_train)
        if self.distiller is not None:
            self.distiller.end_task(task.x_train, task.y_train, counts)
        for regularizer in self.regularizers:
            regularizer.end_task(task.x_train, self._order(-1))
        self.task, self.epoch = self.task + 1, 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers that load_state needs to go on from here."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {
            "accuracy": self.accuracy,
            "frequency": self.frequency,
            "loss_sum": self.loss_sum,
            "correct": self.correct,
        }
        if self.distiller is not None:
            tensors |= {f"distiller/{n}": t for n, t in self.distiller.state_dict().items()}
        for number, regularizer in enumerate(self.regularizers):
            tensors |= {f"regularizer{number}/{n}": t for n, t in regularizer.state_dict().items()}
        for number, buffer in enumerate(self.momentum or []):
            tensors[f"momentum/{number}"] = buffer
        numbers = {n: getattr(self, n) for n in ("task", "epoch", "position", "steps")}
        return tensors, numbers

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Puts the trainer where state() was taken; KeyError or RuntimeError for another model."""

        def part(prefix: str) -> dict[str, Tensor]:
            prefix += "/"
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.model.load_state_dict(part("model"))
        for name in ("accuracy", "frequency", "loss_sum", "correct"):
            getattr(self, name).copy_(tensors[name])
        if self.distiller is not None:
            self.distiller.load_state_dict(part("distiller"))
        for number, regularizer in enumerate(self.regularizers):
            regularizer.load_state_dict(part(f"regularizer{number}"))
        for number, buffer in enumerate(self.momentum or []):
            buffer.copy_(tensors[f"momentum/{number}"])
        for name in ("task", "epoch", "position", "steps"):
            setattr(self, name, int(numbers[name]))
