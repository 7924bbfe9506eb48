"""Whole epochs on the device: data, order and counters live there, and the host reads nothing.

On CUDA a step of all learners is captured as a CUDA graph and replayed for the epoch. Each epoch
chooses the form of a learner's hidden layer; the step of a form is replayed for the learners with
that form, while the others rest. If a sample of an almost k-sparse layer activates more neurons
than the code has slots, a flag is set. The epoch is then undone and trained densely, so the result
stays exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd.errors import one_line
from ssd.learner import Learner, Stack
from ssd.models import SDMLP, SPARSE_SHARE, WIDTH
from ssd.ops import reference
from ssd.ops.batch import draw_batch, tally
from ssd.step import Batch, sparse_step
from ssd_kernels import TopKOutput, linear_topk
from ssd_kernels._graded_code import ActiveNeurons, linear_active, linear_code

# Forms of a hidden layer: dense, a code wider than k, a code of k slots.
DENSE, GRADED, EXACT = "dense", "graded", "exact"
WARM_UP = 3  # steps before a capture, which compile kernels and initialise libraries


class GraphedEpochs:
    """Trains whole epochs of learners side by side.

    Args:
        learners: SDMLPs whose steps need no host, see `serves`.
    """

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.stack = stack = Stack(learners)
        weight, count = stack.weights[0], len(learners)
        self.device = weight.device
        self.longest = max(len(task.y_train) for learner in learners for task in learner.tasks)
        self.batch = min(stack.config.batch_size, self.longest)
        self.encoder = stack.encoders[0]
        self.width = self.encoder.k * (WIDTH if self.encoder.schedule == "gaba" else 1)

        def store(*shape: int, kind: torch.dtype = weight.dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=self.device)

        self.inputs = store(count * self.longest, weight.shape[1])
        self.labels = store(count * self.longest, kind=torch.int64)
        self.order = store(count, self.longest, kind=torch.int64)
        self.taken = store(count, kind=torch.int64)  # samples of the learners that take the step
        self.position = store(kind=torch.int64)
        self.overflow = store(count, kind=torch.bool)
        self.anneal_samples = torch.tensor(
            [encoder.anneal_samples for encoder in stack.encoders], device=self.device
        )
        self.teacher: dict[str, Tensor] = {}  # target_logits and target_hidden of all samples
        self.terms: dict[str, Any] = {}  # the loss's other terms
        self._steps: dict[tuple[Any, ...], Callable[[], None]] = {}

    @staticmethod
    def serves(learners: Sequence[Learner]) -> bool:
        """Whether no part of the method needs the host, as the linear schedule does."""
        sparse = all(learner.sparse for learner in learners)
        return sparse and learners[0].config.schedule != "linear"

    def load_task(self) -> None:
        """Copies the task's data and the teacher's outputs into their places."""
        self.stack.load_task()
        own_terms: list[dict[str, Any]] = []
        for number, learner in enumerate(self.stack.learners):
            count = len(learner.labels)
            own = slice(number * self.longest, number * self.longest + count)
            self.inputs[own], self.labels[own] = learner.inputs, learner.labels
            if learner.distiller is None:
                continue
            everything = torch.arange(count, device=self.device)
            own_terms.append(terms := learner.distiller.terms(everything))
            if self.stack.distils_hidden:  # this learner's own lam may be 0
                terms["target_hidden"] = learner.distiller.teacher_hidden[SDMLP.layer]
            for name in ("target_logits", "target_hidden"):
                if name in terms:
                    values = terms.pop(name)
                    shape = (len(self.stack) * self.longest, values.shape[1])
                    if name not in self.teacher:
                        self.teacher[name] = values.new_zeros(shape)
                    self.teacher[name][own] = values
        if not self.stack.teaches:
            return
        for name, value in own_terms[0].items():
            if isinstance(value, str):
                self.terms[name] = value
                continue
            joined = torch.cat([self._for_batch(terms[name]) for terms in own_terms])
            if name in self.terms:  # a graph reads it where it is
                self.terms[name].copy_(joined)
            else:
                self.terms[name] = joined

    def _for_batch(self, value: Tensor | float) -> Tensor:
        """A term of the loss for every sample of a batch, [B] or [B, C]."""
        if isinstance(value, Tensor):
            return value[:1].expand(self.batch, -1)  # the same for all samples
        return self.inputs.new_full((self.batch,), value)

    def train_epoch(self, task: int, epoch: int) -> None:
        """One epoch of the task that is loaded."""
        forms = self._begin(task, epoch)
        restore = _snapshot(self._written() if GRADED in forms else [])
        self._train(forms)
        crowded = self.overflow.tolist() if GRADED in forms else []
        if any(crowded):
            restore()
            self._train([DENSE if bad else f for bad, f in zip(crowded, forms, strict=True)])
            for bad, encoder in zip(crowded, self.stack.encoders, strict=True):
                if bad:  # the next epoch is dense at once
                    encoder.dense_until.copy_(encoder.samples + 1)

    def first_step(self, task: int, epoch: int) -> Callable[[], None]:
        """The first step of an epoch, which a benchmark runs repeatedly."""
        form, *others = set(self._begin(task, epoch))
        assert not others, "a benchmark's learners take one form"
        self.taken.copy_(torch.tensor(self._sizes(), device=self.device))
        step = self._step(form)

        def run() -> None:
            self.position.zero_()
            step()

        return run

    def _begin(self, task: int, epoch: int) -> list[str]:
        """Stores the epoch's orders and returns the form of each learner's hidden layer."""
        for row, learner in zip(self.order, self.stack.learners, strict=True):
            order = learner.order(task, epoch)
            row[: len(order)] = order
        return self._forms()

    def _sizes(self) -> list[int]:
        return [len(learner.labels) for learner in self.stack.learners]

    def _train(self, forms: Sequence[str]) -> None:
        self.overflow.zero_()
        for form in sorted(set(forms)):
            sizes = [n if f == form else 0 for n, f in zip(self._sizes(), forms, strict=True)]
            self.taken.copy_(torch.tensor(sizes, device=self.device))
            self.position.zero_()
            step = self._step(form)
            for _ in range(-(-max(sizes) // self.batch)):
                step()

    def _step(self, form: str) -> Callable[[], None]:
        """The step, on CUDA as a graph that is captured once per form and state of the method."""
        learners = self.stack.learners
        penalized = tuple(r.active for learner in learners for r in learner.regularizers)
        key = (form, self.stack.teaches, penalized)
        if key not in self._steps:
            on_cuda = self.device.type == "cuda"
            self._steps[key] = self._captured(form) if on_cuda else partial(self.body, form)
        return self._steps[key]

    def _captured(self, form: str) -> Callable[[], None]:
        """torch.cuda.graph of body(form); its warm-up steps are undone."""
        restore = _snapshot([*self._written(), self.position, self.overflow])
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.body(form)
        torch.cuda.current_stream(self.device).wait_stream(side)
        restore()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.body(form)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph ({one_line(error)}): steps run one by one", stacklevel=2)
            return partial(self.body, form)
        return graph.replay

    def body(self, form: str) -> None:
        """One step at self.position; the tensors that it reads and writes stay in place."""
        stack = self.stack
        gaba = self.encoder.schedule == "gaba" and form != EXACT
        stored = reference.Stored(
            self.inputs,
            self.labels,
            self.order,
            self.taken,
            self.position,
            self.batch,
            self.teacher.get("target_logits"),
            self.teacher.get("target_hidden"),
            stack.counts if gaba else None,
            self.anneal_samples if gaba else None,
        )
        drawn = draw_batch(stored)
        terms = dict(self.terms)
        for name in self.teacher:
            terms[name] = getattr(drawn, name)
        batch = Batch(drawn.address, drawn.labels, drawn.weight, terms)
        hidden, wider = self._encode(form, drawn.address, drawn.gaba)
        loss = sparse_step(stack, batch, hidden)
        sums = reference.Tally(
            loss.loss,
            loss.logits,
            batch.labels,
            batch.weight,
            stack.loss_sum,
            stack.correct,
            stack.samples,
            self.position,
            wider,
            self.overflow,
        )
        tally(sums)

    def _encode(
        self, form: str, x: Tensor, gaba: Tensor | None
    ) -> tuple[TopKOutput | ActiveNeurons, Tensor | None]:
        """The hidden layer in its form, and [S B] which samples do not fit into their code."""
        stack, k = self.stack, self.encoder.k
        given: dict[str, Any] = {
            "inhibition": self.encoder.inhibition,
            "counts": stack.counts,
            "networks": len(stack),
        }
        if form == EXACT:
            return linear_topk(x, stack.weights[0], k, **given), None
        if form == GRADED:
            return linear_code(x, stack.weights[0], k, self.width, gaba, **given)
        return linear_active(x, stack.weights[0], k, gaba, every=True, **given), None

    def _forms(self) -> list[str]:
        """The form of each learner's hidden layer; reads the device."""
        stack, count = self.stack, len(self.stack)
        if stack.reads_scores or self.width > stack.config.neurons * SPARSE_SHARE:
            return [DENSE] * count
        least = [1.0] * count
        if self.encoder.schedule == "gaba":
            gaba = reference.gaba(stack.counts, self.anneal_samples, stack.weights[0].dtype)
            assert gaba is not None
            least = gaba.view(count, -1).amin(1).tolist()
        forms = [EXACT if g >= 1 else GRADED if g > 0 else DENSE for g in least]
        crowded = (stack.samples < stack.dense_until).tolist()
        return [DENSE if late else form for late, form in zip(crowded, forms, strict=True)]

    def _written(self) -> list[Tensor]:
        """All tensors that a step writes and the next one reads."""
        stack = self.stack
        followed = (r.followed() for learner in stack.learners for r in learner.regularizers)
        return [
            *stack.weights,
            *(stack.momentum or []),
            *(stack.counts, stack.samples, stack.loss_sum, stack.correct),
            *(tensor for tensors in followed for tensor in tensors),
        ]


def _snapshot(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """A function that gives the tensors their present values back."""
    kept = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        for tensor, copy in zip(tensors, kept, strict=True):
            tensor.copy_(copy)

    return restore
