"""What the trainer asks of a network, and the plain peers of SDMLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssd_kernels._checks import whole
from ssd_kernels.nn import SparseLinear, TopKLinear


class Network(nn.Module):
    """A network with one hidden layer, its module `encoder`; x [B, d] -> logits [B, C]."""

    encoder: nn.Module

    def address(self, x: Tensor) -> Tensor:
        """What the first layer sees of x, [B, d]; the trainer computes it once a task."""
        return x

    def respond(self, address: Tensor) -> Tensor:
        """Logits [B, C] of an address [B, d]."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Puts the weights where the network needs them, after a step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.respond(self.address(x))


class ReLUMLP(Network):
    """A plain MLP: linear, ReLU, linear, with biases.

    Args:
        in_features: d. neurons: R. classes: C. generator: source of the initial weights.
    """

    def __init__(
        self, in_features: int, neurons: int, classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 0), ("neurons", neurons, 1), ("classes", classes, 0),
        ):  # fmt: skip
            whole("ReLUMLP", name, value, least)
        self.encoder = nn.Sequential(nn.Linear(in_features, neurons), nn.ReLU())
        self.decoder = nn.Linear(neurons, classes)
        draw(self, (in_features, in_features, neurons, neurons), generator)

    def respond(self, address: Tensor) -> Tensor:
        return self.decoder(self.encoder(address))


class TopKMLP(Network):
    """The plain MLP with its k largest activations in place of all positive ones.

    Args:
        in_features: d. neurons: R. classes: C. k: active neurons.
        generator: source of the initial weights.
    """

    def __init__(
        self, in_features: int, neurons: int, classes: int, k: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.encoder = TopKLinear(in_features, neurons, k)
        self.decoder = SparseLinear(neurons, classes)
        draw(self, (in_features, in_features, neurons, neurons), generator)

    def respond(self, address: Tensor) -> Tensor:
        code = self.encoder(address)
        return self.decoder(code.values, code.indices)


@torch.no_grad()
def draw(model: nn.Module, fans_in: tuple[int, ...], generator: torch.Generator | None) -> None:
    """Uniform within 1 / sqrt(fan in), weights and biases, as torch.nn.Linear does."""
    device = "cpu" if generator is None else generator.device  # not the default device
    for parameter, fan_in in zip(model.parameters(), fans_in, strict=True):
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device=device)
        parameter.copy_((2 * drawn - 1) / fan_in**0.5)
