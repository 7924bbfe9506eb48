"""Selective Subnetwork Distillation (SSD, Xue et al., AAAI 2026, arXiv 2512.15267).

A Distiller attaches to any module with Top-K layers. It finds ssd_kernels.nn.TopK, TopKLinear and
their subclasses by itself; other modules with a dense activation [B, .., R] must be named.

    distiller = Distiller(model)
    for x, y in tasks:
        distiller.begin_task(x)  # the teacher's outputs, once per task
        for batch in batches:
            logits = model(x[batch])
            distiller.loss(logits, y[batch], batch).backward()
        distiller.end_task(x)  # activation frequencies, selection

The teacher is the model when a task begins; no copy is kept. Hidden activations are stored with the
logits of their forward pass and freed with them, so other passes may come before loss().
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.activations import CHUNK, Recorder, evaluating, find_layers
from ssd.losses import HIDDEN_LOSSES, KL, choice, distillation_loss, positive, real, wide
from ssd.ops.reference import distill
from ssd_kernels.nn import TopKLinear

# The choices of a Distiller's options, besides hidden_loss.
CHOICES = {
    "kl": KL,
    "hidden": ("after", "before"),
    "logits": ("all", "seen"),
    "frequency": ("last", "accumulated"),
}


def select_subnetwork(frequency: Tensor, size: int) -> Tensor:
    """The `size` neurons of highest frequency [R], ties to the lower index; ascending, [n]."""
    order = torch.sort(frequency, descending=True, stable=True).indices
    return order[:size].sort().values


def subnetwork_size(k: int, neurons: int, factor: float) -> int:
    """n of a layer: factor * k, but at least k and at most all its neurons."""
    return min(max(k, round(factor * k)), neurons)


class Distiller:
    """The SSD loss for a model with Top-K layers.

    Args:
        model: x [B, ..] -> logits [B, C], with at least one Top-K layer; it may be wrapped by
            DistributedDataParallel, DataParallel or torch.compile (with fullgraph=True it must be).
        alpha: weight of the cross entropy, in 0..1.
        lam: lambda, share of the hidden term in the rest, in 0..1; 0 is LwF.
        temperature: T > 0.
        subnetwork: n / k; a layer's n most frequent neurons are distilled. n is at least k and at
            most R, so a value below 1 acts as 1.
        kl: direction of both KL terms, see distillation_loss.
        hidden: z taken "after" or "before" inhibition.
        logits: distil "all" outputs or only the classes "seen" before this task.
        frequency: rank neurons by the "last" task's activation frequency or by the "accumulated".
        layers: the Top-K layers, by module name; None finds them. Modules other than TopK and
            TopKLinear also need their k: a mapping {name: k}.
        hidden_loss: the hidden term, a name in HIDDEN_LOSSES.

    Copies of the model, deep or pickled, have no Distiller; a copy of the Distiller has a copy of
    the model. Under torch.distributed end_task adds up the counts of all ranks, so that they choose
    one subnetwork; every rank must call it.

    Raises:
        ValueError: no Top-K layer, an unknown name or option, or a number out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.7,
        lam: float = 0.1,
        temperature: float = 8.0,
        subnetwork: float = 1.0,
        kl: str = "reverse",
        hidden: str = "after",
        logits: str = "all",
        frequency: str = "last",
        layers: Sequence[str] | Mapping[str, int] | None = None,
        hidden_loss: str = "kl",
    ) -> None:
        self.model = model
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.subnetwork, self.kl, self.hidden = subnetwork, kl, hidden
        self.logits, self.frequency, self.hidden_loss = logits, frequency, hidden_loss
        for name, known in [*CHOICES.items(), ("hidden_loss", HIDDEN_LOSSES)]:
            choice(name, getattr(self, name), known)
        for name, number in (("alpha", alpha), ("lam", lam)):
            if not (real(number) and 0 <= number <= 1):
                raise ValueError(f"{name}={number!r} must be a number in 0..1")
        positive("temperature", temperature)
        positive("subnetwork", subnetwork)
        self.layers = find_layers(model, layers)
        self.counts: dict[str, Tensor] = {}  # {layer: [R]} activations counted
        self.neurons: dict[str, Tensor] = {}  # {layer: [n]} the selected subnetwork
        self.teacher_logits: Tensor | None = None  # [N, C]
        self.teacher_hidden: dict[str, Tensor] = {}  # {layer: [N, .., n]}
        self.classes_seen: Tensor | None = None  # ascending labels
        self._attach()

    def _attach(self) -> None:
        self._recorder = Recorder(self.model, self.layers, self.hidden == "before")
        self._detach = weakref.finalize(self, self._recorder.remove)
        self._detach.atexit = False
        self._watch()

    def _watch(self) -> None:
        """Keeps hidden activations of coming passes if loss() will need them."""
        self._recorder.watch(self.neurons if self.teaches and self.lam > 0 else {})

    def __getstate__(self) -> dict[str, Any]:
        state = {"attached": self._recorder.attached, **self.__dict__}
        del state["_recorder"], state["_detach"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        self.__dict__.update(state)
        self._attach()
        if not attached:
            self.remove()

    def remove(self) -> None:
        """Takes the hooks off the model; loss() then only serves earlier forward passes."""
        self._detach()

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher: a task has begun after another had ended."""
        return self.teacher_logits is not None

    @property
    def fused(self) -> bool:
        """Whether ssd.ops.distill can compute this loss, from what terms() returns."""
        return len(self.layers) == 1 and (self.hidden_loss == "kl" or self.lam == 0)

    @torch.inference_mode(False)  # inference tensors could not be saved for backward
    def begin_task(self, x: Tensor) -> None:
        """Keeps the outputs of the teacher, the present model, on a task's inputs [N, ..].

        Raises:
            ValueError: the model returns no logits [N, C], or a layer no activations of N inputs.
            RuntimeError: after remove().
        """
        if not self.neurons:
            return
        model = self._recorder.model
        logits: list[Tensor] = []
        hidden: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with evaluating(model):
            for chunk in x.split(CHUNK):
                with self._recorder.record() as calls:
                    output = model(chunk)
                tensor = isinstance(output, Tensor)
                if not tensor or output.shape[:-1] != (len(chunk),):
                    found = list(output.shape) if tensor else f"a {type(output).__name__}"
                    raise ValueError(
                        f"the model returns {found} for {len(chunk)} inputs, not logits [B, C] "
                        "alone; wrap it in a module that does"
                    )
                logits.append(output)
                for name, z in self._recorder.read(calls, self.neurons).items():
                    if len(z) != len(chunk):
                        raise ValueError(
                            f"layer {name!r} has activations {list(z.shape)} for {len(chunk)} "
                            "inputs; its first dimension must be the batch"
                        )
                    hidden[name].append(z)
        teacher_logits = torch.cat(logits)
        if self.classes_seen is not None and self.classes_seen[-1] >= teacher_logits.shape[1]:
            raise ValueError(
                f"label {int(self.classes_seen[-1])} was seen, but the model has "
                f"{teacher_logits.shape[1]} classes"
            )
        self.teacher_logits = teacher_logits
        self.teacher_hidden = {name: torch.cat(chunks) for name, chunks in hidden.items()}
        self._watch()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor,
        hidden: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """alpha CE + (1 - alpha) (lambda L_hidden + (1 - lambda) L_logits); CE in the first task.

        L_hidden is the mean over the Top-K layers.

        Args:
            logits: [B, C], what the model returned.
            labels: [B], in 0..C-1.
            samples: [B], indices into the inputs of begin_task.
            hidden: {layer: z [B, .., n]}; None: those of the forward pass that returned the logits.
                Logits that were changed since, by a mask or a scale, need
                hidden=distiller.activations(what the model returned).

        Raises:
            ValueError: a shape or a range that does not fit, or logits of no known forward pass.
            RuntimeError: end_task has been called and begin_task not yet.
        """
        if not isinstance(logits, Tensor):
            raise ValueError(f"logits must be a tensor [B, C], not a {type(logits).__name__}")
        if logits.dim() != 2 or 0 in logits.shape:
            raise ValueError(f"logits {list(logits.shape)} must be [B, C], not empty")
        rows, classes = logits.shape
        labels = _positions("labels", labels, rows, classes, "classes")
        if self.teacher_logits is None:
            if self.neurons:
                raise RuntimeError("there is no teacher for this task; call begin_task(x) first")
            return F.cross_entropy(wide(logits), labels)
        known, taught = self.teacher_logits.shape
        samples = _positions("samples", samples, rows, known, "inputs of begin_task")
        if classes != taught:
            raise ValueError(
                f"logits {list(logits.shape)} do not have the teacher's {taught} classes"
            )
        layers = []
        if self.lam > 0:
            hidden = self.activations(logits) if hidden is None else hidden
            self._check_layers("hidden activations", hidden)
            settings = self.temperature, self.kl, self.hidden_loss
            layers = [
                distillation_loss(z, self.teacher_hidden[name][samples], *settings)
                for name, z in hidden.items()
            ]
        loss = distill(wide(logits), labels, **self._logit_terms(samples)).mean()
        if layers:
            loss = loss + (1 - self.alpha) * self.lam * torch.stack(layers).mean()
        return loss

    def terms(self, samples: Tensor) -> dict[str, Any]:
        """Arguments of ssd.ops.distill.distill besides the student's, if `fused`.

        Args:
            samples: [B] int64, indices into the inputs of begin_task.

        Returns:
            {} without a teacher. Else alpha, lam, temperature, kl and target_logits [B, C]; for
            logits="seen" also columns [B, C], and for lam > 0 target_hidden [B, n].

        Raises:
            ValueError: several layers, or a hidden loss that is not the KL.
        """
        if not self.fused:
            raise ValueError(
                f"terms() serves the KL of one layer, not {sorted(self.layers)} with "
                f"hidden_loss={self.hidden_loss!r}"
            )
        if self.teacher_logits is None:
            return {}
        terms = self._logit_terms(samples)
        if self.lam > 0:
            (hidden,) = self.teacher_hidden.values()
            terms["target_hidden"] = hidden[samples]
        return terms

    def _logit_terms(self, samples: Tensor) -> dict[str, Any]:
        """The settings of the loss and the teacher's logits."""
        assert self.teacher_logits is not None
        names = ("alpha", "lam", "temperature", "kl")
        terms: dict[str, Any] = {name: getattr(self, name) for name in names}
        terms["target_logits"] = self.teacher_logits[samples]
        if self.logits == "seen" and self.classes_seen is not None:
            shape = terms["target_logits"].shape
            seen = torch.zeros(shape[1], dtype=torch.bool, device=self.classes_seen.device)
            terms["columns"] = seen.index_fill_(0, self.classes_seen, True).expand(shape)
        return terms

    def activations(self, logits: Tensor) -> dict[str, Tensor]:
        """z of the selected neurons in the forward pass that returned logits, {layer: [B, .., n]}.

        Raises:
            ValueError: the model has not returned these logits since begin_task, or has not run
                each layer once, with gradients if the logits have them.
            RuntimeError: after remove().
        """
        return self._recorder.kept(logits)

    def recording(self) -> AbstractContextManager[dict[str, Tensor]]:
        """A context around the forward pass of a model that is run without calling it.

        Its value is the `hidden` of loss(), filled at the end; empty if loss() needs none.

        Raises:
            ValueError: a layer that has not run exactly once.
            RuntimeError: after remove().
        """
        return self._recorder.recording()

    @torch.inference_mode(False)
    def end_task(
        self, x: Tensor, labels: Tensor | None = None, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        """Selects the subnetwork by activation frequency over a task's inputs; drops the teacher.

        Args:
            x: [N, ..]; under torch.distributed, each rank's own.
            labels: [N], only needed for logits="seen".
            counts: {layer: [R]} of count_activations over x, if known.

        Raises:
            ValueError: logits="seen" without labels, counts of other layers, a layer that does not
                run exactly once in a forward pass, or that has fewer neurons than its k.
            RuntimeError: after remove().
        """
        self._recorder.require_attached()
        seen = self._seen(labels) if self.logits == "seen" else None
        if counts is None:
            counts = self._recorder.count(x)
        self._check_counts("counts", counts)
        of_ranks = self._recorder.of_ranks({name: hits.cpu() for name, hits in counts.items()})
        counts = {
            name: sum(own[name] for own in of_ranks).to(hits.device)
            for name, hits in counts.items()
        }
        if self.frequency == "accumulated" and self.counts:
            counts = {name: self.counts[name] + hits for name, hits in counts.items()}
        self.counts, self.classes_seen = dict(counts), seen
        self.neurons = {
            name: select_subnetwork(
                counts[name], subnetwork_size(k, len(counts[name]), self.subnetwork)
            )
            for name, k in self.layers.items()
        }
        self.teacher_logits, self.teacher_hidden = None, {}
        self._watch()

    def _seen(self, labels: Tensor | None) -> Tensor:
        """The classes seen so far, with those of the task that ends."""
        if labels is None:
            raise ValueError('logits="seen" needs the labels of the task in end_task')
        labels = _positions("labels", labels, len(labels))
        seen = set(chain.from_iterable(self._recorder.of_ranks(labels.unique().tolist())))
        if self.classes_seen is not None:
            seen |= set(self.classes_seen.tolist())
        return torch.tensor(sorted(seen), dtype=torch.int64, device=labels.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors needed to resume, by name."""
        state = {
            f"{part}/{name}": tensor
            for part in ("counts", "neurons", "teacher_hidden")
            for name, tensor in getattr(self, part).items()
        }
        for name in ("teacher_logits", "classes_seen"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return {name: tensor.clone() for name, tensor in state.items()}

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what state_dict returned, on the model's device.

        Raises:
            ValueError: the state has other layers, sizes or options; nothing has changed then.
        """
        self._check_state(**_parts(state))
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        own = {name: tensor.detach().to(device, copy=True) for name, tensor in state.items()}
        self.__dict__.update(_parts(own))
        self._watch()

    def _check_state(
        self,
        counts: Mapping[str, Tensor],
        neurons: Mapping[str, Tensor],
        teacher_hidden: Mapping[str, Tensor],
        teacher_logits: Tensor | None,
        classes_seen: Tensor | None,
    ) -> None:
        taught = bool(teacher_hidden) or teacher_logits is not None
        if counts or neurons or taught:
            self._check_counts("the state's counts", counts)
            self._check_layers("the state's neurons", neurons)
        if taught:
            self._check_layers("the state's teacher_hidden", teacher_hidden)
            if teacher_logits is None:
                raise ValueError("the state has no teacher_logits")
        if (classes_seen is not None) != (self.logits == "seen" and bool(counts)):
            has = "no" if classes_seen is None else "has"
            raise ValueError(
                f"the state {has} classes_seen, the Distiller has logits={self.logits!r}"
            )
        for name, chosen in neurons.items():
            count = len(counts[name])
            size = subnetwork_size(self.layers[name], count, self.subnetwork)
            _positions(f"the state's neurons of {name!r}", chosen, size, count, "neurons")
            if teacher_logits is not None:
                z = teacher_hidden[name]
                if z.shape[:1] != teacher_logits.shape[:1] or z.shape[-1:] != (size,):
                    raise ValueError(
                        f"the state's teacher_hidden of {name!r} is {list(z.shape)}, "
                        f"not [{len(teacher_logits)}, .., {size}]"
                    )

    def _check_layers(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        if tensors.keys() != self.layers.keys():
            raise ValueError(
                f"{what} are of layers {sorted(tensors)}, the Distiller's are {sorted(self.layers)}"
            )

    def _check_counts(self, what: str, counts: Mapping[str, Tensor]) -> None:
        self._check_layers(what, counts)
        for name, layer in self._recorder.layers.items():
            shape = counts[name].shape
            if len(shape) != 1 or (isinstance(layer, TopKLinear) and shape[0] != layer.neurons):
                raise ValueError(f"{what} of {name!r} are {list(shape)}, not one for each neuron")
            if self.layers[name] > shape[0]:
                raise ValueError(f"layer {name!r} has {shape[0]} neurons, k={self.layers[name]}")


def _parts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The attributes of a Distiller from its state_dict()."""
    parts: dict[str, Any] = {"counts": {}, "neurons": {}, "teacher_hidden": {}}
    parts |= {"teacher_logits": None, "classes_seen": None}
    for key, tensor in state.items():
        part, slash, name = key.partition("/")
        if part not in parts or bool(slash) != isinstance(parts[part], dict):
            raise ValueError(f"{key!r} is no part of a Distiller's state")
        parts[part] = {**parts[part], name: tensor} if slash else tensor
    return parts


def _positions(
    name: str, given: Tensor, count: int, limit: float = math.inf, of: str = ""
) -> Tensor:
    """Integers [count] in 0..limit-1 as int64; ValueError if `given` are not."""
    positions = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    if positions.shape != (count,):
        raise ValueError(f"{name} {list(positions.shape)} must be [{count}]")
    dtype = positions.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"{name} are {dtype}; they must be integers")
    if count > 0:
        low, high = (int(end) for end in torch.stack(positions.aminmax()).tolist())
        if low < 0 or high >= limit:
            rule = f"lie in 0..{limit - 1}, the {of}" if of else "not be negative"
            raise ValueError(f"{name} hold {low if low < 0 else high}; they must {rule}")
    return positions.long()
