"""torch.nn modules over the ops: TopK, TopKLinear, SparseLinear, KSparseMLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssd_kernels import _checks
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import topk


class TopK(nn.Module):
    """k-winners activation: keeps the k largest positive entries of each row, dense in and out.

    Unlike the op `topk`, it sets negative winners to 0.

    Args:
        k: neurons that stay active.

    forward: x [.., R] -> [.., R].
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        _checks.whole("TopK", "k", k, 1)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        values, indices, *_ = topk(x, self.k)
        return torch.zeros_like(x).scatter(-1, indices, values.relu())

    def extra_repr(self) -> str:
        return f"k={self.k}"


class TopKLinear(nn.Module):
    """A linear layer whose k largest positive outputs stay active.

    Args:
        in_features: d.
        neurons: R.
        k: neurons that stay active, 1..R.
        bias: whether to learn one.
        inhibition: "mask" or "subtract", see linear_topk.
        device: of the parameters.
        dtype: of the parameters.

    forward: x [.., d] -> TopKOutput with values and indices [.., k].
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        k: int,
        bias: bool = True,
        inhibition: str = "mask",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.whole("TopKLinear", "in_features", in_features)
        _checks.whole("TopKLinear", "neurons", neurons, 1)
        _checks.active_range("TopKLinear", k, neurons)
        _checks.inhibition("TopKLinear", inhibition)
        self.in_features, self.neurons = in_features, neurons
        self.k, self.inhibition = k, inhibition
        self.weight = nn.Parameter(torch.empty(neurons, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(neurons, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(max(1, self.in_features))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> TopKOutput:
        return linear_topk(x, self.weight, self.k, self.bias, inhibition=self.inhibition)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, neurons={self.neurons}, k={self.k}, "
            f"bias={self.bias is not None}, inhibition={self.inhibition}"
        )


class SparseLinear(nn.Module):
    """Maps a sparse code to a vector; weight [R, C] has one row per neuron.

    Args:
        neurons: R.
        out_features: C.
        bias: whether to learn one.
        device: of the parameters.
        dtype: of the parameters.

    forward: values [.., K], indices [.., K] -> [.., C].
    """

    def __init__(
        self,
        neurons: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.whole("SparseLinear", "neurons", neurons, 1)
        _checks.whole("SparseLinear", "out_features", out_features)
        self.neurons, self.out_features = neurons, out_features
        self.weight = nn.Parameter(torch.empty(neurons, out_features, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.neurons)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, values: Tensor, indices: Tensor) -> Tensor:
        return sparse_linear(values, indices, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"neurons={self.neurons}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class KSparseMLP(nn.Module):
    """Encoder, exact top-k, decoder: a k-sparse MLP, or a Top-K sparse autoencoder if C = d.

    Args:
        in_features: d.
        neurons: R.
        out_features: C.
        k: neurons that stay active, 1..R.
        bias: whether both layers learn one.
        inhibition: "mask" or "subtract", see linear_topk.
        device: of the parameters.
        dtype: of the parameters.

    forward: x [.., d] -> [.., C].
    """

    def __init__(
        self,
        in_features: int,
        neurons: int,
        out_features: int,
        k: int,
        bias: bool = True,
        inhibition: str = "mask",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = TopKLinear(in_features, neurons, k, bias, inhibition, device, dtype)
        self.decoder = SparseLinear(neurons, out_features, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        return self.decoder(code.values, code.indices)
