"""SDMLP: a k-sparse MLP whose inhibition is switched on gradually (Bricken et al., ICLR 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd_kernels import TopKOutput, linear_inhibit, linear_topk, topk
from ssd_kernels.nn import SparseLinear, TopKLinear
from ssd_kernels.reference import project

# A layer whose busiest sample has at most this share of the neurons active is worth a sparse code.
SPARSE_SHARE = 1 / 8


class AnnealedTopKLinear(TopKLinear):
    """TopKLinear without bias that starts dense and becomes k-sparse while it is trained.

    Args:
        in_features: d. neurons: R. k: 1..R. inhibition: "subtract" or "mask".
        schedule: "gaba": neuron j answers the inhibition I, the (k+1)-th largest activation, by
            g_j = clamp(-1 + 2 c_j / anneal_samples, -1, 1), c_j = how often it was active in
            training, so h = relu(a - g I): excited at first, so that no neuron dies, inhibited at
            the end. "linear": k falls linearly from R to k over anneal_samples training samples.
            "flat": k-sparse at once.

    forward: x [B, d] -> TopKOutput once every neuron is inhibited in full, dense h [B, R] before.
    Only training mode advances the schedule.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        k: int,
        inhibition: str = "subtract",
        schedule: str = "gaba",
        anneal_samples: int = 100_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, neurons, k, False, inhibition, device, dtype)
        if schedule not in ("gaba", "linear", "flat"):
            raise ValueError(f"schedule={schedule!r} is not one of gaba, linear, flat")
        self.schedule, self.anneal_samples = schedule, anneal_samples
        self.excited = schedule == "gaba"  # in the last forward pass: whether some g_j < 0
        # Counted exactly: a floating counter stops at 2^24.
        self.counts: Tensor
        self.samples: Tensor
        self.register_buffer("counts", torch.zeros(neurons, dtype=torch.int64, device=device))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))

    def gaba(self) -> Tensor:
        """Each neuron's response to inhibition, -1 (excited) to 1 (inhibited), [R]."""
        if self.schedule != "gaba":
            return torch.ones_like(self.weight[:, 0])
        counts = self.counts.to(self.weight.dtype)
        return (2 * counts / self.anneal_samples - 1).clamp(-1, 1)

    def current_k(self) -> int:
        """The number of neurons that inhibition leaves active at this point of the schedule."""
        if self.schedule != "linear":
            return self.k
        left = max(0.0, 1 - self.samples.item() / self.anneal_samples)
        return self.k + round(left * (self.neurons - self.k))

    def inhibited(self) -> bool:
        """Whether the schedule has ended: the layer is exactly k-sparse."""
        if self.schedule == "gaba":
            return bool((self.counts >= self.anneal_samples).all())
        return self.current_k() == self.k

    def forward(self, x: Tensor) -> TopKOutput | Tensor:  # type: ignore[override]
        counts = self.counts if self.training else None
        hidden: TopKOutput | Tensor
        if self.inhibited():
            self.excited = False
            hidden = linear_topk(x, self.weight, self.k, inhibition=self.inhibition, counts=counts)
        else:
            gaba = self.gaba() if self.schedule == "gaba" else None
            self.excited = gaba is not None and bool((gaba < 0).any())
            hidden = linear_inhibit(
                x, self.weight, self.current_k(), gaba, inhibition=self.inhibition, counts=counts
            )
        if self.training:
            self.samples += len(x)
        return hidden

    def sparse_code(self, hidden: TopKOutput | Tensor) -> TopKOutput | None:
        """The code equal to the last output `hidden`; None where that is not sparse enough.

        A neuron that is seldom active reaches g = 1 late or never, so in practice a few more than
        k fire. While none is excited (g >= 0) such a layer has an exact code not much wider than k.
        """
        if isinstance(hidden, TopKOutput):
            return hidden
        if self.excited:
            return None
        hidden = hidden.detach()
        width = max(1, int((hidden > 0).sum(-1).max()))
        return topk(hidden, width) if width <= SPARSE_SHARE * self.neurons else None


class SDMLP(nn.Module):
    """One hidden k-sparse layer, no biases, non-negative weights, unit-norm addresses.

    Args:
        in_features: d. neurons: R. classes: C. k: active neurons.
        inhibition, schedule, anneal_samples: see AnnealedTopKLinear.
        generator: source of the initial weights.

    forward: x [B, d] -> logits [B, C]. Weights: encoder.weight [R, d] (addresses, paper's W1),
    decoder.weight [R, C] (values, the transpose of the paper's W2).
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        classes: int,
        k: int,
        inhibition: str = "subtract",
        schedule: str = "gaba",
        anneal_samples: int = 100_000,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = AnnealedTopKLinear(
            in_features, neurons, k, inhibition, schedule, anneal_samples, device, dtype
        )
        self.decoder = SparseLinear(neurons, classes, False, device, dtype)
        with torch.no_grad():
            for weight, fan_in in (
                (self.encoder.weight, in_features),
                (self.decoder.weight, neurons),
            ):
                drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_((2 * drawn - 1) / fan_in**0.5)
        self.constrain()

    @property
    def normalized(self) -> tuple[bool, bool]:
        """Whether constrain() scales the rows of each parameter to unit norm."""
        return (True, False)

    @torch.no_grad()
    def constrain(self) -> None:
        """Clamps all weights at 0, then scales each address to unit L2 norm."""
        for weight, normalize in zip(self.parameters(), self.normalized, strict=True):
            weight.copy_(project(weight, True, normalize))

    def address(self, x: Tensor) -> Tensor:
        """relu(x) scaled to unit L2 norm: what the encoder sees, [B, d]."""
        return F.normalize(x.relu(), dim=-1)

    def read(self, hidden: TopKOutput | Tensor) -> Tensor:
        """Logits [B, C] of a hidden layer, sparse or dense."""
        if isinstance(hidden, TopKOutput):
            return self.decoder(hidden.values, hidden.indices)
        return hidden @ self.decoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.encoder(self.address(x)))
