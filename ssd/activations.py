"""The activations of layers in forward passes: read, recorded, counted; in evaluation mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_kernels import TopKOutput, count_active
from ssd_kernels.nn import TopKLinear

# Samples a forward pass over a whole task takes at once.
CHUNK = 2048


def activations_of(output: TopKOutput | Tensor, neurons: Tensor) -> Tensor:
    """The activations [.., n] of some neurons [n, ascending] in a layer's sparse or dense output.

    Args:
        output: dense [.., R], or values and indices [.., K]. neurons: [n], ascending.
    """
    if isinstance(output, Tensor):
        return output[..., neurons]
    # Slots of other neurons go to an extra column that is cut off.
    position = torch.searchsorted(neurons, output.indices.contiguous()).clamp(max=len(neurons) - 1)
    column = torch.where(neurons[position] == output.indices, position, len(neurons))
    wide = output.values.new_zeros(*output.values.shape[:-1], len(neurons) + 1)
    return wide.scatter_add(-1, column, output.values)[..., :-1]


def preactivations_of(layer: nn.Module, x: Tensor, neurons: Tensor) -> Tensor:
    """relu of what some neurons [n] receive before inhibition, [.., n]; x: the layer's input."""
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


class Hook:
    """A hook of one module; in a copy of the module, deep or pickled, it does nothing."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> None:
        if self.function is not None:
            self.function(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


class Call(NamedTuple):
    """A layer's part in a forward pass."""

    inputs: tuple[Any, ...]
    output: TopKOutput | Tensor
    grad: bool  # whether it ran with gradients
    number: int  # how often it ran; the rest is of the last time


class _Thread(threading.local):
    """The forward pass under way in a thread: {layer: call}."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] | None = None
        self.held = False


class Recorder:
    """Takes down what layers take in and give out in a forward pass, in each thread apart.

    Args:
        layers: {name: module}.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self._thread = _Thread()
        self.handles = [
            layer.register_forward_hook(Hook(partial(self._note, name)))
            for name, layer in layers.items()
        ]

    def remove(self) -> None:
        """Takes the hooks off the layers, and whatever else is in handles."""
        for handle in self.handles:
            handle.remove()

    def begin(self) -> None:
        """Begins a pass, unless record() has."""
        if not self._thread.held:
            self._thread.calls = {}

    def end(self) -> dict[str, Call] | None:
        """The calls since begin(); None within record() or without begin()."""
        if self._thread.held:
            return None
        calls, self._thread.calls = self._thread.calls, None
        return calls

    @contextmanager
    def record(self) -> Iterator[dict[str, Call]]:
        """The calls within this context, filled in as they come."""
        thread = self._thread
        before = thread.calls, thread.held
        calls: dict[str, Call] = {}
        thread.calls, thread.held = calls, True
        try:
            yield calls
        finally:
            thread.calls, thread.held = before

    def count(self, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        """count_activations of these layers."""
        counts: dict[str, Tensor] = {}
        with evaluating(model):
            for chunk in x.split(CHUNK):
                with self.record() as calls:
                    model(chunk)
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

    def _note(
        self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: TopKOutput | Tensor
    ) -> None:
        calls = self._thread.calls
        if calls is not None:
            number = calls[name].number + 1 if name in calls else 1
            calls[name] = Call(inputs, output, torch.is_grad_enabled(), number)


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


def count_activations(model: nn.Module, layers: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """How often each neuron of the layers is active over inputs x [N, ..], {name: [R]}.

    Of a layer of sequences, [N, L, R], every position counts.

    Raises:
        ValueError: a layer that does not run exactly once in a forward pass.
    """
    recorder = Recorder({name: model.get_submodule(name) for name in layers})
    try:
        return recorder.count(model, x)
    finally:
        recorder.remove()
