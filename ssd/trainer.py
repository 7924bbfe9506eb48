"""The task loop for one or several learners side by side; resumable at every step.

The learners share their settings' shape (see `together`), not their numbers: each has its own
weights, stream and order of samples. Whatever is batched over them is computed row by row, and a
gradient's norm over one learner's rows alone, so that no learner sees its companions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ssd.active import active_step
from ssd.config import PENALTIES, Config, option
from ssd.distill import distill
from ssd.errors import Diverged
from ssd.learner import ENCODER, Learner, part
from ssd.metrics import finite
from ssd.resident import ResidentEpochs
from ssd.sdmlp import SDMLP
from ssd_kernels import TopKOutput, row_update, sparse_linear
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.reference import clip_scale
from ssd_kernels.row_update import global_norm, project_

# Settings in which learners that are trained together may differ.
OWN = ("seed", "alpha", "lam", "temperature", "lr", "max_norm", "anneal_samples",
       "ewc_coefficient", "ewc_beta", "mas_coefficient", "si_coefficient", "si_beta",
       "l2_coefficient")  # fmt: skip


def together(config: Config) -> tuple[Any, ...]:
    """Configs for which this is equal can be trained as one program."""
    return tuple(value for name, value in config.to_dict().items() if name not in OWN)


@dataclass(frozen=True)
class Event:
    """What has just been finished: a "step", an "epoch" or a "task", numbered from 0."""

    kind: str
    task: int
    epoch: int
    step: int
    records: Sequence[Mapping[str, Any]] = ()  # of an epoch: one for each learner


class Trainer:
    """Trains learners on their streams of tasks, in step.

    Args:
        learners: at least one; their configs agree in `together` and their networks in shape.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = list(learners)
        self.config = self.learners[0].config
        if any(together(each.config) != together(self.config) for each in self.learners):
            raise ValueError(f"Trainer: learners may differ in {', '.join(OWN)} alone")
        self.device = self.learners[0].device
        self.task = self.epoch = self.position = self.steps = 0
        self._loaded = -1
        self.positions: Tensor | None = None
        self.sparse = all(isinstance(each.model, SDMLP) for each in self.learners)
        if self.sparse:
            self._stack()
        # On the CPU a step at a time is as fast, and can be interrupted and resumed.
        self.resident = (
            ResidentEpochs(self)
            if self.device.type == "cuda" and ResidentEpochs.serves(self)
            else None
        )

    def _stack(self) -> None:
        """Puts all learners' weights into one tensor, of which theirs become views."""
        self.weights = []
        for name in ("encoder", "decoder"):
            own = [getattr(each.model, name).weight for each in self.learners]
            stacked = own[0].detach() if len(own) == 1 else torch.cat([w.detach() for w in own])
            for weight, view in zip(own, stacked.chunk(len(own)), strict=True):
                weight.data = view
            self.weights.append(stacked)  # [S R, d], [S R, C]

        def settings(name: str) -> Tensor:
            values = [getattr(each.config, name) for each in self.learners]
            return torch.tensor(values, dtype=self.weights[0].dtype, device=self.device)

        self.lr, self.max_norm = settings("lr"), settings("max_norm")
        lam = settings("lam") * (0.0 if "lwf" in self.config.parts else 1.0)
        self.losses = {
            "alpha": settings("alpha"),
            "lam": lam,
            "temperature": settings("temperature"),
        }

    def run(self) -> Iterator[Event]:
        """Trains from where the trainer stands; at each event its state can be saved.

        Raises:
            Diverged: what was trained is not finite. On a CPU every step is looked at, elsewhere
                every epoch and every state that is to be saved.
        """
        config = self.config
        for each in self.learners:
            if not each.model.training:  # else frozen submodules stay as they are
                each.model.train()
        while self.task < len(self.learners[0].tasks):
            if self.epoch == self.position == 0:
                for each in self.learners:
                    each.begin_task(self.task)
            self.load_task()
            while self.epoch < config.epochs:
                batches = self.steps_per_epoch()[self.task]
                if self.resident is not None and self.position == 0:
                    self.resident.train_epoch()
                    self.steps, self.position = self.steps + batches, batches
                orders = [each.order(self.task, self.epoch) for each in self.learners]
                while self.position < batches:
                    first = self.position * config.batch_size
                    self.step([order[first : first + config.batch_size] for order in orders])
                    self.position += 1
                    if self.device.type == "cpu":  # elsewhere the host would wait for the step
                        for number, each in enumerate(self.learners):
                            with self._blamed(number):
                                each.require_finite_loss()
                    yield Event("step", self.task, self.epoch, self.position)
                records = self._end_epoch()
                yield Event("epoch", self.task, self.epoch - 1, batches, records)
            for number, each in enumerate(self.learners):
                each.end_task(self.task)
                self._require_finite(number, each.state())
            self.task, self.epoch = self.task + 1, 0
            yield Event("task", self.task - 1, config.epochs, 0)

    def steps_per_epoch(self) -> list[int]:
        """Of each task: as many as the learner with the most samples needs."""
        streams = zip(*(each.tasks for each in self.learners), strict=True)
        size = self.config.batch_size
        return [-(-max(len(t.y_train) for t in tasks) // size) for tasks in streams]

    def load_task(self) -> None:
        """Readies the learners' data, and where each neuron stands in the distilled subnetwork."""
        if self._loaded == self.task:
            return
        for each in self.learners:
            each.load_task(self.task)
        self._loaded = self.task
        if not (self.sparse and self.teaches and self.distils_hidden):
            return
        neurons = [each.distiller.neurons[ENCODER] for each in self.learners]  # type: ignore[union-attr]
        size, count = len(neurons[0]), self.config.neurons
        if self.positions is None:
            self.positions = torch.empty(
                len(neurons) * count, dtype=torch.int64, device=self.device
            )
        self.positions.fill_(size)
        for number, chosen in enumerate(neurons):
            self.positions[number * count + chosen] = torch.arange(size, device=self.device)

    @property
    def teaches(self) -> bool:
        distiller = self.learners[0].distiller
        return distiller is not None and distiller.teaches

    @property
    def distils_hidden(self) -> bool:
        return "ssd" in self.config.parts and any(each.config.lam > 0 for each in self.learners)

    def step(self, samples: Sequence[Tensor]) -> None:
        """One step on the samples [B] of each learner, positions in its task's training set."""
        self.load_task()
        codes: dict[int, tuple[Tensor, TopKOutput]] = {}
        before = self.teaches and self.distils_hidden and self.config.hidden == "before"
        for number, (each, chosen) in enumerate(zip(self.learners, samples, strict=True)):
            if len(chosen) == 0:  # its epoch is over
                continue
            address = each.inputs.index_select(0, chosen)
            for regularizer in each.regularizers:
                regularizer.before_step(address, each.labels[chosen])
            code = None
            if isinstance(each.model, SDMLP) and not before:
                code = each.model.encoder.code(address)
            if code is None and not before and self._few_may_fire(each):
                active_step(self, number, address, chosen)
            elif code is None:
                self._dense_step(each, address, chosen)
            else:
                codes[number] = address, code
        if codes:
            self._sparse_step(codes, samples)
        for each, chosen in zip(self.learners, samples, strict=True):
            for regularizer in each.regularizers if len(chosen) else ():
                regularizer.after_step()
        self.steps += 1

    def _few_may_fire(self, each: Learner) -> bool:
        """Whether active_step serves; on CUDA, where no shape may vary, the dense step does."""
        if not isinstance(each.model, SDMLP) or self.device.type != "cpu":
            return False
        return each.momentum is None and not each.model.encoder.response()[1]

    def _dense_step(self, each: Learner, address: Tensor, samples: Tensor) -> None:
        """Autograd through the whole network."""
        labels = each.labels[samples]
        if each.distiller is None:
            logits = each.model.respond(address)
            loss = F.cross_entropy(logits, labels)
        else:
            with each.distiller.recording() as hidden:
                logits = each.model.respond(address)
            loss = each.distiller.loss(logits, labels, samples, hidden)
        self.update(each, list(torch.autograd.grad(loss, each.parameters)))
        self.note(each, loss.detach() * len(labels), logits.detach(), labels)

    def _sparse_step(
        self, codes: Mapping[int, tuple[Tensor, TopKOutput]], samples: Sequence[Tensor]
    ) -> None:
        """Backward and update on the rows of the active neurons: the dense step at less cost."""
        numbers = list(codes)
        chosen = [samples[number] for number in numbers]
        sizes = [len(s) for s in chosen]
        learners = [self.learners[number] for number in numbers]
        code = TopKOutput(
            _joined([codes[n][1].values for n in numbers]),
            _joined([_shifted(codes[n][1].indices, n * self.config.neurons) for n in numbers]),
        )
        # The loss is the mean over a learner's own samples.
        share: float | Tensor = float(sizes[0])
        if len(sizes) > 1:
            counts = torch.tensor(sizes, dtype=code.values.dtype, device=self.device)
            share = _spread(counts, sizes).unsqueeze(1)
        logits, loss = self.learn(
            numbers,
            _slices(sizes),
            _joined([codes[n][0] for n in numbers]),
            _joined([each.labels[s] for each, s in zip(learners, chosen, strict=True)]),
            code,
            share,
            *self._targets(numbers, chosen, sizes, code),
        )
        for number, rows in zip(numbers, _slices(sizes), strict=True):
            each = self.learners[number]
            self.note(each, loss[rows].sum(), logits[rows], each.labels[samples[number]])

    def learn(
        self,
        numbers: Sequence[int],
        rows: Sequence[slice],
        address: Tensor,
        labels: Tensor,
        code: TopKOutput,
        share: float | Tensor,
        positions: Tensor | None,
        terms: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Loss, gradient and update for the codes of some learners; nothing is read by the host.

        Args:
            numbers: of the learners. rows: of each in the batch.
            address: [B, d]. labels: [B]. code: [B, K], neurons numbered through all learners.
            share: what divides the gradient of a sample, broadcast to [B, 1].
            positions: [B, K] where each slot stands in the distilled subnetwork, or None.
            terms: further arguments of distill.

        Returns:
            Logits [B, C] and loss [B].
        """
        values, indices = code.values.requires_grad_(), code.indices
        logits = sparse_linear(values, indices, self.weights[1])
        output = distill(logits.detach(), labels, **terms)
        grad_logits = output.grad_logits / share
        (grad_values,) = torch.autograd.grad(logits, values, grad_logits)
        values = values.detach()
        if positions is not None and output.grad_hidden is not None:
            slopes = F.pad(output.grad_hidden / share, (0, 1))
            grad_values = grad_values + slopes.gather(1, positions)
        coefficients = [grad_values * (values > 0), values]
        inputs = [address, grad_logits]
        learners = [self.learners[number] for number in numbers]
        penalized = any(r.active for each in learners for r in each.regularizers)
        if penalized or self.config.momentum > 0:
            for each, number, own in zip(learners, numbers, rows, strict=True):
                local = _shifted(indices[own], -number * self.config.neurons)
                self._penalized_update(
                    each, [c[own] for c in coefficients], [i[own] for i in inputs], local
                )
            return logits.detach(), output.loss
        row_update(
            self.weights,
            coefficients,
            inputs,
            indices,
            lr=self.lr,
            max_norm=self.max_norm,
            nonnegative=True,
            normalize=(True, False),
            blocks=len(self.learners),
        )
        for each, number, own in zip(learners, numbers, rows, strict=True):
            encoder = _sdmlp(each).encoder
            if encoder.shadowed:
                active = indices[own][values[own] > 0]
                encoder.updated(_shifted(active, -number * self.config.neurons))
        return logits.detach(), output.loss

    def _penalized_update(
        self,
        each: Learner,
        coefficients: Sequence[Tensor],
        inputs: Sequence[Tensor],
        indices: Tensor,
    ) -> None:
        """The update under penalties, on the rows where anything pulls if they are few."""
        count = self.config.neurons
        # The dense step serves momentum, which moves every row, and CUDA, where no shape may vary.
        dense = self.config.momentum > 0 or self.device.type != "cpu"
        rows = None if dense else each.penalized_rows()
        if rows is None:
            gradients = [
                row_gradient(c, i, indices, count)
                for c, i in zip(coefficients, inputs, strict=True)
            ]
            self.update(each, gradients)
            return
        active = coefficients[1] > 0
        rows = torch.cat([rows, indices[active]]).unique()
        # Slots that are not active add nothing, wherever they point.
        places = torch.searchsorted(rows, indices).clamp_(max=len(rows) - 1)
        gradients = [
            row_gradient(c, i, places, len(rows)) for c, i in zip(coefficients, inputs, strict=True)
        ]
        self.update(each, gradients, rows)
        if _sdmlp(each).encoder.shadowed:
            _sdmlp(each).encoder.updated(rows)

    def _targets(
        self,
        numbers: Sequence[int],
        chosen: Sequence[Tensor],
        sizes: Sequence[int],
        code: TopKOutput,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Where each slot stands in the subnetwork [B, K], and the teacher's part of the loss."""
        terms = self.terms(numbers, chosen)
        if self.positions is None or not terms:
            return None, terms
        distillers = [d for n in numbers if (d := self.learners[n].distiller) is not None]
        targets = [d.teacher_hidden[ENCODER][s] for d, s in zip(distillers, chosen, strict=True)]
        terms["target_hidden"] = _joined(targets)
        terms["hidden"], slots = self.distilled(code, terms["target_hidden"].shape[1])
        return slots, terms

    def terms(self, numbers: Sequence[int], chosen: Sequence[Tensor]) -> dict[str, Any]:
        """Arguments of distill for the logits of some learners' samples; none without a teacher."""
        if not self.teaches:
            return {}
        sizes = [len(s) for s in chosen]
        distillers = [d for n in numbers if (d := self.learners[n].distiller) is not None]
        pairs = list(zip(distillers, chosen, strict=True))
        terms: dict[str, Any] = {
            "target_logits": _joined([d.taught(s) for d, s in pairs]),
            "kl": self.config.kl,
        }
        everyone = len(numbers) == len(self.learners)
        terms |= {
            name: _spread(value if everyone else value[list(numbers)], sizes)
            for name, value in self.losses.items()
        }
        if self.config.logits == "seen":
            classes = terms["target_logits"].shape[1]
            seen = torch.zeros(len(numbers), classes, dtype=torch.bool, device=self.device)
            for row, (distiller, _) in zip(seen, pairs, strict=True):
                row[distiller.classes_seen] = True
            terms["columns"] = _spread(seen, sizes)
        return terms

    def distilled(self, code: TopKOutput, size: int) -> tuple[Tensor, Tensor]:
        """The subnetwork's activations [B, n] in a code, and where each slot stands in it."""
        assert self.positions is not None
        positions = self.positions[code.indices]
        wide = code.values.new_zeros(len(code.values), size + 1)
        # Slots of other neurons go to an extra column that is cut off.
        return wide.scatter_add_(1, positions, code.values)[:, :-1], positions

    @torch.no_grad()
    def update(self, each: Learner, gradients: list[Tensor], rows: Tensor | None = None) -> None:
        """Penalties, global-norm clip, SGD, projection.

        Args:
            gradients: of each parameter [R, ..], or of some of its rows; written to.
            rows: [n] which those are, ascending; all others have no gradient.
        """
        for regularizer in each.regularizers:
            if not regularizer.active:
                continue
            if rows is None:
                regularizer.add_gradient(gradients)
            else:
                regularizer.add_row_gradient(gradients, rows)
        scale = clip_scale(global_norm(gradients), each.config.max_norm)
        if each.momentum is not None:
            for buffer, gradient in zip(each.momentum, gradients, strict=True):
                buffer.mul_(each.config.momentum).add_(gradient.mul_(scale))
            gradients, scale = each.momentum, torch.ones_like(scale)
        step = scale * -each.config.lr
        if rows is None:
            for parameter, gradient in zip(each.parameters, gradients, strict=True):
                parameter.addcmul_(gradient, step)
            each.model.constrain()
            return
        normalized = _sdmlp(each).normalized
        for weight, gradient, norms in zip(each.parameters, gradients, normalized, strict=True):
            moved = weight.index_select(0, rows).addcmul_(gradient, step)
            weight.index_copy_(0, rows, project_(moved, True, norms))

    def note(self, each: Learner, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        each.loss_sum += loss
        each.correct += (logits.argmax(-1) == labels).sum()

    def _end_epoch(self) -> list[dict[str, Any]]:
        done = self.epoch + 1
        evaluate = done % self.config.eval_every == 0 or done == self.config.epochs
        records = []
        for number, each in enumerate(self.learners):
            with self._blamed(number):
                records.append(each.end_epoch(self.task, evaluate))
        self.epoch, self.position = done, 0
        return records

    @contextmanager
    def _blamed(self, number: int) -> Iterator[None]:
        """Says of a learner that diverged which it is, where it was and what to change."""
        try:
            yield
        except Diverged as error:
            each, config = self.learners[number], self.learners[number].config
            own = [n for n in OWN if len({getattr(e.config, n) for e in self.learners}) > 1]
            which = " ".join(f"{option(n)} {getattr(config, n)}" for n in own)
            causes = ["lr", "max_norm"]
            if any(r.active for r in each.regularizers):
                causes += [f"{p}_coefficient" for p in PENALTIES if p in config.parts]
            shown = [f"{option(n)} {getattr(config, n):g}" for n in causes]
            where = f"task {min(self.task + 1, config.tasks)}"
            if self.epoch < config.epochs:
                where += f", epoch {self.epoch + 1}, step {self.position}"
            raise Diverged(
                f"{f'the run with {which}' if which else 'training'} diverged: {error} in {where}; "
                f"most likely one of {', '.join(shown)} is too large",
                number,
            ) from error

    def _require_finite(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        with self._blamed(number):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not finite(tensor):
                    raise Diverged(f"{name} is not finite")

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers that load_state needs to go on from here.

        Raises:
            Diverged: a tensor is not finite; nothing could go on from it.
        """
        tensors: dict[str, Tensor] = {}
        for number, each in enumerate(self.learners):
            own = each.state()
            self._require_finite(number, own)
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
        return tensors, {n: getattr(self, n) for n in ("task", "epoch", "position", "steps")}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Puts the trainer where state() was taken; KeyError or RuntimeError for another model."""
        for number, each in enumerate(self.learners):
            each.load_state(part(tensors, str(number)))
        for name in ("task", "epoch", "position", "steps"):
            setattr(self, name, int(numbers[name]))


def _sdmlp(learner: Learner) -> SDMLP:
    assert isinstance(learner.model, SDMLP)
    return learner.model


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _shifted(indices: Tensor, offset: int) -> Tensor:
    return indices + offset if offset else indices


def _spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each learner's value [S, ..] for each of its samples [B, ..]."""
    if len(sizes) == 1:
        return values.expand(sizes[0], *values.shape[1:])
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=0)


def _slices(sizes: Sequence[int]) -> list[slice]:
    slices, first = [], 0
    for size in sizes:
        slices.append(slice(first, first + size))
        first += size
    return slices
