"""Read, record and count the activations of layers in the forward passes of a model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ssd_kernels import TopKOutput, count_active
from ssd_kernels.nn import TopK, TopKLinear

CHUNK = 2048  # samples in a forward pass over a whole task


def activations_of(output: TopKOutput | Tensor, neurons: Tensor) -> Tensor:
    """The activations [.., n] of some neurons in a layer's output.

    Args:
        output: dense [.., R], or values and indices [.., K].
        neurons: [n] int64, ascending.
    """
    if isinstance(output, Tensor):
        return output[..., neurons]
    # Slots of other neurons go to an extra column that is cut off.
    position = torch.searchsorted(neurons, output.indices.contiguous()).clamp(max=len(neurons) - 1)
    column = torch.where(neurons[position] == output.indices, position, len(neurons))
    wide = output.values.new_zeros(*output.values.shape[:-1], len(neurons) + 1)
    return wide.scatter_add(-1, column, output.values)[..., :-1]


def preactivations_of(layer: nn.Module, x: Tensor, neurons: Tensor) -> Tensor:
    """The activations [.., n] of some neurons [n] before inhibition; x: the layer's input."""
    if isinstance(layer, TopKLinear):
        bias = None if layer.bias is None else layer.bias[neurons]
        return F.linear(x, layer.weight[neurons], bias).relu()
    return x[..., neurons].relu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each submodule is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            if type(module).train is nn.Module.train:
                module.training = mode  # of this module alone
            elif module.training != mode:
                module.train(mode)  # which may do more than set the mode


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model inside DistributedDataParallel, DataParallel and torch.compile; process group."""
    group = None
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model, group
        model = inner


def plain_name(name: str) -> str:
    """A module's name without the parts that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the unwrapped model by name, each without torch.compile's wrapper."""
    inner, _ = unwrapped(model)
    return {plain_name(name): m for name, m in inner.named_modules(remove_duplicate=False)}


def find_layers(
    model: nn.Module, layers: Sequence[str] | Mapping[str, int] | None
) -> dict[str, int]:
    """The Top-K layers of a model, {module name: k}.

    Args:
        model: may be wrapped by DistributedDataParallel, DataParallel or torch.compile.
        layers: names of modules with a k, or {name: k}; None: every TopK and TopKLinear.

    Raises:
        ValueError: no Top-K layer, an unknown name, or a k out of its range.
    """
    modules, found = modules_of(model), {}
    if layers is None:
        named = unwrapped(model)[0].named_modules()
        layers = [plain_name(n) for n, m in named if isinstance(m, (TopK, TopKLinear))]
        if not layers:
            raise ValueError(
                "the model has no TopK or TopKLinear module; name its layers: {name: k}"
            )
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    if not (several and layers and all(isinstance(name, str) for name in layers)):
        raise ValueError(f"layers={layers!r} must be a list of names or a mapping, not empty")
    for given in layers:
        name = plain_name(given)
        name = name if name in modules else name.removeprefix("module.")
        if name not in modules:
            raise ValueError(f"the model has no module {given!r}")
        layer = modules[name]
        k = layers[given] if isinstance(layers, Mapping) else getattr(layer, "k", None)
        if k is None:
            raise ValueError(f"module {given!r} has no k; give layers as {{name: k}}")
        limit = layer.neurons if isinstance(layer, TopKLinear) else math.inf
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= limit:
            raise ValueError(f"layer {name!r} has k={k!r}; k must be an integer in 1..{limit}")
        found[name] = k
    return found


class Hook:
    """A hook that does nothing in a copy of its module, deep or pickled."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        if self.function is not None:
            self.function(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Call(NamedTuple):
    """A layer's call in a forward pass."""

    inputs: tuple[Any, ...]
    output: TopKOutput | Tensor
    grad: bool  # whether it ran with gradients
    number: int  # how often it ran; the other fields describe the last time


class _Thread(threading.local):
    """The forward pass under way in a thread: {layer: call}."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] | None = None
        self.held = False


class _Pass(NamedTuple):
    """What is kept of a forward pass, as long as the model's output lives."""

    hidden: dict[str, Tensor]  # {layer: z [B, .., n]}
    fault: str  # why there is no hidden, or ""
    grad: bool  # whether every layer ran with gradients


class Recorder:
    """Records the calls of a model's layers in forward passes, separately in each thread.

    After watch() it keeps the activations z of some neurons with the output of each pass, so that
    other passes of the model, or of a copy, change nothing. z is freed with the output.

    Args:
        model: as its user calls it, perhaps wrapped as for find_layers.
        layers: names of modules of the unwrapped model.
        before: whether z is taken before inhibition.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], before: bool = False) -> None:
        modules = modules_of(model)
        self.layers = {name: modules[name] for name in layers}
        self.model, self.group = unwrapped(model)
        self.before, self.attached = before, True
        self._neurons: dict[str, Tensor] = {}
        self._passes = WeakTensorKeyDictionary()  # {output: _Pass}
        self._thread = _Thread()
        self._handles = [
            layer.register_forward_hook(Hook(partial(self._note, name)))
            for name, layer in self.layers.items()
        ]
        self._handles += [
            model.register_forward_pre_hook(_eager(self._begin)),
            model.register_forward_hook(_eager(self._end)),
        ]

    def remove(self) -> None:
        """Takes all hooks off."""
        self.attached = False
        for handle in self._handles:
            handle.remove()

    def require_attached(self) -> None:
        if not self.attached:
            raise RuntimeError("the Distiller was removed from its model; make a new one")

    @contextmanager
    def record(self) -> Iterator[dict[str, Call]]:
        """{layer: call} within this context, filled as the layers run."""
        self.require_attached()
        thread = self._thread
        before = thread.calls, thread.held
        calls: dict[str, Call] = {}
        thread.calls, thread.held = calls, True
        try:
            yield calls
        finally:
            thread.calls, thread.held = before

    def count(self, x: Tensor | Iterable[Any]) -> dict[str, Tensor]:
        """count_activations() of these layers."""
        counts: dict[str, Tensor] = {}
        with evaluating(self.model):
            for chunk in chunks(x, self.model):
                with self.record() as calls:
                    self.model(chunk)
                for name, layer in self.layers.items():
                    output = single(calls, name).output
                    if isinstance(output, Tensor):
                        hits = (output > 0).flatten(0, -2).sum(0)
                    else:
                        neurons = cast(TopKLinear, layer).neurons
                        hits = torch.zeros(neurons, dtype=torch.int64, device=output.values.device)
                        count_active(output.values, output.indices, hits)
                    counts[name] = counts[name] + hits if name in counts else hits
        return counts

    def of_ranks(self, own: Any) -> list[Any]:
        """What each rank of the model's process group passes; [own] without torch.distributed."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return [own]
        found: list[Any] = [None] * distributed.get_world_size(self.group)
        distributed.all_gather_object(found, own, group=self.group)
        return found

    def watch(self, neurons: Mapping[str, Tensor]) -> None:
        """Keeps z of these neurons, {layer: [n]}, from now on; forgets all passes."""
        self._neurons = dict(neurons)
        self._passes.clear()

    def kept(self, logits: Tensor) -> dict[str, Tensor]:
        """See Distiller.activations."""
        found: _Pass | None = self._passes.get(logits)
        if found is None:
            self.require_attached()
            raise ValueError(
                "these logits are not what the model returned in this task; give loss() the "
                "output of model(x) itself, or hidden=distiller.activations(that output)"
            )
        if found.fault:
            raise ValueError(found.fault)
        if logits.requires_grad and not found.grad:
            raise ValueError(
                "a Top-K layer ran without gradients, the logits have them; use checkpoint(.., "
                "use_reentrant=False), take no_grad out of the model, or set lam=0"
            )
        return dict(found.hidden)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """See Distiller.recording."""
        hidden: dict[str, Tensor] = {}
        if not self._neurons:
            yield hidden
            return
        with self.record() as calls:
            yield hidden
        hidden.update(self.read(calls, self._neurons))

    def read(self, calls: Mapping[str, Call], neurons: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{layer: z [B, .., n]} of a forward pass."""
        hidden = {}
        for name, chosen in neurons.items():
            call, layer = single(calls, name), self.layers[name]
            if not self.before:
                hidden[name] = activations_of(call.output, chosen)
                continue
            linear = isinstance(layer, TopKLinear)
            width = layer.in_features if linear else cast(Tensor, call.output).shape[-1]
            x = call.inputs[0] if call.inputs else None
            if not isinstance(x, Tensor) or x.shape[-1:] != (width,):
                raise ValueError(
                    f'hidden="before" needs a tensor [B, .., {width}] as the first positional '
                    f"argument of layer {name!r}"
                )
            hidden[name] = preactivations_of(layer, x, chosen)
        return hidden

    def _note(
        self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: TopKOutput | Tensor
    ) -> None:
        calls = self._thread.calls
        if calls is not None:
            number = calls[name].number + 1 if name in calls else 1
            calls[name] = Call(inputs, output, torch.is_grad_enabled(), number)

    def _begin(self, *_: Any) -> None:
        if not self._thread.held:
            self._thread.calls = {}

    def _end(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._thread.held:
            return
        calls, self._thread.calls = self._thread.calls, None
        if calls is None or not self._neurons or not isinstance(output, Tensor):
            return
        hidden, fault = {}, ""
        try:
            hidden = self.read(calls, self._neurons)
        except ValueError as error:  # kept() raises it, if it is asked
            fault = str(error)
        self._passes[output] = _Pass(hidden, fault, all(call.grad for call in calls.values()))


def _eager(function: Callable[..., None]) -> Hook:
    """A hook outside the graphs of torch.compile, which does nothing while exporting."""

    def run(*arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            function(*arguments)

    apart = torch._disable_dynamo(run)  # imports the compiler when called
    return Hook(lambda *arguments: (apart if torch.compiler.is_compiling() else run)(*arguments))


def single(calls: Mapping[str, Call], name: str) -> Call:
    """A layer's only call in a forward pass.

    Raises:
        ValueError: it did not run once, or its output is neither dense nor sparse.
    """
    if name not in calls:
        raise ValueError(f"layer {name!r} did not run in the forward pass")
    call = calls[name]
    if call.number > 1:
        raise ValueError(
            f"layer {name!r} ran {call.number} times in one forward pass; "
            "give each place a module of its own"
        )
    if not isinstance(call.output, (Tensor, TopKOutput)):
        raise ValueError(f"layer {name!r} returns a {type(call.output).__name__}, not a tensor")
    return call


def chunks(x: Tensor | Iterable[Any], model: nn.Module) -> Iterator[Tensor]:
    """Inputs [B, ..] for a model: of a tensor [N, ..], up to CHUNK at a time, or of a loader.

    Args:
        x: a tensor, or batches: each is an input tensor or begins with it, as (x, y) does.
        model: to whose device the batches go.

    Raises:
        ValueError: a batch that has no tensor, or no batch at all.
    """
    if isinstance(x, Tensor):
        yield from x.split(CHUNK)
        return
    weights = next(model.parameters(), None)
    number = -1
    for number, batch in enumerate(x):
        given = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not isinstance(given, Tensor):
            raise ValueError(f"batch {number} is a {type(given).__name__}, not a tensor or (x, ..)")
        yield given if weights is None else given.to(weights.device)
    if number < 0:
        raise ValueError("the loader has no batch")


def count_activations(model: nn.Module, layers: Iterable[str], x: Tensor) -> dict[str, Tensor]:
    """How often each neuron of the layers is active over a task's inputs, {name: [R]}.

    Args:
        model: called on x in evaluation mode, up to CHUNK samples at a time.
        layers: names of its modules; of a layer of sequences, [N, L, R], every position counts.
        x: [N, ..].

    Raises:
        ValueError: a layer that does not run exactly once in a forward pass.
    """
    recorder = Recorder(model, layers)
    try:
        return recorder.count(x)
    finally:
        recorder.remove()
