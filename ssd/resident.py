"""Whole epochs on the device: data, order and counters live there, and the host reads nothing.

On CUDA one step is captured as a CUDA graph and replayed for the epoch. Which path a step takes,
dense or sparse, is settled once an epoch. Should a sample of an almost k-sparse layer activate more
neurons than the code has slots, a flag is raised; the epoch is then taken back and trained densely,
so the result is exact all the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssd.distillation import preactivations_of
from ssd.learner import ENCODER
from ssd.sdmlp import SDMLP, SPARSE_SHARE, WIDTH, AnnealedTopKLinear
from ssd_kernels import TopKOutput, count_active, distill, linear_code, linear_inhibit

if TYPE_CHECKING:
    from ssd.trainer import Trainer

# How a learner's step is taken for an epoch.
DENSE, GRADED, EXACT = "dense", "graded", "exact"
IDLE = "idle"  # its epoch is over, a companion's is not
# Steps run before a capture, so that kernels are compiled and libraries initialised.
WARM_UP = 3


class ResidentEpochs:
    """Trains whole epochs of a trainer's present task.

    Args:
        trainer: its learners are SDMLPs whose steps need no host, see `serves`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.device
        learners = trainer.learners
        config, count = trainer.config, len(learners)
        self.encoders = [_encoder(each.model) for each in learners]
        features = self.encoders[0].in_features
        classes = trainer.weights[1].shape[1]
        self.longest = max(len(task.y_train) for each in learners for task in each.tasks)
        self.batch = min(config.batch_size, self.longest)
        padded = -(-self.longest // self.batch) * self.batch
        dtype = trainer.weights[0].dtype

        def store(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=self.device)

        self.inputs = store(count * self.longest, features)
        self.labels = store(count * self.longest, kind=torch.int64)
        self.order = store(count, padded, kind=torch.int64)
        self.samples = store(count, 1, kind=torch.int64)  # of each learner's task
        self.first = torch.arange(count, device=self.device).unsqueeze(1) * self.longest
        self.within = torch.arange(self.batch, device=self.device)
        self.position = store(kind=torch.int64)
        self.overflow = store(count, kind=torch.bool)
        self.teacher_logits = store(count * self.longest, classes)
        self.teacher_hidden: Tensor | None = None
        self.neurons: Tensor | None = None  # [S, n] distilled
        self.seen = store(count, classes, kind=torch.bool)
        self._task = -1
        self._steps: dict[tuple[Any, ...], Callable[[], None]] = {}

    @staticmethod
    def serves(trainer: Trainer) -> bool:
        """Whether no part of the method needs the host: the linear schedule and SI do."""
        return (
            trainer.sparse
            and trainer.config.schedule != "linear"
            and "si" not in trainer.config.parts
        )

    def train_epoch(self) -> None:
        """One epoch of the trainer's task; the trainer counts it."""
        paths = self._begin()
        before = self._mutable() if GRADED in paths else []
        kept = [tensor.clone() for tensor in before]
        self._steps_of(paths)
        crowded = self.overflow.tolist() if GRADED in paths else []
        if any(crowded):
            for tensor, copy in zip(before, kept, strict=True):
                tensor.copy_(copy)
            again = [DENSE if bad else path for bad, path in zip(crowded, paths, strict=True)]
            self._steps_of(again)
            for bad, encoder in zip(crowded, self.encoders, strict=True):
                if bad:  # the next epoch is dense without a try
                    encoder.dense_until.copy_(encoder.samples + 1)

    def first_step(self) -> Callable[[], None]:
        """The first step of an epoch, to be run again and again by a benchmark."""
        step = self._step(tuple(self._begin()))

        def run() -> None:
            self.position.zero_()
            step()

        return run

    def _begin(self) -> list[str]:
        """Readies the epoch's data and order; how each learner's steps are taken."""
        trainer = self.trainer
        self._load_task()
        for row, each in zip(self.order, trainer.learners, strict=True):
            order = each.order(trainer.task, trainer.epoch)
            row[: len(order)] = order
        return [self._path(number) for number in range(len(self.encoders))]

    def _steps_of(self, paths: Sequence[str]) -> None:
        self.position.zero_()
        self.overflow.zero_()
        lengths = [-(-len(each.labels) // self.batch) for each in self.trainer.learners]
        for position in range(max(lengths)):
            busy = [p if position < n else IDLE for p, n in zip(paths, lengths, strict=True)]
            self._step(tuple(busy))()

    def _step(self, paths: tuple[str, ...]) -> Callable[[], None]:
        """The step as a graph on CUDA, captured once for each of its forms."""
        trainer = self.trainer
        penalized = tuple(r.active for each in trainer.learners for r in each.regularizers)
        form = (paths, trainer.teaches, penalized)
        if form not in self._steps:
            self._steps[form] = self._captured(paths) if self.device.type == "cuda" else (
                lambda: self.body(paths)
            )  # fmt: skip
        return self._steps[form]

    def _captured(self, paths: tuple[str, ...]) -> Callable[[], None]:
        """torch.cuda.graph of body(paths); the steps that warm it up are taken back."""
        before = [*self._mutable(), self.position, self.overflow]
        kept = [tensor.clone() for tensor in before]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.body(paths)
        torch.cuda.current_stream(self.device).wait_stream(side)
        for tensor, copy in zip(before, kept, strict=True):
            tensor.copy_(copy)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.body(paths)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            warnings.warn(f"no CUDA graph ({line}): steps run one by one", stacklevel=2)
            return lambda: self.body(paths)
        return graph.replay

    def body(self, paths: Sequence[str]) -> None:
        """One step of all learners at self.position; reads and writes tensors of fixed place."""
        trainer, batch = self.trainer, self.batch
        places = self.position * batch + self.within
        valid = places < self.samples  # [S, B]: the last batch of a learner may be short
        places = places.clamp(max=self.order.shape[1] - 1)
        where = self.order.index_select(1, places) + self.first
        share = valid.sum(1, keepdim=True).clamp(min=1).to(trainer.weights[0].dtype)
        share = torch.where(valid, share, torch.inf)  # what is no sample has no gradient
        sparse = [number for number, path in enumerate(paths) if path in (GRADED, EXACT)]
        for number, path in enumerate(paths):
            if path == DENSE:
                self._dense(number, where[number], valid[number], share[number])
        if sparse:
            self._sparse(sparse, paths, where, valid, share)
        self.position += 1

    def _sparse(
        self, numbers: Sequence[int], paths: Sequence[str], where: Tensor, valid: Tensor,
        share: Tensor,
    ) -> None:  # fmt: skip
        trainer, batch = self.trainer, self.batch
        rows = torch.cat([where[number] for number in numbers])
        address = self.inputs.index_select(0, rows)
        labels = self.labels.index_select(0, rows)
        slices = [slice(i * batch, (i + 1) * batch) for i in range(len(numbers))]
        values, indices = [], []
        for number, own in zip(numbers, slices, strict=True):
            code = self._code(number, paths[number], address[own], valid[number])
            values.append(code.values)
            indices.append(code.indices + number * trainer.config.neurons)
        code = TopKOutput(torch.cat(values), torch.cat(indices))
        terms, positions = self._targets(numbers, rows, code)
        logits, loss = trainer.learn(
            numbers, slices, address, labels, code,
            torch.cat([share[number] for number in numbers]).unsqueeze(1), positions, terms,
        )  # fmt: skip
        for number, own in zip(numbers, slices, strict=True):
            self._note(number, loss[own], logits[own], labels[own], valid[number])

    def _code(self, number: int, path: str, x: Tensor, valid: Tensor) -> TopKOutput:
        """The code of a learner's batch, empty where there is no sample; counts and overflow."""
        encoder = self.encoders[number]
        graded = path == GRADED
        code, overflow = linear_code(
            x,
            encoder.weight.detach(),
            encoder.k,
            WIDTH * encoder.k if encoder.schedule == "gaba" else encoder.k,
            encoder.gaba() if graded else None,
            inhibition=encoder.inhibition,
        )
        code = code._replace(values=code.values * valid.unsqueeze(1))
        self.overflow[number] |= overflow
        count_active(code.values, code.indices, encoder.counts)
        encoder.samples += valid.sum()
        return code

    def _targets(
        self, numbers: Sequence[int], rows: Tensor, code: TopKOutput
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The teacher's part of the loss, from the stores."""
        trainer = self.trainer
        if not trainer.teaches:
            return {}, None
        terms: dict[str, Any] = {
            "target_logits": self.teacher_logits.index_select(0, rows),
            "kl": trainer.config.kl,
        }
        for name, value in trainer.losses.items():
            terms[name] = torch.cat([value[n : n + 1].expand(self.batch) for n in numbers])
        if trainer.config.logits == "seen":
            terms["columns"] = torch.cat([self.seen[n].expand(self.batch, -1) for n in numbers])
        if self.teacher_hidden is None:
            return terms, None
        terms["target_hidden"] = self.teacher_hidden.index_select(0, rows)
        terms["hidden"], positions = trainer.distilled(code, self.teacher_hidden.shape[1])
        return terms, positions

    def _dense(self, number: int, where: Tensor, valid: Tensor, share: Tensor) -> None:
        """Autograd through the whole network of one learner."""
        trainer, encoder = self.trainer, self.encoders[number]
        each = trainer.learners[number]
        x, labels = self.inputs.index_select(0, where), self.labels.index_select(0, where)
        gaba = encoder.gaba() if encoder.schedule == "gaba" else None
        h = linear_inhibit(x, encoder.weight, encoder.k, gaba, inhibition=encoder.inhibition)
        logits = h @ each.parameters[1]
        outputs = [logits]
        terms: dict[str, Any] = {}
        if trainer.teaches:
            own = [value[number] for value in trainer.losses.values()]
            terms = dict(zip(trainer.losses, own, strict=True))
            terms = {name: value.expand(self.batch) for name, value in terms.items()}
            terms |= {"target_logits": self.teacher_logits.index_select(0, where)}
            terms |= {"kl": trainer.config.kl}
            if trainer.config.logits == "seen":
                terms["columns"] = self.seen[number].expand(self.batch, -1)
            if self.teacher_hidden is not None and self.neurons is not None:
                chosen = self.neurons[number]
                z = h.index_select(1, chosen)
                if trainer.config.hidden == "before":
                    z = preactivations_of(encoder, x, chosen)
                outputs.append(z)
                terms["target_hidden"] = self.teacher_hidden.index_select(0, where)
                terms["hidden"] = z.detach()
        output = distill(logits.detach(), labels, **terms)
        slopes = [g / share.unsqueeze(1) for g in output[1:] if g is not None]
        gradients = torch.autograd.grad(outputs, each.parameters, slopes)
        trainer.update(each, list(gradients))
        encoder.counts += ((h > 0) & valid.unsqueeze(1)).sum(0)
        encoder.samples += valid.sum()
        self._note(number, output.loss, logits.detach(), labels, valid)

    def _note(
        self, number: int, loss: Tensor, logits: Tensor, labels: Tensor, valid: Tensor
    ) -> None:
        each = self.trainer.learners[number]
        each.loss_sum += torch.where(valid, loss, 0.0).sum()
        each.correct += ((logits.argmax(-1) == labels) & valid).sum()

    def _path(self, number: int) -> str:
        """How the next epoch is trained; reads the device once."""
        trainer, encoder = self.trainer, self.encoders[number]
        before = trainer.config.hidden == "before"
        gaba, excited = encoder.response()
        width = WIDTH * encoder.k if encoder.schedule == "gaba" else encoder.k
        if (
            excited
            or width > encoder.neurons * SPARSE_SHARE
            or encoder.samples < encoder.dense_until
            or (trainer.teaches and trainer.distils_hidden and before)
        ):
            return DENSE
        return EXACT if gaba is None else GRADED

    def _mutable(self) -> list[Tensor]:
        """Every tensor that a step writes to and the next one reads."""
        learners = self.trainer.learners
        return [
            *self.trainer.weights,
            *(t for encoder in self.encoders for t in (encoder.counts, encoder.samples)),
            *(t for each in learners for t in (each.loss_sum, each.correct)),
            *(buffer for each in learners for buffer in each.momentum or []),
        ]

    def _load_task(self) -> None:
        """Copies the task's data and the teacher's outputs into their places."""
        trainer = self.trainer
        if self._task == trainer.task:
            return
        self._task = trainer.task
        for number, each in enumerate(trainer.learners):
            count = len(each.labels)
            own = slice(number * self.longest, number * self.longest + count)
            self.inputs[own], self.labels[own] = each.inputs, each.labels
            self.samples[number] = count
            distiller = each.distiller
            if distiller is None or distiller.teacher_logits is None:
                continue
            self.teacher_logits[own] = distiller.teacher_logits
            if distiller.classes_seen is not None:
                self.seen[number, distiller.classes_seen] = True
            if not trainer.distils_hidden:
                continue
            hidden, chosen = distiller.teacher_hidden[ENCODER], distiller.neurons[ENCODER]
            if self.teacher_hidden is None or self.neurons is None:
                shape = (len(trainer.learners) * self.longest, hidden.shape[1])
                self.teacher_hidden = hidden.new_zeros(shape)
                self.neurons = chosen.new_zeros(len(trainer.learners), len(chosen))
            self.teacher_hidden[own], self.neurons[number] = hidden, chosen


def _encoder(model: Any) -> AnnealedTopKLinear:
    assert isinstance(model, SDMLP)
    return model.encoder
