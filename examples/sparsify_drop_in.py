"""Puts the ops into sparsify: its encoder and decoder, with the same loss and gradients.

    pip install eai-sparsify && python examples/sparsify_drop_in.py

The encoder then holds no pre-activations [B, R]. sparsify's AuxK loss, for dead latents, reads
them: to train with it, use `preactivations=True` below, which allocates them.
"""

import os

import torch
from torch import Tensor

from ssd_kernels import linear_topk, sparse_linear

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # sparsify's own decoder needs a GPU else
from sparsify import SparseCoder, SparseCoderConfig, sparse_coder
from sparsify.fused_encoder import EncoderOutput


def patch() -> None:
    def encode(x: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> EncoderOutput:
        assert activation == "topk", activation
        code = linear_topk(x, weight, k, bias, preactivations=False)
        return EncoderOutput(code.values, code.indices, code.preactivations)

    def decode(indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        return sparse_linear(values, indices, weight.mT)

    sparse_coder.fused_encoder, sparse_coder.decoder_impl = encode, decode


def trained_on(sae: SparseCoder, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, and its gradients."""
    sae.zero_grad()
    loss = sae(x).fvu
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in sae.parameters()]


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sae = SparseCoder(128, SparseCoderConfig(num_latents=4096, k=32), device)
    x = torch.randn(512, 128, device=device)
    before, expected = trained_on(sae, x)
    patch()
    after, gradients = trained_on(sae, x)
    print(f"FVU before {before:.6f}, after {after:.6f}")
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    print("the gradients are equal to rounding")


if __name__ == "__main__":
    main()
