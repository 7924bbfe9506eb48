"""Selective Subnetwork Distillation (SSD, Xue et al., AAAI 2026, arXiv 2512.15267).

It attaches to any module that contains Top-K layers: ssd_kernels.nn.TopK, TopKLinear and their
subclasses are found by themselves, any other module with a dense activation [B, R] can be named.

    distiller = Distiller(model)
    for x, y in tasks:
        distiller.begin_task(x)                       # the teacher's outputs, once a task
        for batch in batches:
            logits = model(x[batch])
            distiller.loss(logits, y[batch], batch).backward()
        distiller.end_task(x)                         # frequencies, selection

There is no copy of the teacher: it is the model as it stands when a task begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_kernels import TopKOutput, count_active
from ssd_kernels.nn import TopK, TopKLinear

# Samples a forward pass over a whole task takes at once.
CHUNK = 2048


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, kl: str = "reverse"
) -> Tensor:
    """T^2 KL between softmax(student / T) and softmax(teacher / T), mean over the batch, 0-d.

    Args:
        student, teacher: [B, n], logits or activations.
        temperature: T > 0.
        kl: "reverse" is KL(student || teacher), as the paper writes it; "forward" is
            KL(teacher || student), as distillation usually has it.
    """
    p = F.log_softmax(student / temperature, dim=-1)
    q = F.log_softmax(teacher / temperature, dim=-1)
    if kl == "forward":
        p, q = q, p
    elif kl != "reverse":
        raise ValueError(f"kl={kl!r} is not one of reverse, forward")
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def select_subnetwork(frequency: Tensor, size: int) -> Tensor:
    """The `size` most frequently active of R neurons, ascending, ties to the lower index, [n]."""
    order = torch.sort(frequency, descending=True, stable=True).indices
    return order[:size].sort().values


def activations_of(output: TopKOutput | Tensor, neurons: Tensor) -> Tensor:
    """The activations [B, n] of some neurons [n, ascending] in a layer's sparse or dense output."""
    if isinstance(output, Tensor):
        return output[:, neurons]
    # Slots of other neurons go to an extra column that is cut off.
    position = torch.searchsorted(neurons, output.indices).clamp(max=len(neurons) - 1)
    column = torch.where(neurons[position] == output.indices, position, len(neurons))
    wide = output.values.new_zeros(len(output.values), len(neurons) + 1)
    return wide.scatter_add(1, column, output.values)[:, :-1]


def preactivations_of(layer: nn.Module, x: Tensor, neurons: Tensor) -> Tensor:
    """relu of what some neurons [n] receive before inhibition, [B, n]; x: the layer's input."""
    if isinstance(layer, TopKLinear):
        bias = None if layer.bias is None else layer.bias[neurons]
        return F.linear(x, layer.weight[neurons], bias).relu()
    return x[:, neurons].relu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the earlier mode comes back."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(mode)


@contextmanager
def recording(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, TopKOutput | Tensor]]:
    """The named layers' outputs of the latest forward pass, while the context lasts."""
    outputs: dict[str, TopKOutput | Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, __: Any, output: TopKOutput | Tensor) -> None:
            outputs[name] = output

        return record

    hooks = [model.get_submodule(n).register_forward_hook(recorder(n)) for n in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def count_activations(model: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """Number of inputs x [N, ..] in which each neuron of the layers is active, {name: [R]}."""
    counts: dict[str, Tensor] = {}
    with evaluating(model), recording(model, layers) as outputs:
        for chunk in x.split(CHUNK):
            model(chunk)
            for name, output in outputs.items():
                if isinstance(output, Tensor):
                    hits = (output > 0).sum(0)
                else:
                    neurons = cast(TopKLinear, model.get_submodule(name)).neurons
                    hits = torch.zeros(neurons, dtype=torch.int64, device=x.device)
                    count_active(output.values, output.indices, hits)
                counts[name] = counts[name] + hits if name in counts else hits
    return counts


class Distiller:
    """The SSD loss for a model with Top-K layers.

    Args:
        model: x [B, ..] -> logits [B, C], with at least one Top-K layer.
        alpha: weight of the cross entropy. lam: lambda, share of the hidden term in the rest
            (0 is LwF). temperature: T.
        subnetwork: n / k; a layer's n most frequent neurons are distilled, k <= n <= R.
        kl: direction of both KL terms, see distillation_loss.
        hidden: z taken "after" or "before" inhibition.
        logits: distil "all" outputs or only the classes "seen" before this task.
        frequency: rank neurons by the "last" task's activation frequency or by the "accumulated".
        layers: the Top-K layers, by module name; None finds them. Modules other than TopK and
            TopKLinear also need their k: a mapping {name: k}.

    Raises:
        ValueError: no Top-K layer, or an unknown name or option.
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
        self.model = model
        self.alpha, self.lam, self.temperature = alpha, lam, temperature
        self.subnetwork, self.kl, self.hidden = subnetwork, kl, hidden
        self.logits, self.frequency = logits, frequency
        self.layers = _find_layers(model, layers)
        self.counts: dict[str, Tensor] = {}  # {layer: [R]} activations counted
        self.neurons: dict[str, Tensor] = {}  # {layer: [n]} the selected subnetwork
        self.teacher_logits: Tensor | None = None  # [N, C]
        self.teacher_hidden: dict[str, Tensor] = {}  # {layer: [N, n]}
        self.classes_seen: Tensor | None = None  # ascending labels
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, TopKOutput | Tensor] = {}
        self._hooks = [
            self.model.get_submodule(name).register_forward_hook(self._recorder(name))
            for name in self.layers
        ]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher: a task has begun after another had ended."""
        return self.teacher_logits is not None

    def taught(self, samples: Tensor) -> Tensor:
        """The teacher's logits [B, C] for samples [B] of the task; only while there is one."""
        assert self.teacher_logits is not None
        return self.teacher_logits[samples]

    def begin_task(self, x: Tensor) -> None:
        """Keeps the outputs of the teacher, the model as it stands, on a task's inputs [N, ..]."""
        if not self.neurons:
            return
        logits = []
        hidden: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        with evaluating(self.model):
            for chunk in x.split(CHUNK):
                logits.append(self.model(chunk))
                for name, z in self.activations().items():
                    hidden[name].append(z)
        self.teacher_logits = torch.cat(logits)
        self.teacher_hidden = {name: torch.cat(chunks) for name, chunks in hidden.items()}

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        samples: Tensor,
        hidden: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """alpha CE + (1 - alpha) (lambda L_hidden + (1 - lambda) L_logits); CE without a teacher.

        Args:
            logits: [B, C]. labels: [B]. samples: [B], positions in the inputs of begin_task.
            hidden: {layer: z [B, n]}; None: of the model's last forward pass.

        Several Top-K layers weigh the same in L_hidden.
        """
        cross_entropy = F.cross_entropy(logits, labels)
        if self.teacher_logits is None:
            return cross_entropy
        target = self.teacher_logits[samples]
        if self.logits == "seen" and self.classes_seen is not None:
            logits, target = logits[:, self.classes_seen], target[:, self.classes_seen]
        distilled = (1 - self.lam) * distillation_loss(logits, target, self.temperature, self.kl)
        if self.lam > 0:
            hidden = self.activations() if hidden is None else hidden
            terms = [
                distillation_loss(z, self.teacher_hidden[name][samples], self.temperature, self.kl)
                for name, z in hidden.items()
            ]
            distilled = distilled + self.lam * torch.stack(terms).mean()
        return self.alpha * cross_entropy + (1 - self.alpha) * distilled

    def activations(self) -> dict[str, Tensor]:
        """z of the selected neurons in the model's last forward pass, {layer: [B, n]}."""
        return {
            name: activations_of(self._outputs[name], neurons)
            if self.hidden == "after"
            else preactivations_of(self.model.get_submodule(name), self._inputs[name], neurons)
            for name, neurons in self.neurons.items()
        }

    def end_task(
        self, x: Tensor, labels: Tensor | None = None, counts: Mapping[str, Tensor] | None = None
    ) -> None:
        """Selects the subnetwork by activation frequency over a task's inputs [N, ..].

        Args:
            x: [N, ..]. labels: [N], needed for logits="seen" alone.
            counts: {layer: [R]} of count_activations over x, if they are known already.

        Raises:
            ValueError: logits="seen" without labels.
        """
        if self.logits == "seen":
            if labels is None:
                raise ValueError('logits="seen" needs the labels of the task in end_task')
            self._see(labels)
        if counts is None:
            counts = count_activations(self.model, list(self.layers), x)
        if self.frequency == "accumulated" and self.counts:
            counts = {name: self.counts[name] + hits for name, hits in counts.items()}
        self.counts = dict(counts)
        for name, k in self.layers.items():
            size = min(max(k, round(self.subnetwork * k)), len(counts[name]))
            self.neurons[name] = select_subnetwork(counts[name], size)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on, as flat named tensors."""
        state: dict[str, Tensor] = {}
        for group in ("counts", "neurons", "teacher_hidden"):
            state |= {f"{group}/{name}": t for name, t in getattr(self, group).items()}
        for name in ("teacher_logits", "classes_seen"):
            if getattr(self, name) is not None:
                state[name] = getattr(self, name)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for group in ("counts", "neurons", "teacher_hidden"):
            prefix = group + "/"
            setattr(
                self,
                group,
                {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)},
            )
        self.teacher_logits = state.get("teacher_logits")
        self.classes_seen = state.get("classes_seen")

    def _see(self, labels: Tensor) -> None:
        seen = labels.unique()
        if self.classes_seen is not None:
            seen = torch.cat([seen, self.classes_seen]).unique()
        self.classes_seen = seen

    def _recorder(self, name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: TopKOutput | Tensor) -> None:
            self._inputs[name], self._outputs[name] = inputs[0], output

        return record


def _find_layers(
    model: nn.Module, layers: Sequence[str] | Mapping[str, int] | None
) -> dict[str, int]:
    """{module name: k} of the Top-K layers."""
    modules = dict(model.named_modules())
    if layers is None:
        found = {n: m.k for n, m in modules.items() if isinstance(m, (TopK, TopKLinear))}
        if not found:
            raise ValueError(
                "the model has no TopK or TopKLinear module; name its layers: {name: k}"
            )
        return found
    for name in layers:
        if name not in modules:
            raise ValueError(f"the model has no module {name!r}")
    if isinstance(layers, Mapping):
        return dict(layers)
    for name in layers:
        if not hasattr(modules[name], "k"):
            raise ValueError(f"module {name!r} has no k; give layers as {{name: k}}")
    return {name: modules[name].k for name in layers}
