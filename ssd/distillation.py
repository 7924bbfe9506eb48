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

Where the inputs of a task are no tensor, because a loader reads or augments them, the teacher is a
copy of the model that runs beside it:

    distiller.begin_task(loader)  # batches (x, y)
    for x, y in loader:
        distiller.loss(model(x), y, x=x).backward()
    distiller.end_task(loader)
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.activations import Recorder, chunks, evaluating, find_layers
from ssd.losses import HIDDEN_LOSSES, KL, choice, distillation_loss, positive, real, wide
from ssd.ops.distill import HIDDEN_LOSSES as FUSED
from ssd.ops.reference import divergence
from ssd_kernels.nn import TopKLinear

# How neurons are ranked: f(activation frequency [R] on earlier tasks, mean activation [R] of the
# teacher on the new task's inputs) -> score [R]. "all" distils every neuron.
SELECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "frequency": lambda frequency, _: frequency,
    "activation": lambda frequency, activation: frequency * activation,
    "all": lambda frequency, _: frequency,
}
# The choices of a Distiller's other options.
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
        hidden_loss: the hidden term, a name in HIDDEN_LOSSES: "kl" is the paper's; "mse" is the sum
            of squared differences over the mean squared norm of the teacher's z, all neurons.
        hidden_weight: a factor of the hidden term, at least 0.
        selection: how neurons are ranked, a name in SELECTIONS: by activation "frequency", as in
            the paper; by frequency times the teacher's mean "activation" on the new task's inputs;
            or "all" of them are distilled.

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
        hidden_weight: float = 1.0,
        selection: str = "frequency",
    ) -> None:
        self.model = model
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.subnetwork, self.kl, self.hidden = subnetwork, kl, hidden
        self.logits, self.frequency, self.selection = logits, frequency, selection
        self.hidden_loss, self.hidden_weight = hidden_loss, hidden_weight
        tables: dict[str, Iterable[str]] = {"hidden_loss": HIDDEN_LOSSES, "selection": SELECTIONS}
        for name, known in (CHOICES | tables).items():
            choice(name, getattr(self, name), known)
        for name, number in (("alpha", alpha), ("lam", lam)):
            if not (real(number) and 0 <= number <= 1):
                raise ValueError(f"{name}={number!r} must be a number in 0..1")
        if not (real(hidden_weight) and 0 <= hidden_weight < math.inf):
            raise ValueError(f"hidden_weight={hidden_weight!r} must be a finite number, 0 or above")
        positive("temperature", temperature)
        positive("subnetwork", subnetwork)
        self.layers = find_layers(model, layers)
        self.counts: dict[str, Tensor] = {}  # {layer: [R]} activations counted
        self.neurons: dict[str, Tensor] = {}  # {layer: [n]} the selected subnetwork
        self.teacher_logits: Tensor | None = None  # [N, C]
        self.teacher_hidden: dict[str, Tensor] = {}  # {layer: [N, .., n]}
        # {layer: 0-d float64 on the CPU}, the mean squared norm of the teacher's z, if relative
        self.teacher_norm: dict[str, Tensor] = {}
        self.classes_seen: Tensor | None = None  # ascending labels
        self.teacher: nn.Module | None = None  # in place of its outputs, for a loader
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
        return self.teacher_logits is not None or self.teacher is not None

    @property
    def fused(self) -> bool:
        """Whether ssd.ops.distill can compute this loss, from what terms() returns."""
        served = self.hidden_loss in FUSED or self.lam == 0
        return len(self.layers) == 1 and served and self.teacher is None

    @torch.inference_mode(False)  # inference tensors could not be saved for backward
    def begin_task(self, x: Tensor | Iterable[Any]) -> None:
        """Keeps the teacher, the present model, for a task.

        Args:
            x: the task's inputs [N, ..], on which the teacher's outputs are kept; or a loader,
                whose batches are inputs or begin with them. Then a copy of the model is kept, and
                the loader is read once if hidden_loss or selection need the teacher's activations.

        Raises:
            ValueError: the model returns no logits [N, C], or a layer no activations of N inputs.
            RuntimeError: after remove().
        """
        if not self.neurons:
            return
        self._recorder.require_attached()
        relative = HIDDEN_LOSSES[self.hidden_loss].relative
        if relative or self.selection == "activation":
            activation, norm = self._measure(x)
            self.neurons, self.teacher_norm = self._select(activation), norm if relative else {}
        if isinstance(x, Tensor):
            outputs = [self._outputs(self._recorder, c) for c in chunks(x, self._recorder.model)]
            logits = torch.cat([own for own, _ in outputs])
            self._check_classes(logits)
            self.teacher_logits = logits
            self.teacher_hidden = {
                name: torch.cat([hidden[name] for _, hidden in outputs]) for name in self.layers
            }
        else:
            self.teacher = self._teacher_copy()
        self._watch()

    def _outputs(self, recorder: Recorder, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A model's logits [B, C] and z of the selected neurons on inputs, in evaluation mode."""
        with evaluating(recorder.model):
            with recorder.record() as calls:
                output = recorder.model(x)
            tensor = isinstance(output, Tensor)
            if not tensor or output.shape[:-1] != (len(x),):
                found = list(output.shape) if tensor else f"a {type(output).__name__}"
                raise ValueError(
                    f"the model returns {found} for {len(x)} inputs, not logits [B, C] "
                    "alone; wrap it in a module that does"
                )
            hidden = recorder.read(calls, self.neurons)
            for name, z in hidden.items():
                if len(z) != len(x):
                    raise ValueError(
                        f"layer {name!r} has activations {list(z.shape)} for {len(x)} "
                        "inputs; its first dimension must be the batch"
                    )
        return output, hidden

    def _check_classes(self, logits: Tensor) -> None:
        if self.classes_seen is not None and self.classes_seen[-1] >= logits.shape[1]:
            raise ValueError(
                f"label {int(self.classes_seen[-1])} was seen, but the model has "
                f"{logits.shape[1]} classes"
            )

    @torch.inference_mode(False)
    def _targets(
        self, rows: int, samples: Tensor | None, x: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits and z of a batch."""
        if self.teacher is not None:
            if x is None:
                raise ValueError("this task began with a loader, so loss() needs x=, its inputs")
            recorder = Recorder(self.teacher, self.layers, self.hidden == "before")
            try:
                logits, hidden = self._outputs(recorder, x)
            finally:
                recorder.remove()
            self._check_classes(logits)
            if len(logits) != rows:
                raise ValueError(f"x has {len(logits)} inputs for {rows} logits")
            return logits, hidden
        assert self.teacher_logits is not None
        if samples is None:
            raise ValueError(
                "loss() needs samples, the positions of the batch in the task's inputs"
            )
        chosen = _positions(
            "samples", samples, rows, len(self.teacher_logits), "inputs of begin_task"
        )
        kept = {name: hidden[chosen] for name, hidden in self.teacher_hidden.items()}
        return self.teacher_logits[chosen], kept

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor | None = None,
        hidden: Mapping[str, Tensor] | None = None,
        *,
        x: Tensor | None = None,
    ) -> Tensor:
        """alpha CE + (1 - alpha) (lambda L_hidden + (1 - lambda) L_logits); CE in the first task.

        L_hidden is the mean over the Top-K layers, times hidden_weight.

        Args:
            logits: [B, C], what the model returned.
            labels: [B], in 0..C-1.
            samples: [B], indices into the inputs of begin_task; not needed if that had a loader.
            hidden: {layer: z [B, .., n]}; None: those of the forward pass that returned the logits.
                Logits that were changed since, by a mask or a scale, need
                hidden=distiller.activations(what the model returned).
            x: [B, ..], the inputs that led to the logits, if begin_task had a loader. The teacher
                runs on them.

        Raises:
            ValueError: a shape or a range that does not fit, or logits of no known forward pass.
            RuntimeError: end_task has been called and begin_task not yet.
        """
        return torch.stack([*self.losses(logits, labels, samples, hidden, x=x).values()]).sum()

    def losses(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor | None = None,
        hidden: Mapping[str, Tensor] | None = None,
        *,
        x: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms of loss(), of the same arguments: cross_entropy, logits and hidden.

        Returns:
            {name: 0-d}; cross_entropy alone in the first task, no hidden without lambda.
        """
        if not isinstance(logits, Tensor):
            raise ValueError(f"logits must be a tensor [B, C], not a {type(logits).__name__}")
        if logits.dim() != 2 or 0 in logits.shape:
            raise ValueError(f"logits {list(logits.shape)} must be [B, C], not empty")
        rows, classes = logits.shape
        labels = _positions("labels", labels, rows, classes, "classes")
        entropy = F.cross_entropy(wide(logits), labels)
        if not self.teaches:
            if self.neurons:
                raise RuntimeError("there is no teacher for this task; call begin_task(x) first")
            return {"cross_entropy": entropy}
        target, target_hidden = self._targets(rows, samples, x)
        if classes != target.shape[1]:
            raise ValueError(
                f"logits {list(logits.shape)} do not have the teacher's {target.shape[1]} classes"
            )
        columns = self._columns(rows, classes)
        pair = wide(logits), wide(target)
        distance = divergence(*pair, self.temperature, self.kl, columns).mean()
        rest = 1 - self.alpha
        losses = {"cross_entropy": self.alpha * entropy, "logits": rest * (1 - self.lam) * distance}
        if self.lam > 0:
            hidden = self.activations(logits) if hidden is None else hidden
            self._check_layers("hidden activations", hidden)
            settings = self.temperature, self.kl, self.hidden_loss
            layers = [
                distillation_loss(z, target_hidden[name], *settings) * self._scale(name)
                for name, z in hidden.items()
            ]
            losses["hidden"] = rest * self.lam * torch.stack(layers).mean()
        return losses

    def terms(self, samples: Tensor) -> dict[str, Any]:
        """Arguments of ssd.ops.distill.distill besides the student's, if `fused`.

        Args:
            samples: [B] int64, indices into the inputs of begin_task.

        Returns:
            {} without a teacher. Else alpha, lam, temperature, kl, hidden_loss, hidden_weight and
            target_logits [B, C]; for logits="seen" also columns [B, C], and for lam > 0
            target_hidden [B, n].

        Raises:
            ValueError: several layers, a hidden loss that the op does not compute, or a task that
                began with a loader.
        """
        if self.teacher is not None:
            raise ValueError("terms() serves the teacher's stored outputs; begin_task had a loader")
        if not self.fused:
            raise ValueError(
                f"terms() serves {' or '.join(FUSED)} of one layer, not {sorted(self.layers)} with "
                f"hidden_loss={self.hidden_loss!r}"
            )
        if self.teacher_logits is None:
            return {}
        names = ("alpha", "lam", "temperature", "kl")
        terms: dict[str, Any] = {name: getattr(self, name) for name in names}
        terms["target_logits"] = self.teacher_logits[samples]
        columns = self._columns(len(samples), self.teacher_logits.shape[1])
        if columns is not None:
            terms["columns"] = columns
        if self.hidden_loss in FUSED:
            (layer,) = self.layers
            terms |= {"hidden_loss": self.hidden_loss, "hidden_weight": self._scale(layer)}
            if self.lam > 0:
                terms["target_hidden"] = self.teacher_hidden[layer][samples]
        return terms

    def _scale(self, layer: str) -> float:
        """The factor of a layer's hidden loss."""
        if layer not in self.teacher_norm:
            return self.hidden_weight
        # A silent teacher is imitated in absolute terms.
        return self.hidden_weight / (self.teacher_norm[layer].item() or 1.0)

    def _columns(self, rows: int, classes: int) -> Tensor | None:
        """Which logits [rows, C] are distilled; None: all."""
        if self.logits == "all" or self.classes_seen is None:
            return None
        seen = torch.zeros(classes, dtype=torch.bool, device=self.classes_seen.device)
        return seen.index_fill_(0, self.classes_seen, True).expand(rows, -1)

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
        self,
        x: Tensor | Iterable[Any],
        labels: Tensor | None = None,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Selects the subnetwork by activation frequency over a task's inputs; drops the teacher.

        Args:
            x: [N, ..], or a loader as in begin_task; under torch.distributed, each rank's own.
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
        # Before the next task's inputs are known every neuron counts as equally active on them.
        self.neurons = self._select({name: hits.new_ones(()) for name, hits in counts.items()})
        self.teacher_logits, self.teacher_hidden, self.teacher_norm = None, {}, {}
        self.teacher = None
        self._watch()

    def _select(self, activation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The neurons to distil, by what they did on earlier tasks and do on the new one."""
        rank = SELECTIONS[self.selection]
        return {
            name: select_subnetwork(
                rank(counts.double(), activation[name].to(counts.device)),
                self._size(name, len(counts)),
            )
            for name, counts in self.counts.items()
        }

    def _size(self, layer: str, neurons: int) -> int:
        """n of a layer."""
        if self.selection == "all":
            return neurons
        return subnetwork_size(self.layers[layer], neurons, self.subnetwork)

    def _measure(self, x: Tensor | Iterable[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The teacher on a task's inputs: mean z [R] and mean squared norm of z, by layer."""
        every = {
            name: torch.arange(len(counts), device=counts.device)
            for name, counts in self.counts.items()
        }
        sums = {name: counts.new_zeros(len(counts) + 2) for name, counts in self.counts.items()}
        model = self._recorder.model
        with evaluating(model):
            for chunk in chunks(x, model):
                with self._recorder.record() as calls:
                    model(chunk)
                for name, z in self._recorder.read(calls, every).items():
                    z = z.flatten(0, -2).double()
                    own = z.sum(0), z.square().sum().view(1), z.new_full((1,), len(z))
                    sums[name] = sums[name] + torch.cat(own)
        of_ranks = self._recorder.of_ranks({name: own.cpu() for name, own in sums.items()})
        totals = {name: sum(own[name] for own in of_ranks) for name in sums}
        means = {name: total[:-1] / total[-1] for name, total in totals.items()}
        activation = {name: mean[:-1] for name, mean in means.items()}
        return activation, {name: mean[-1].clone() for name, mean in means.items()}

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
            for part in ("counts", "neurons", "teacher_hidden", "teacher_norm")
            for name, tensor in getattr(self, part).items()
        }
        for name in ("teacher_logits", "classes_seen"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        if self.teacher is not None:
            state |= {f"teacher/{name}": t for name, t in _tensors(self.teacher).items()}
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
        own = {
            name: tensor.detach().to(
                "cpu" if name.startswith("teacher_norm/") else device, copy=True
            )
            for name, tensor in state.items()
        }
        parts = _parts(own)
        weights, parts["teacher"] = parts["teacher"], None
        if weights:
            parts["teacher"] = self._teacher_copy()
            for name, tensor in _tensors(parts["teacher"]).items():
                tensor.copy_(weights[name])
        self.__dict__.update(parts)
        self._watch()

    def _teacher_copy(self) -> nn.Module:
        return copy.deepcopy(self._recorder.model).eval().requires_grad_(False)

    def _check_state(
        self,
        teacher: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        neurons: Mapping[str, Tensor],
        teacher_hidden: Mapping[str, Tensor],
        teacher_norm: Mapping[str, Tensor],
        teacher_logits: Tensor | None,
        classes_seen: Tensor | None,
    ) -> None:
        stored = bool(teacher_hidden) or teacher_logits is not None
        if counts or neurons or stored or teacher:
            self._check_counts("the state's counts", counts)
            self._check_layers("the state's neurons", neurons)
        if (stored or teacher) and HIDDEN_LOSSES[self.hidden_loss].relative:
            self._check_layers("the state's teacher_norm", teacher_norm)
        shapes = {name: tensor.shape for name, tensor in _tensors(self._recorder.model).items()}
        if teacher and {name: tensor.shape for name, tensor in teacher.items()} != shapes:
            raise ValueError("the state's teacher is another model")
        if stored:
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
            size = self._size(name, count)
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
    groups = ("counts", "neurons", "teacher_hidden", "teacher_norm", "teacher")
    parts: dict[str, Any] = {group: {} for group in groups}
    parts |= {"teacher_logits": None, "classes_seen": None}
    for key, tensor in state.items():
        part, slash, name = key.partition("/")
        if part not in parts or bool(slash) != isinstance(parts[part], dict):
            raise ValueError(f"{key!r} is no part of a Distiller's state")
        parts[part] = {**parts[part], name: tensor} if slash else tensor
    return parts


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


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
