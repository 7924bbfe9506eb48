"""Top-K sparse autoencoders over the ops: TopKSAE, BatchTopKSAE and their losses.

x' = decode(encode(x)), where encode subtracts the decoder's bias and keeps a few of R neurons. It
is a bridge, no framework: it stores no activations and runs no training loop. sae_files reads and
writes the files of other libraries.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssd_kernels import _checks, reference
from ssd_kernels._row_gradient import row_gradient
from ssd_kernels.count_active import count_active
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.nn import SparseLinear
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_update import project_
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import topk

WORKSPACE = 2**22  # scores that AuxK holds at a time
THRESHOLD_RATE = 0.01  # of a batch in the running mean of BatchTopKSAE's thresholds, at least


class SAEOutput(NamedTuple):
    """What an autoencoder returns."""

    output: Tensor  # [.., d], the reconstruction
    values: Tensor  # [.., K] >= 0, the code
    indices: Tensor  # [.., K] int64
    fvu: Tensor  # 0-d, fraction of variance unexplained
    auxk: Tensor  # 0-d, AuxK loss in the same unit; 0 in eval mode or without dead neurons


class TopKSAE(nn.Module):
    """A Top-K sparse autoencoder (Gao et al. 2024, arXiv 2406.04093).

    The decoder begins as the encoder, with unit rows. After backward call `project_gradient`, after
    the optimizer's step `normalize_decoder`, so that its rows stay unit vectors.

    Args:
        in_features: d.
        neurons: R, the latents.
        k: neurons that stay active, 1..R. It may be set anew at each step; see annealed_k.
        dead_after: samples without activity after which a neuron is dead.
        auxk: dead neurons a sample that reconstruct the error; None: d // 2. To find the dead ones
            waits for the device; with 0 no step does.
        device: of the parameters.
        dtype: of the parameters.

    forward: x [.., d] -> SAEOutput. Train on `fvu + auxk / 32`. In training mode it updates the
        buffers samples, counts [R] and last_active [R], which are int64 and part of state_dict.
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        k: int,
        *,
        dead_after: int = 10_000_000,
        auxk: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _checks.whole(name, "in_features", in_features, 1)
        _checks.whole(name, "neurons", neurons, 1)
        self.k = self._checked_k(k, neurons)
        _checks.whole(name, "dead_after", dead_after, 1)
        self.auxk = in_features // 2 if auxk is None else auxk
        _checks.whole(name, "auxk", self.auxk)
        self.in_features, self.neurons, self.dead_after = in_features, neurons, dead_after
        self.encoder = nn.Linear(in_features, neurons, device=device, dtype=dtype)
        self.decoder = SparseLinear(neurons, in_features, device=device, dtype=dtype)
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))
        for activity in ("counts", "last_active"):
            zeros = torch.zeros(neurons, dtype=torch.int64, device=device)
            self.register_buffer(activity, zeros)
        self.reset_parameters()

    samples: Tensor
    counts: Tensor
    last_active: Tensor

    def _checked_k(self, k: Any, neurons: int) -> Any:
        _checks.active_range(type(self).__name__, k, neurons)
        return k

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.decoder.reset_parameters()
        nn.init.normal_(self.decoder.weight)
        self.normalize_decoder()
        self.encoder.weight.copy_(self.decoder.weight)
        nn.init.zeros_(self.encoder.bias)

    def encode(self, x: Tensor) -> TopKOutput:
        """x [.., d] -> values [.., k] >= 0, descending, and indices [.., k] int64."""
        return self._code(self._centered(x))

    def _code(self, centered: Tensor) -> TopKOutput:
        return self._largest(centered, self.k)

    def _largest(self, centered: Tensor, k: int) -> TopKOutput:
        return linear_topk(centered, self.encoder.weight, k, self.encoder.bias)

    def _centered(self, x: Tensor) -> Tensor:
        bias = self.decoder.bias
        assert bias is not None
        return x - bias

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """values [.., K], indices [.., K] -> [.., d]."""
        return self._sum(values, indices, self.decoder.bias)

    def _sum(self, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_linear(values, indices, self.decoder.weight, bias)

    def forward(self, x: Tensor) -> SAEOutput:
        centered = self._centered(x)
        values, indices, *_ = self._code(centered)
        output = self.decode(values, indices)
        error, variance = x - output, _total_variance(x)
        auxk = torch.zeros_like(variance)
        if self.training:
            self._record(values, indices)
            neurons = self.dead.nonzero().squeeze(1) if self.auxk else self.counts[:0]
            if len(neurons):
                auxk = self._auxk_loss(centered, error.detach(), neurons) / variance
        return SAEOutput(output, values, indices, _square_sum(error) / variance, auxk)

    @torch.no_grad()
    def _record(self, values: Tensor, indices: Tensor) -> None:
        self.samples += math.prod(values.shape[:-1])
        count_active(values, indices, self.counts, self.last_active, self.samples)

    def _auxk_loss(self, centered: Tensor, error: Tensor, neurons: Tensor) -> Tensor:
        """How far the dead neurons are from the error x - x' (Gao et al. 2024, appendix A.2).

        Negative scores count: a neuron that is negative everywhere would get no gradient else.
        """
        k = min(self.auxk, len(neurons))
        samples, error = (t.reshape(-1, self.in_features) for t in (centered, error))
        estimate = self._sum(*self._strongest(samples, neurons, k), None)
        # A few dead neurons shall not outweigh the living ones.
        return k / self.auxk * _square_sum(estimate - error)

    def _strongest(self, samples: Tensor, neurons: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest scores [B, k] of samples [B, d] among some neurons, and their indices."""
        return _TopAmong.apply(samples, self.encoder.weight, self.encoder.bias, neurons, k)

    @property
    def dead(self) -> Tensor:
        """[R] bool: the neurons that were inactive in the last `dead_after` samples."""
        return self.samples - self.last_active >= self.dead_after

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Gives each row of the decoder the length 1; a row of zeros stays."""
        project_(self.decoder.weight, nonnegative=False, normalize=True)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from the decoder's gradient what would only change the length of its rows."""
        weight, gradient = self.decoder.weight, self.decoder.weight.grad
        if gradient is None:
            raise RuntimeError("the decoder has no gradient; call project_gradient after backward")
        size = torch.linalg.vecdot(weight, weight).clamp(min=torch.finfo(weight.dtype).tiny)
        gradient -= (torch.linalg.vecdot(gradient, weight) / size).unsqueeze(1) * weight

    def extra_repr(self) -> str:
        return f"k={self.k}, dead_after={self.dead_after}, auxk={self.auxk}"


class BatchTopKSAE(TopKSAE):
    """A sparse autoencoder of k active neurons on average (Bussmann et al. 2024, arXiv 2412.06410).

    In training mode the k B largest activations of a batch stay active; ties go to the first
    sample, then to the lower index. In eval mode those above `threshold` do (JumpReLU), whatever
    the batch: a running mean of the smallest activation that stayed. It starts at 0, where all
    positive activations pass. Both are exact: linear_topk keeps a few times k neurons a sample, and
    more if a sample needs them. To know that waits for the device. Up to 255 slots a sample need no
    [B, R] on CUDA.

    Args:
        k: active neurons a sample on average, above 0 and at most R; it need not be whole. None:
            unknown, as in a JumpReLU file; training needs it.

    The others are those of TopKSAE. `threshold` [R] is a float32 buffer.
    """

    def __init__(self, in_features: int, neurons: int, k: float | None, **settings: Any) -> None:
        super().__init__(in_features, neurons, k, **settings)  # type: ignore[arg-type]
        device = settings.get("device")
        self.register_buffer("threshold", torch.zeros(neurons, device=device))
        # Of 2 k, 4 k, .. what the last batch needed; the next one begins with them.
        self._slots = 0

    threshold: Tensor

    def _checked_k(self, k: Any, neurons: int) -> Any:
        if k is not None:
            _checks.number(type(self).__name__, "k", k, positive=True)
            if k > neurons:
                raise ValueError(f"{type(self).__name__}: k={k} is more than the {neurons} neurons")
        return k

    def encode(self, x: Tensor) -> TopKOutput:
        """x [.., d] -> values [.., K] >= 0, indices [.., K]; K is what the fullest sample needs.

        Slots of value 0 are inactive.

        Raises:
            ValueError: in training mode, if k is None.
        """
        return super().encode(x)

    def _code(self, centered: Tensor) -> TopKOutput:
        if self.training and self.k is None:
            raise ValueError("BatchTopKSAE: k is None; set sae.k before training")
        least = min(self.neurons, max(1, math.ceil(2 * (self.k or 16))))
        slots = max(least, self._slots)
        while True:
            code = self._largest(centered, slots)
            values = code.values.detach()
            stays, full = self._of_batch(values) if self.training else self._above(code)
            if slots == self.neurons or not full:
                break
            slots = min(self.neurons, 2 * slots)
        columns = torch.arange(1, slots + 1, device=centered.device)
        width = int((stays.reshape(-1, slots).any(0) * columns).amax())
        # A batch that needed many does not slow down all that follow.
        self._slots = least
        while self._slots < min(width + 1, self.neurons):
            self._slots *= 2
        self._slots = min(self.neurons, self._slots)
        kept = torch.where(stays, code.values, 0.0)
        return TopKOutput(kept[..., :width], code.indices[..., :width].contiguous())

    def _of_batch(self, values: Tensor) -> tuple[Tensor, bool]:
        """Which slots the batch keeps, and whether a sample may need more slots."""
        flat, count = values.flatten(), int(self.k * math.prod(values.shape[:-1]))
        if count == 0:
            return torch.zeros_like(values, dtype=torch.bool), False
        cut = flat.kthvalue(max(1, len(flat) - count + 1)).values
        stays, ties = ~(flat <= cut), flat == cut  # a NaN stays, so that it is seen
        stays |= ties & (ties.cumsum(0) <= count - stays.sum())
        stays = stays.view(values.shape) & ~(values <= 0)
        return stays, bool(stays[..., -1].any())

    def _above(self, code: TopKOutput) -> tuple[Tensor, bool]:
        """As _of_batch, of the activations above the thresholds."""
        values, threshold = code.values.detach(), self.threshold.clamp(min=0)
        stays = ~(values <= threshold[code.indices])
        return stays, not bool((values[..., -1] <= threshold.min()).all())

    @torch.no_grad()
    def _record(self, values: Tensor, indices: Tensor) -> None:
        super()._record(values, indices)
        positive = torch.where(values > 0, values.to(self.threshold.dtype), torch.inf)
        least = torch.cat([positive.flatten(), self.threshold.new_full((1,), torch.inf)]).amin()
        # The share of a plain mean at first, so that the start at 0 is forgotten at once.
        share = (math.prod(values.shape[:-1]) / self.samples).clamp(min=THRESHOLD_RATE)
        step = torch.where(least.isfinite(), share * (least - self.threshold), 0.0)
        self.threshold += step


class _TopAmong(torch.autograd.Function):
    """The k largest scores among some neurons, whatever their sign, without all scores at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, neurons: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        rows, shift = weight[neurons], bias[neurons]
        blocks = [
            topk(reference.scores_of(block, rows, shift), k)
            for block in x.split(max(1, WORKSPACE // len(neurons)))
        ]
        indices = neurons[torch.cat([block.indices for block in blocks])]
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return torch.cat([block.values for block in blocks]).to(x.dtype), indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor, _: None) -> tuple[Any, ...]:
        x, weight, indices = ctx.saved_tensors
        # The bias is the weight of an input that is 1: the slots are sorted once.
        inputs = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        gradient = row_gradient(slopes, inputs, indices, len(weight))
        grad_x = sparse_linear(slopes, indices, weight) if ctx.needs_input_grad[0] else None
        return grad_x, gradient[:, :-1], gradient[:, -1], None, None


def fvu(output: Tensor, x: Tensor) -> Tensor:
    """Fraction of variance unexplained: sum of (x' - x)^2 over that of (x - mean x)^2; 0-d.

    Args:
        output: [.., d], the reconstruction x'.
        x: [.., d]; the mean is over all dimensions but the last.

    Returns:
        0-d in at least fp32; not finite if all samples are equal, as one alone is.
    """
    return _square_sum(output - x) / _total_variance(x)


def l0(values: Tensor) -> Tensor:
    """Active neurons a sample on average; values [.., K] -> 0-d fp32."""
    return (values > 0).sum(-1).float().mean()


def annealed_k(step: int, steps: int, start: int, k: int) -> int:
    """k at a step of a schedule that falls linearly from `start` to k in `steps` steps.

    Args:
        step: the present one, from 0.
        steps: until k is reached.
        start: k at step 0.
        k: from step `steps` on.
    """
    _checks.whole("annealed_k", "step", step)
    _checks.whole("annealed_k", "steps", steps)
    if step >= steps:
        return k
    return round(start + (k - start) * step / steps)


def _square_sum(x: Tensor) -> Tensor:
    return x.to(reference.accumulation_dtype(x.dtype)).square().sum()


def _total_variance(x: Tensor) -> Tensor:
    wide = x.to(reference.accumulation_dtype(x.dtype)).reshape(-1, x.shape[-1])
    return _square_sum(wide - wide.mean(0))
