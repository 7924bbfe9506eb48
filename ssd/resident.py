"""Whole epochs on the device: data, order and counters live there, and the host reads nothing.

On CUDA one step is captured as a CUDA graph and replayed for the epoch. Which path a step takes,
dense or sparse, is settled once an epoch. Should a sample of an almost k-sparse layer activate more
neurons than the code has slots, a flag is raised; the epoch is then taken back and trained densely,
so the result is exact all the same.

Learners on the same path that stand next to one another share the calls of a step: their weights
[S R, d] lie in one tensor. What is computed is each learner's own step, whoever is beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssd.distill import distill
from ssd.learner import ENCODER
from ssd.sdmlp import SDMLP, SPARSE_SHARE, WIDTH, AnnealedTopKLinear, response_to_inhibition
from ssd_kernels import TopKOutput, count_active, linear_inhibit
from ssd_kernels._graded_code import linear_code
from ssd_kernels.reference import by_network

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
        # How often each neuron of every learner was active; the encoders' own become views.
        self.counts = torch.cat([encoder.counts for encoder in self.encoders])
        for encoder, own in zip(self.encoders, self.counts.chunk(count), strict=True):
            encoder.counts = own
        anneal = [[encoder.anneal_samples] for encoder in self.encoders]
        self.anneal_samples = torch.tensor(anneal, dtype=dtype, device=self.device)
        first = self.encoders[0]
        self.width = WIDTH * first.k if first.schedule == "gaba" else first.k
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
        return self._paths()

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
        batch = self.batch
        places = self.position * batch + self.within
        valid = places < self.samples  # [S, B]: the last batch of a learner may be short
        places = places.clamp(max=self.order.shape[1] - 1)
        where = self.order.index_select(1, places) + self.first
        taken = valid.sum(1)
        share = taken.clamp(min=1).to(self.trainer.weights[0].dtype).unsqueeze(1)
        share = torch.where(valid, share, torch.inf)  # what is no sample has no gradient
        dense = [number for number, path in enumerate(paths) if path == DENSE]
        sparse = [number for number, path in enumerate(paths) if path in (GRADED, EXACT)]
        for run in _runs(dense):
            self._dense(run, where, valid, share)
        if sparse:
            self._sparse(sparse, GRADED in paths, where, valid, share)
        for number in (*dense, *sparse):
            self.encoders[number].samples += taken[number]
        self.position += 1

    def _sparse(
        self, numbers: Sequence[int], graded: bool, where: Tensor, valid: Tensor, share: Tensor
    ) -> None:
        batch, rows = self.batch, _joined(where, numbers)
        address = self.inputs.index_select(0, rows)
        labels = self.labels.index_select(0, rows)
        present = _joined(valid, numbers)
        code = self._code(numbers, graded, address)
        code = code._replace(values=code.values * present.unsqueeze(1))
        count_active(code.values, code.indices, self.counts)
        terms, positions = self._taught(numbers, rows), None
        if terms and self.teacher_hidden is not None:
            terms["target_hidden"] = self.teacher_hidden.index_select(0, rows)
            size = self.teacher_hidden.shape[1]
            terms["hidden"], positions = self.trainer.distilled(code, size)
        slices = [slice(i * batch, (i + 1) * batch) for i in range(len(numbers))]
        shares = _joined(share, numbers).unsqueeze(1)
        logits, loss = self.trainer.learn(
            numbers, slices, address, labels, code, shares, positions, terms
        )
        self._note(numbers, loss, logits, labels, present)

    def _code(self, numbers: Sequence[int], graded: bool, x: Tensor) -> TopKOutput:
        """The codes of the learners' batches [n B, d], neurons numbered through all learners.

        Where g = 1, as in a learner that is not graded, the graded code is the exact one.
        """
        encoder, done, codes = self.encoders[0], 0, []
        for run in _runs(numbers):
            own = x[done : done + len(run) * self.batch]
            code, wider = linear_code(
                own,
                self._rows(self.trainer.weights[0], run),
                encoder.k,
                self.width,
                self._gaba(run) if graded else None,
                inhibition=encoder.inhibition,
                blocks=len(run),
            )
            self.overflow[run.start : run.stop].logical_or_(wider.view(len(run), -1).any(1))
            codes.append(code._replace(indices=code.indices + run.start * encoder.neurons))
            done += len(own)
        if len(codes) == 1:
            return codes[0]
        return TopKOutput(
            torch.cat([c.values for c in codes]), torch.cat([c.indices for c in codes])
        )

    def _dense(self, run: range, where: Tensor, valid: Tensor, share: Tensor) -> None:
        """Autograd through the whole networks of learners that follow one another."""
        trainer, encoder, count = self.trainer, self.encoders[0], len(run)
        rows, present = _joined(where, run), _joined(valid, run)
        x, labels = self.inputs.index_select(0, rows), self.labels.index_select(0, rows)
        leaves = [self._rows(weight, run).detach().requires_grad_() for weight in trainer.weights]
        addresses, decoders = (by_network(leaf, count) for leaf in leaves)
        gaba = self._gaba(run) if encoder.schedule == "gaba" else None
        h = linear_inhibit(
            x, leaves[0], encoder.k, gaba, inhibition=encoder.inhibition, blocks=count
        )
        hidden = by_network(h, count)
        logits = torch.bmm(hidden, decoders).flatten(0, 1)
        outputs = [logits]
        terms = self._taught(run, rows)
        if terms and self.teacher_hidden is not None and self.neurons is not None:
            chosen = self.neurons[run.start : run.stop].unsqueeze(2)  # [n, m, 1]
            if trainer.config.hidden == "before":
                distilled = addresses.gather(1, chosen.expand(-1, -1, x.shape[1]))
                z = torch.bmm(by_network(x, count), distilled.mT).relu()
            else:
                z = hidden.gather(2, chosen.mT.expand(-1, self.batch, -1))
            outputs.append(z.flatten(0, 1))
            terms["target_hidden"] = self.teacher_hidden.index_select(0, rows)
            terms["hidden"] = outputs[1].detach()
        output = distill(logits.detach(), labels, **terms)
        shares = _joined(share, run).unsqueeze(1)
        slopes = [g / shares for g in output[1:] if g is not None]
        gradients = torch.autograd.grad(outputs, leaves, slopes)
        for number, *own in zip(run, *(by_network(g, count) for g in gradients), strict=True):
            trainer.update(trainer.learners[number], own)
        counts = self._rows(self.counts, run)
        counts += by_network((h > 0) & present.unsqueeze(1), count).sum(1).flatten()
        self._note(run, output.loss, logits.detach(), labels, present)

    def _taught(self, numbers: Sequence[int], rows: Tensor) -> dict[str, Any]:
        """The teacher's part of the loss on the logits, from the stores; none without a teacher."""
        trainer = self.trainer
        if not trainer.teaches:
            return {}

        def spread(values: Tensor) -> Tensor:
            each = values.unsqueeze(1)
            return _joined(each.expand(-1, self.batch, *values.shape[1:]), numbers)

        terms: dict[str, Any] = {name: spread(value) for name, value in trainer.losses.items()}
        terms["target_logits"] = self.teacher_logits.index_select(0, rows)
        terms["kl"] = trainer.config.kl
        if trainer.config.logits == "seen":
            terms["columns"] = spread(self.seen)
        return terms

    def _note(
        self, numbers: Sequence[int], loss: Tensor, logits: Tensor, labels: Tensor, valid: Tensor
    ) -> None:
        """Adds a step to the sums of the learners, all [n B, ..]."""
        losses = torch.where(valid, loss, 0.0).view(len(numbers), -1).sum(1)
        hits = ((logits.argmax(-1) == labels) & valid).view(len(numbers), -1).sum(1)
        for number, own_loss, own_hits in zip(numbers, losses, hits, strict=True):
            each = self.trainer.learners[number]
            each.loss_sum += own_loss
            each.correct += own_hits

    def _rows(self, stacked: Tensor, run: range) -> Tensor:
        """The part of a tensor [S R, ..] that belongs to some learners."""
        neurons = self.trainer.config.neurons
        return stacked[run.start * neurons : run.stop * neurons]

    def _gaba(self, run: range) -> Tensor:
        """AnnealedTopKLinear.gaba() of some learners, [n R]."""
        counts = self._rows(self.counts, run).view(len(run), -1)
        anneal = self.anneal_samples[run.start : run.stop]
        return response_to_inhibition(counts, anneal, anneal.dtype).flatten()

    def _paths(self) -> list[str]:
        """How each learner's next epoch is trained; reads the device."""
        trainer, count = self.trainer, len(self.encoders)
        before = trainer.teaches and trainer.distils_hidden and trainer.config.hidden == "before"
        if before or self.width > trainer.config.neurons * SPARSE_SHARE:
            return [DENSE] * count
        least = [1.0] * count
        if self.encoders[0].schedule == "gaba":
            least = self._gaba(range(count)).view(count, -1).amin(1).tolist()
        paths = [EXACT if g >= 1 else GRADED if g > 0 else DENSE for g in least]
        for number, encoder in enumerate(self.encoders):
            if encoder.samples < encoder.dense_until:
                paths[number] = DENSE
        return paths

    def _mutable(self) -> list[Tensor]:
        """Every tensor that a step writes to and the next one reads."""
        learners = self.trainer.learners
        return [
            *self.trainer.weights,
            self.counts,
            *(encoder.samples for encoder in self.encoders),
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


def _runs(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers, those that follow one another together."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _joined(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """[S, B, ..] -> [n B, ..] of some learners."""
    if len(numbers) == len(rows):
        return rows.flatten(0, 1)
    return torch.cat([rows[number] for number in numbers])


def _encoder(model: Any) -> AnnealedTopKLinear:
    assert isinstance(model, SDMLP)
    return model.encoder
