"""Networks: the protocol of the trainer, SDMLP, and the plain networks it is compared with.

NETWORKS lists them. A new one is a class with `respond` and a row there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssd.ops.reference import response_to_inhibition
from ssd_kernels import TopKOutput, count_active, linear_inhibit, linear_topk
from ssd_kernels._checks import counter, whole
from ssd_kernels._dispatch import symbolic
from ssd_kernels._graded_code import (
    ActiveNeurons,
    Scratch,
    Shadow,
    estimate_dtype,
    linear_active,
    linear_code,
)
from ssd_kernels.nn import SparseLinear, TopKLinear
from ssd_kernels.reference import project
from ssd_kernels.row_update import project_

SCHEDULES = ("gaba", "linear", "flat")
WIDTH = 4  # slots of a sparse code per k during the GABA switch
SPARSE_SHARE = 1 / 8  # a sparse code pays up to this share of active neurons
RETRY = 64  # steps after a code that was too narrow until the next try
SHADOW_MIN = 2**20  # weights from which on estimating an encoder's scores pays
NEVER = (None, -1, -1, -1)  # no counters yet: tensor, versions, place


class Network(nn.Module):
    """What the trainer asks of a network, x [B, d] -> logits [B, C]. Only `respond` is required.

    The trainer trains the parameters that require gradients, by autograd through `respond`, and
    counts the activations of one module, `layer`. This has config.neurons neurons, runs once per
    forward pass and returns a tensor [B, R] or a TopKOutput. A Distiller finds TopK and TopKLinear
    modules by itself.
    """

    layer: str = "encoder"

    def address(self, x: Tensor) -> Tensor:
        """What the first layer sees of x, [B, d]; without parameters, so computed once per task."""
        return x

    def respond(self, address: Tensor) -> Tensor:
        """Logits [B, C] of an address [B, d]."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Projects the weights onto the network's constraints; called after every step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.respond(self.address(x))


class AnnealedTopKLinear(TopKLinear):
    """TopKLinear without bias that starts dense and becomes k-sparse while it is trained.

    Args:
        in_features: d.
        neurons: R.
        k: neurons active for an input at the end, 1..R.
        inhibition: "subtract" or "mask".
        schedule: "gaba": neuron j answers the inhibition I, the (k+1)-th largest activation, by
            g_j = clamp(-1 + 2 c_j / anneal_samples, -1, 1), c_j = how often it was active in
            training, so h = relu(a - g I). Neurons are excited at first, so that none dies, and
            inhibited at the end. "linear": k falls linearly from R to k over anneal_samples
            training samples. "flat": k-sparse at once.
        anneal_samples: N, activations of a neuron ("gaba") or samples ("linear"), at least 1.

    forward: x [B, d] -> TopKOutput once every neuron is inhibited in full, dense h [B, R] before.
    Only training mode advances the schedule. Where the counters cannot be read (torch.compile,
    torch.export, torch.func, meta and fake tensors) h is always dense, equal up to rounding; once
    inhibited(), schedule = "flat" gives the code there too.

    Raises:
        TypeError, ValueError: a size, schedule or number of samples that does not fit.
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
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
        whole("AnnealedTopKLinear", "anneal_samples", anneal_samples, 1)
        self.schedule, self.anneal_samples = schedule, anneal_samples
        self._shadow: Shadow | None = None
        self._scratch = Scratch()
        self._response: tuple[Tensor | None, bool] = (None, True)
        self._responded: tuple[Tensor | None, int, int, int] = NEVER
        # Counted exactly: a floating counter stops at 2^24.
        self.counts: Tensor
        self.samples: Tensor
        self.dense_until: Tensor
        self.register_buffer("counts", torch.zeros(neurons, dtype=torch.int64, device=device))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("dense_until", torch.zeros((), dtype=torch.int64, device=device))

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors count versions anew, so what was derived from these would seem fresh.
        return self.__dict__ | {"_shadow": None, "_scratch": Scratch(), "_responded": NEVER}

    def gaba(self) -> Tensor:
        """Each neuron's response to inhibition, -1 (excited) to 1 (inhibited), [R]."""
        if self.schedule != "gaba":
            return torch.ones_like(self.weight[:, 0])
        return response_to_inhibition(self.counts, self.anneal_samples, self.weight.dtype)

    def current_k(self) -> int:
        """How many neurons inhibition leaves active at this point of the schedule."""
        return int(self._falling_k()) if self.schedule == "linear" else self.k

    def _falling_k(self) -> Tensor:
        """k of the linear schedule, 0-d int64."""
        left = (1 - self.samples.double() / self.anneal_samples).clamp(min=0)
        return self.k + (left * (self.neurons - self.k)).round().long()

    def inhibited(self) -> bool:
        """Whether the schedule has ended: the layer is exactly k-sparse."""
        return self.schedule == "flat" or bool(self._ended())

    def _ended(self) -> Tensor:
        if self.schedule == "gaba":
            return (self.counts >= self.anneal_samples).all()
        return self._falling_k() == self.k

    def forward(self, x: Tensor) -> TopKOutput | Tensor:  # type: ignore[override]
        counts = self.counts if self.training else None
        hidden: TopKOutput | Tensor
        if self.schedule != "flat" and symbolic(self.counts):
            hidden = self._unread(x, counts)
        elif self.inhibited():
            hidden = linear_topk(x, self.weight, self.k, inhibition=self.inhibition, counts=counts)
        else:
            gaba = self.gaba() if self.schedule == "gaba" else None
            hidden = linear_inhibit(
                x, self.weight, self.current_k(), gaba, inhibition=self.inhibition, counts=counts
            )
        if self.training:
            self.samples += len(x)
        return hidden

    def _unread(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """What forward(x) returns, dense, without reading the counters."""
        counter("AnnealedTopKLinear", "counts", counts, x, self.neurons)
        mask = self.inhibition == "mask"
        if self.schedule == "gaba":
            hidden = linear_inhibit(x, self.weight, self.k, self.gaba(), inhibition=self.inhibition)
        else:
            a = linear_inhibit(x, self.weight, self.neurons)
            cuts = F.pad(a.detach().sort(-1, descending=True).values, (0, 1))
            cut = cuts.index_select(-1, self._falling_k().unsqueeze(0))
            hidden = torch.where((a > cut) | a.isnan(), a, 0.0) if mask else (a - cut).relu()
        if mask:
            # The code keeps k of the neurons that tie with the inhibition.
            code = linear_topk(x, self.weight, self.k)
            kept = torch.zeros_like(hidden).scatter(-1, code.indices, code.values)
            hidden = torch.where(self._ended(), kept, hidden)
        if counts is not None:
            counts += (hidden > 0).reshape(-1, self.neurons).sum(0)
        return hidden

    def response(self) -> tuple[Tensor | None, bool]:
        """gaba(), None once it is 1 everywhere, and whether any neuron is excited (g <= 0)."""
        if self.schedule != "gaba":
            return None, False
        # A Triton kernel that counts leaves the version of counts alone; that of samples moves.
        # Writes through counts.data or counts.numpy() alone are not seen.
        counts = self.counts
        now = (counts, counts._version, self.samples._version, counts.data_ptr())
        if self._responded[0] is not now[0] or self._responded[1:] != now[1:]:
            gaba = self.gaba()
            least = gaba.min().item()
            self._response = None if least >= 1 else gaba, least <= 0
            self._responded = now
        return self._response

    @torch.no_grad()
    def encode(self, x: Tensor, every: bool = False) -> TopKOutput | ActiveNeurons:
        """What forward(x) returns, without gradient: an exact code, or the neurons that fire.

        A neuron that is seldom active reaches g = 1 late or never, so in practice a few more than
        k fire. While none is excited (all g > 0), a code not much wider than k holds them.
        Advances the schedule as forward does.

        Args:
            x: [B, d], not negative.
            every: give all neurons, also those that do not fire.

        Raises:
            TypeError: values cannot be read.
        """
        if symbolic(x) or symbolic(self.counts):
            raise TypeError(
                "AnnealedTopKLinear.encode: how many neurons fire depends on values, which cannot "
                "be read here; forward gives all"
            )
        gaba, excited = self.response()
        k, weight = self.current_k(), self.weight.detach()
        counts = self.counts if self.training else None
        given: dict[str, Any] = {"inhibition": self.inhibition, "scratch": self._scratch}
        width = k if gaba is None else WIDTH * k
        wide = every or excited or width > self.neurons * SPARSE_SHARE
        wide = wide or (gaba is not None and self._computes_all())  # then active is as cheap
        if not wide and self.samples >= self.dense_until:
            shadow = self._estimator()
            code, wider = linear_code(x, weight, k, width, gaba, shadow=shadow, **given)
            if not wider.any():
                if counts is not None:
                    count_active(code.values, code.indices, counts)
                    self.samples += len(x)
                return code
            if self.training:
                self.dense_until.copy_(self.samples + RETRY * len(x))
        active = linear_active(x, weight, k, gaba, counts=counts, every=every, **given)
        if self.training:
            self.samples += len(x)
        return active

    def updated(self, neurons: Callable[[], Tensor]) -> None:
        """To be called if only the rows of neurons() [n] were written since encode()."""
        if self._shadow is not None:
            self._shadow.update(self.weight, neurons())

    def _computes_all(self) -> bool:
        """Whether a graded code on this device needs all R float32 scores."""
        estimated = self._estimates() and estimate_dtype() == torch.bfloat16
        return self.weight.is_cpu and not estimated

    def _estimates(self) -> bool:
        """Whether scores are estimated before they are computed."""
        weight = self.weight
        return weight.is_cpu and weight.dtype == torch.float32 and weight.numel() >= SHADOW_MIN

    def _estimator(self) -> Shadow | None:
        if not self._estimates():
            return None
        if self._shadow is None:
            self._shadow = Shadow(self.weight)
        elif self._shadow.stale(self.weight):
            self._shadow.update(self.weight)
        return self._shadow


class SDMLP(Network):
    """One hidden k-sparse layer, no biases, non-negative weights, unit-norm addresses.

    Args:
        in_features: d.
        neurons: R.
        classes: C.
        k: active neurons, 1..R.
        inhibition: "subtract" or "mask".
        schedule: "gaba", "linear" or "flat", see AnnealedTopKLinear.
        anneal_samples: N of the schedule, see AnnealedTopKLinear.
        generator: source of the initial weights.
        device: of the weights.
        dtype: of the weights.

    forward: x [B, d] -> logits [B, C]. Weights: encoder.weight [R, d] (addresses, paper's W1),
    decoder.weight [R, C] (values, the transpose of the paper's W2). The buffer shift [d], 0 at
    first, is subtracted from every input.
    """

    encoder: AnnealedTopKLinear
    normalized = (True, False)  # whether constrain() scales rows to unit norm, per parameter

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
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(in_features, device=device, dtype=dtype))
        draw(self, (in_features, neurons), generator)
        self.constrain()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # A checkpoint from before there was a shift has none.
        state_dict.setdefault(f"{prefix}shift", torch.zeros_like(self.shift))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def constrain(self) -> None:
        """Clamps all weights at 0, then scales each address to unit L2 norm."""
        for weight, normalize in zip(self.parameters(), self.normalized, strict=True):
            project_(weight, True, normalize)

    def address(self, x: Tensor) -> Tensor:
        """relu(x - shift) scaled to unit L2 norm: what the encoder sees, [B, d]."""
        return project((x - self.shift).relu(), nonnegative=False, normalize=True)

    def read(self, hidden: TopKOutput | Tensor) -> Tensor:
        """Logits [B, C] of a hidden layer, sparse or dense."""
        if isinstance(hidden, TopKOutput):
            return self.decoder(hidden.values, hidden.indices)
        # Classes first: a CPU's product with few columns on the right takes several times as long.
        return (self.decoder.weight.T @ hidden.T).T

    def respond(self, address: Tensor) -> Tensor:
        """Logits [B, C] of an address [B, d]."""
        return self.read(self.encoder(address))


class TopKMLP(Network):
    """The plain MLP with its k largest activations in place of all positive ones.

    Args:
        in_features: d.
        neurons: R.
        classes: C.
        k: neurons active for an input.
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


class ReLUMLP(Network):
    """A plain MLP: linear, ReLU, linear, with biases.

    Args:
        in_features: d.
        neurons: R.
        classes: C.
        generator: source of the initial weights.
    """

    def __init__(
        self, in_features: int, neurons: int, classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        whole("ReLUMLP", "in_features", in_features)
        whole("ReLUMLP", "neurons", neurons, 1)
        whole("ReLUMLP", "classes", classes)
        self.encoder = nn.Sequential(nn.Linear(in_features, neurons), nn.ReLU())
        self.decoder = nn.Linear(neurons, classes)
        draw(self, (in_features, in_features, neurons, neurons), generator)

    def respond(self, address: Tensor) -> Tensor:
        return self.decoder(self.encoder(address))


@torch.no_grad()
def draw(model: nn.Module, fans_in: tuple[int, ...], generator: torch.Generator | None) -> None:
    """Uniform weights and biases within 1 / sqrt(fan in), as torch.nn.Linear draws them."""
    device = "cpu" if generator is None else generator.device  # not the default device
    for parameter, fan_in in zip(model.parameters(), fans_in, strict=True):
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device=device)
        parameter.copy_((2 * drawn - 1) / fan_in**0.5)


class Kind(NamedTuple):
    """How a network is built: with in_features, classes, generator and these settings by name."""

    build: Callable[..., Network]
    settings: tuple[str, ...]  # of ssd.config.Config; "k" means that it has a Top-K layer
    normalizes: bool = False  # whether it takes inputs of any scale


NETWORKS = {
    "sdmlp": Kind(SDMLP, ("neurons", "k", "inhibition", "schedule", "anneal_samples"), True),
    "topk-mlp": Kind(TopKMLP, ("neurons", "k")),
    "relu-mlp": Kind(ReLUMLP, ("neurons",)),
}
