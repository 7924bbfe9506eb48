"""Selective Subnetwork Distillation (SSD, Xue et al., AAAI 2026, arXiv 2512.15267).

It attaches to any module that contains Top-K layers: ssd_kernels.nn.TopK, TopKLinear and their
subclasses are found by themselves, any other module with a dense activation [B, .., R] can be
named.

    distiller = Distiller(model)
    for x, y in tasks:
        distiller.begin_task(x)                       # the teacher's outputs, once a task
        for batch in batches:
            logits = model(x[batch])
            distiller.loss(logits, y[batch], batch).backward()
        distiller.end_task(x)                         # frequencies, selection

There is no copy of the teacher: it is the model as it stands when a task begins. The hidden
activations belong to the logits that they led to, and live as long: it does not matter what the
model or a copy of it computes before loss() is called.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ssd.activations import (
    CHUNK,
    Call,
    Hook,
    Recorder,
    activations_of,
    evaluating,
    preactivations_of,
    single,
)
from ssd.activations import count_activations as count_activations
from ssd.ops.reference import distill, divergence
from ssd_kernels.nn import TopK, TopKLinear


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, kl: str = "reverse"
) -> Tensor:
    """T^2 KL between softmax(student / T) and softmax(teacher / T), mean over the batch, 0-d.

    Args:
        student, teacher: [B, .., n], logits or activations; an entry that is -inf in both is left
            out.
        temperature: T > 0; in float32 the loss is good to about T^2 1e-7.
        kl: "reverse" is KL(student || teacher), as the paper writes it; "forward" is
            KL(teacher || student), as distillation usually has it.

    Raises:
        ValueError: shapes that differ, a T that is none, or an unknown kl.
    """
    if kl not in ("reverse", "forward"):
        raise ValueError(f"kl={kl!r} is not one of reverse, forward")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in shape"
        )
    if not (_real(temperature) and 0 < temperature < math.inf):
        raise ValueError(f"temperature={temperature!r} must be a finite number above 0")
    return divergence(_wide(student), _wide(teacher), temperature, kl).mean()


def _real(value: object) -> bool:
    return isinstance(value, (Real, torch.SymFloat)) and not isinstance(value, bool)


def _wide(z: Tensor) -> Tensor:
    """float32 of a shorter dtype: T^2 magnifies rounding."""
    return z.float() if z.dtype.itemsize < 4 else z


def select_subnetwork(frequency: Tensor, size: int) -> Tensor:
    """The `size` most frequently active of R neurons, ascending, ties to the lower index, [n]."""
    order = torch.sort(frequency, descending=True, stable=True).indices
    return order[:size].sort().values


class _Pass(NamedTuple):
    """What is kept of a forward pass, as long as its logits live."""

    hidden: dict[str, Tensor]  # {layer: z [B, .., n]}
    fault: str  # why there is no hidden, or ""
    grad: bool  # whether every layer ran with gradients
    neurons: dict[str, Tensor]  # the subnetwork that z is of


class Distiller:
    """The SSD loss for a model with Top-K layers.

    Args:
        model: x [B, ..] -> logits [B, C], with at least one Top-K layer; it may be wrapped by
            DistributedDataParallel, DataParallel or torch.compile (with fullgraph=True it must be).
        alpha: weight of the cross entropy. lam: lambda, share of the hidden term in the rest
            (0 is LwF); both in 0..1. temperature: T > 0.
        subnetwork: n / k > 0; a layer's n most frequent neurons are distilled, k <= n <= R.
        kl: direction of both KL terms, see distillation_loss.
        hidden: z taken "after" or "before" inhibition.
        logits: distil "all" outputs or only the classes "seen" before this task.
        frequency: rank neurons by the "last" task's activation frequency or by the "accumulated".
        layers: the Top-K layers, by module name; None finds them. Modules other than TopK and
            TopKLinear also need their k: a mapping {name: k}.

    Copies of the model, deep or pickled, are free of the Distiller; a copy of the Distiller has a
    copy of the model. Where torch.distributed runs, the ranks agree on one subnetwork: end_task
    adds up their counts, so all of them must call it.

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
    ) -> None:
        for name, value, known in (
            ("kl", kl, ("reverse", "forward")),
            ("hidden", hidden, ("after", "before")),
            ("logits", logits, ("all", "seen")),
            ("frequency", frequency, ("last", "accumulated")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")
        for name, number in (("alpha", alpha), ("lam", lam)):
            if not (_real(number) and 0 <= number <= 1):
                raise ValueError(f"{name}={number!r} must be a number in 0..1")
        for name, number in (("temperature", temperature), ("subnetwork", subnetwork)):
            if not (_real(number) and 0 < number < math.inf):
                raise ValueError(f"{name}={number!r} must be a finite number above 0")
        self.model = model
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.subnetwork, self.kl, self.hidden = subnetwork, kl, hidden
        self.logits, self.frequency = logits, frequency
        self.layers = _find_layers(model, layers)
        self.counts: dict[str, Tensor] = {}  # {layer: [R]} activations counted
        self.neurons: dict[str, Tensor] = {}  # {layer: [n]} the selected subnetwork
        self.teacher_logits: Tensor | None = None  # [N, C]
        self.teacher_hidden: dict[str, Tensor] = {}  # {layer: [N, .., n]}
        self.classes_seen: Tensor | None = None  # ascending labels
        self._attach()

    def _attach(self) -> None:
        modules = _modules(self.model)
        self._recorder = Recorder({name: modules[name] for name in self.layers})
        self._passes = WeakTensorKeyDictionary()
        self._recorder.handles += [
            self.model.register_forward_pre_hook(_hook(self, Distiller._begin)),
            self.model.register_forward_hook(_hook(self, Distiller._keep)),
        ]
        self._detach = weakref.finalize(self, self._recorder.remove)
        self._detach.atexit = False

    def __getstate__(self) -> dict[str, Any]:
        own = ("_recorder", "_passes", "_detach")
        return {n: v for n, v in self.__dict__.items() if n not in own} | {
            "attached": self._detach.alive
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        attached = state.pop("attached")
        self.__dict__.update(state)
        self._attach()
        if not attached:
            self.remove()

    def remove(self) -> None:
        """Takes the hooks off the model; only losses of earlier forward passes can be had then."""
        self._detach()

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher: a task has begun after another had ended."""
        return self.teacher_logits is not None

    @torch.inference_mode(False)  # inference tensors could not be saved for backward
    def begin_task(self, x: Tensor) -> None:
        """Keeps the outputs of the teacher, the model as it stands, on a task's inputs [N, ..].

        Raises:
            ValueError: the model returns no logits [N, C], or a layer no activations of N inputs.
            RuntimeError: after remove().
        """
        if not self.neurons:
            return
        self._require_attached()
        model, _ = _unwrapped(self.model)
        logits: list[Tensor] = []
        hidden: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with evaluating(model):
            for chunk in x.split(CHUNK):
                with self._recorder.record() as calls:
                    output = model(chunk)
                if not isinstance(output, Tensor):
                    raise ValueError(
                        f"the model returns a {type(output).__name__}; "
                        "wrap it in a module that returns the logits [B, C] alone"
                    )
                if output.dim() != 2 or len(output) != len(chunk):
                    raise ValueError(
                        f"the model returns {list(output.shape)} for {len(chunk)} inputs, "
                        "not logits [B, C]"
                    )
                logits.append(output)
                for name, z in self._hidden(calls).items():
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

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor,
        hidden: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """alpha CE + (1 - alpha) (lambda L_hidden + (1 - lambda) L_logits); CE in the first task.

        Args:
            logits: [B, C], what the model returned. labels: [B], in 0..C-1.
            samples: [B], positions in the inputs of begin_task.
            hidden: {layer: z [B, .., n]}; None: those of the forward pass that returned the logits.
                Logits that were changed since, by a mask or a scale, need
                hidden=distiller.activations(what the model returned).

        Several Top-K layers weigh the same in L_hidden.

        Raises:
            ValueError: a shape or a range that does not fit, or logits of no known forward pass.
            RuntimeError: end_task has been called and begin_task not yet.
        """
        classes = _check_logits(logits)
        labels = _positions("labels", labels, len(logits), classes, "classes")
        if self.teacher_logits is None:
            if self.neurons:
                raise RuntimeError("there is no teacher for this task; call begin_task(x) first")
            return F.cross_entropy(_wide(logits), labels)
        known = len(self.teacher_logits)
        samples = _positions("samples", samples, len(logits), known, "inputs of begin_task")
        terms = self._logit_terms(samples)
        classes = terms["target_logits"].shape[1]
        if classes != logits.shape[1]:
            raise ValueError(
                f"logits {list(logits.shape)} are not of the teacher's {classes} classes"
            )
        layers = []
        if self.lam > 0:
            hidden = self.activations(logits) if hidden is None else hidden
            if hidden.keys() != self.neurons.keys():
                raise ValueError(
                    f"hidden is of layers {sorted(hidden)}, the Distiller of {sorted(self.neurons)}"
                )
            layers = [
                distillation_loss(z, self.teacher_hidden[name][samples], self.temperature, self.kl)
                for name, z in hidden.items()
            ]
        loss = distill(_wide(logits), labels, **terms).mean()
        if layers:
            loss = loss + (1 - self.alpha) * self.lam * torch.stack(layers).mean()
        return loss

    def terms(self, samples: Tensor) -> dict[str, Any]:
        """Arguments of ssd.distill.distill beside the student's, for a Distiller of one layer.

        Args:
            samples: [B] int64, positions in the inputs of begin_task.

        Returns:
            {} while there is no teacher; else alpha, lam, temperature, kl, target_logits [B, C],
            columns [B, C] for logits="seen" alone, and target_hidden [B, n] if lam > 0.

        Raises:
            ValueError: there are several layers.
        """
        if len(self.layers) != 1:
            raise ValueError(f"terms() serves one layer, not {sorted(self.layers)}")
        if self.teacher_logits is None:
            return {}
        terms = self._logit_terms(samples)
        if self.lam > 0:
            (hidden,) = self.teacher_hidden.values()
            terms["target_hidden"] = hidden[samples]
        return terms

    def _logit_terms(self, samples: Tensor) -> dict[str, Any]:
        """The settings of the loss, and the teacher's part of it on the logits."""
        assert self.teacher_logits is not None
        terms: dict[str, Any] = {
            "target_logits": self.teacher_logits[samples],
            "alpha": self.alpha,
            "lam": self.lam,
            "temperature": self.temperature,
            "kl": self.kl,
        }
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
        kept: _Pass | None = self._passes.get(logits)
        if kept is None or kept.neurons is not self.neurons:
            self._require_attached()
            raise ValueError(
                "these logits are not what the model returned in this task; give loss() the "
                "output of model(x) itself, or hidden=distiller.activations(that output)"
            )
        if kept.fault:
            raise ValueError(kept.fault)
        if logits.requires_grad and not kept.grad:
            raise ValueError(
                "a Top-K layer ran without gradients, the logits have them; use checkpoint(.., "
                "use_reentrant=False), take no_grad out of the model, or set lam=0"
            )
        return dict(kept.hidden)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Fills {layer: z} with what loss() wants as hidden, from the forward pass in the context.

        For a model that is not run by calling it. Empty where loss() needs none.

        Raises:
            ValueError: a layer that has not run exactly once. RuntimeError: after remove().
        """
        hidden: dict[str, Tensor] = {}
        if not self._records:
            yield hidden
            return
        self._require_attached()
        with self._recorder.record() as calls:
            yield hidden
        hidden.update(self._hidden(calls))

    @torch.inference_mode(False)
    def end_task(
        self, x: Tensor, labels: Tensor | None = None, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        """Selects the subnetwork by activation frequency over a task's inputs; its teacher goes.

        Args:
            x: [N, ..]. labels: [N], needed for logits="seen" alone.
            counts: {layer: [R]} of count_activations over x, if they are known already.

        Where torch.distributed runs, each rank gives its own inputs and all of them count.

        Raises:
            ValueError: logits="seen" without labels, counts of other layers, a layer that does not
                run exactly once in a forward pass, or that has fewer neurons than its k.
            RuntimeError: after remove().
        """
        self._require_attached()
        model, group = _unwrapped(self.model)
        seen = self._seen(labels, group) if self.logits == "seen" else None
        if counts is None:
            counts = self._recorder.count(model, x)
        self._check_counts("counts", counts)
        if _ranks(group) > 1:
            counts = {name: hits.clone() for name, hits in counts.items()}
            for name in sorted(counts):
                distributed.all_reduce(counts[name], group=group)
        if self.frequency == "accumulated" and self.counts:
            counts = {name: self.counts[name] + hits for name, hits in counts.items()}
        self.counts, self.classes_seen = dict(counts), seen
        self.neurons = {
            name: select_subnetwork(counts[name], self._size(name, len(counts[name])))
            for name in self.layers
        }
        self.teacher_logits, self.teacher_hidden = None, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat named tensors, copies of the Distiller's own."""
        state: dict[str, Tensor] = {}
        for group in ("counts", "neurons", "teacher_hidden"):
            state |= {f"{group}/{name}": t.clone() for name, t in getattr(self, group).items()}
        for name in ("teacher_logits", "classes_seen"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name).clone()
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what state_dict gave, on the model's device.

        Raises:
            ValueError: the state is of other layers, sizes or options; nothing is changed then.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        groups: dict[str, dict[str, Tensor]] = {"counts": {}, "neurons": {}, "teacher_hidden": {}}
        found: dict[str, Tensor | None] = {"teacher_logits": None, "classes_seen": None}
        for key, tensor in state.items():
            group, _, name = key.partition("/")
            if key in found:
                found[key] = tensor
            elif group in groups:
                groups[group][name] = tensor
            else:
                raise ValueError(f"{key!r} is no part of a Distiller's state")
        values: dict[str, Any] = groups | found
        self._check_state(**values)

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, copy=True)

        for group, parts in groups.items():
            setattr(self, group, {name: own(tensor) for name, tensor in parts.items()})
        for name, part in found.items():
            setattr(self, name, None if part is None else own(part))

    def _check_state(
        self,
        counts: Mapping[str, Tensor],
        neurons: Mapping[str, Tensor],
        teacher_hidden: Mapping[str, Tensor],
        teacher_logits: Tensor | None,
        classes_seen: Tensor | None,
    ) -> None:
        if counts or neurons or teacher_hidden or teacher_logits is not None:
            self._check_counts("the state's counts", counts)
            self._check_layers("the state's neurons", neurons)
        if teacher_hidden or teacher_logits is not None:
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
            if chosen.shape != (size,):
                raise ValueError(
                    f"the state's neurons of {name!r} are {list(chosen.shape)}, not [{size}]"
                )
            _positions(f"the state's neurons of {name!r}", chosen, size, count, "neurons")
            if teacher_logits is not None:
                z = teacher_hidden[name]
                if z.shape[:1] != teacher_logits.shape[:1] or z.shape[-1:] != (size,):
                    raise ValueError(
                        f"the state's teacher_hidden of {name!r} is {list(z.shape)}, "
                        f"not [{len(teacher_logits)}, .., {size}]"
                    )

    @property
    def _records(self) -> bool:
        """Whether loss() will need the hidden activations of a forward pass."""
        return self.teaches and self.lam > 0

    def _begin(self, _: nn.Module, __: Any) -> None:
        self._recorder.begin()

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        """Ends a forward pass of the model: what loss() needs of it is kept with its logits."""
        calls = self._recorder.end()
        if calls is None or not self._records or not isinstance(output, Tensor):
            return
        hidden, fault = {}, ""
        try:
            hidden = self._hidden(calls)
        except ValueError as error:  # of interest only if loss() is asked
            fault = str(error)
        grad = all(call.grad for call in calls.values())
        self._passes[output] = _Pass(hidden, fault, grad, self.neurons)

    def _hidden(self, calls: Mapping[str, Call]) -> dict[str, Tensor]:
        """{layer: z [B, .., n]} of a forward pass."""
        hidden = {}
        for name, neurons in self.neurons.items():
            call, layer = single(calls, name), self._recorder.layers[name]
            if self.hidden == "after":
                hidden[name] = activations_of(call.output, neurons)
                continue
            width = layer.in_features if isinstance(layer, TopKLinear) else len(self.counts[name])
            x = call.inputs[0] if call.inputs else None
            if not isinstance(x, Tensor) or x.shape[-1:] != (width,):
                raise ValueError(
                    f'hidden="before" needs a tensor [B, .., {width}] as the first positional '
                    f"argument of layer {name!r}"
                )
            hidden[name] = preactivations_of(layer, x, neurons)
        return hidden

    def _size(self, name: str, count: int) -> int:
        """n of a layer with `count` neurons."""
        k = self.layers[name]
        return min(max(k, round(self.subnetwork * k)), count)

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

    def _require_attached(self) -> None:
        if not self._detach.alive:
            raise RuntimeError("the Distiller was removed from its model; make a new one")

    def _seen(self, labels: Tensor | None, group: Any) -> Tensor:
        """The classes seen until now, those of a task that ends with them."""
        if labels is None:
            raise ValueError('logits="seen" needs the labels of the task in end_task')
        seen = _positions("labels", labels, len(labels), None, "").unique()
        if _ranks(group) > 1:
            of_ranks: list[Any] = [None] * _ranks(group)
            distributed.all_gather_object(of_ranks, seen.tolist(), group=group)
            seen = torch.tensor(list(chain.from_iterable(of_ranks)), device=seen.device).unique()
        if self.classes_seen is not None:
            seen = torch.cat([seen, self.classes_seen]).unique()
        return seen


def _hook(distiller: Distiller, method: Callable[..., None]) -> Hook:
    """A hook of the model that does not keep the Distiller alive, and that no graph holds."""
    owner = weakref.ref(distiller)

    def run(*arguments: Any) -> None:
        found = owner()
        if found is not None and not torch.compiler.is_compiling():  # nor exporting
            method(found, *arguments)

    apart = torch._disable_dynamo(run)  # imports the compiler when called
    return Hook(lambda *arguments: (apart if torch.compiler.is_compiling() else run)(*arguments))


def _check_logits(logits: Tensor) -> int:
    """C of logits [B, C].

    Raises:
        ValueError: they are none.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be a tensor [B, C], not a {type(logits).__name__}")
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"logits {list(logits.shape)} must be [B, C], not empty")
    return logits.shape[1]


def _positions(name: str, given: Tensor, count: int, limit: int | None, of: str) -> Tensor:
    """int64 [count], each in 0..limit-1; None: not negative.

    Raises:
        ValueError: they are not.
    """
    positions = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    if positions.shape != (count,) or positions.dtype == torch.bool:
        raise ValueError(
            f"{name} {list(positions.shape)} {positions.dtype} must be integers [{count}]"
        )
    if positions.is_floating_point() or positions.is_complex():
        raise ValueError(f"{name} are {positions.dtype}; they must be integers")
    if count > 0:
        low, high = (int(end) for end in torch.stack(positions.aminmax()).tolist())
        if low < 0 or (limit is not None and high >= limit):
            value = low if low < 0 else high
            rule = "not be negative" if limit is None else f"lie in 0..{limit - 1}, the {of}"
            raise ValueError(f"{name} hold {value}; they must {rule}")
    return positions.long()


def _ranks(group: Any) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(group)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model inside DistributedDataParallel, DataParallel and torch.compile; process group."""
    group = None
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model, group
        model = inner


def _plain(name: str) -> str:
    """A module's name without what torch.compile puts in."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the unwrapped model, by name; what torch.compile wraps, not the wrapper."""
    inner, _ = _unwrapped(model)
    return {_plain(name): m for name, m in inner.named_modules(remove_duplicate=False)}


def _find_layers(
    model: nn.Module, layers: Sequence[str] | Mapping[str, int] | None
) -> dict[str, int]:
    """{module name: k} of the Top-K layers."""
    modules = _modules(model)
    if layers is None:
        first = {module: name for name, module in reversed(modules.items())}
        found: dict[str, Any] = {
            n: m.k
            for n, m in modules.items()
            if isinstance(m, (TopK, TopKLinear)) and first[m] == n
        }
        if not found:
            raise ValueError(
                "the model has no TopK or TopKLinear module; name its layers: {name: k}"
            )
    else:
        named = isinstance(layers, Iterable) and not isinstance(layers, str)
        if not (named and layers and all(isinstance(name, str) for name in layers)):
            raise ValueError(f"layers={layers!r} must be a list of names or a mapping, not empty")
        found = {}
        for given in layers:
            name = _plain(given)
            name = name if name in modules else name.removeprefix("module.")
            if name not in modules:
                raise ValueError(f"the model has no module {given!r}")
            if isinstance(layers, Mapping):
                found[name] = layers[given]
            elif hasattr(modules[name], "k"):
                found[name] = modules[name].k
            else:
                raise ValueError(f"module {given!r} has no k; give layers as {{name: k}}")
    for name, k in found.items():
        layer = modules[name]
        limit = layer.neurons if isinstance(layer, TopKLinear) else math.inf
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= limit:
            raise ValueError(f"layer {name!r} has k={k!r}; k must be an integer in 1..{limit}")
    return found
