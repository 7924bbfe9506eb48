"""Puts the ops into SAELens: a TopKTrainingSAE that never holds [B, R], with the same loss.

    pip install sae-lens && python examples/saelens_drop_in.py

SAELens' trainer takes the class as it is, since the activations in its output are a sparse tensor.
The AuxK loss is left out: ssd_kernels.sae.TopKSAE has one.
"""

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from ssd_kernels import linear_topk, sparse_linear


class SparseTopKTrainingSAE(TopKTrainingSAE):
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = self.process_sae_in(step_input.sae_in)
        norm = self.W_dec.norm(dim=1)  # the code is that of a decoder with unit rows
        code = linear_topk(x, (self.W_enc * norm).T, self.cfg.k, self.b_enc * norm)
        values = code.values / norm[code.indices]
        out = sparse_linear(values, code.indices, self.W_dec, self.b_dec)
        loss = self.mse_loss_fn(out, step_input.sae_in).sum(-1).mean()
        rows = torch.arange(len(x), device=x.device).repeat_interleave(self.cfg.k)
        places = torch.stack([rows, code.indices.flatten()])
        active = code.values.detach().flatten()  # for the trainer's statistics
        acts = torch.sparse_coo_tensor(places, active, (len(x), self.cfg.d_sae))
        return TrainStepOutput(step_input.sae_in, out, acts, acts, loss, {"mse_loss": loss})


def trained_on(sae: TopKTrainingSAE, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch, and its gradients."""
    given = {"coefficients": {}, "dead_neuron_mask": None, "n_training_steps": 0}
    loss = sae.training_forward_pass(TrainStepInput(x, **given, is_logging_step=False)).loss
    loss.backward()
    return loss.detach(), [p.grad for p in sae.parameters()]


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TopKTrainingSAEConfig(d_in=128, d_sae=4096, k=32, device=device)
    dense, sparse = TopKTrainingSAE(config), SparseTopKTrainingSAE(config)
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(512, 128, device=device)
    before, expected = trained_on(dense, x)
    after, gradients = trained_on(sparse, x)
    print(f"loss before {before:.6f}, after {after:.6f}")
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)
    print("the gradients are equal to rounding")


if __name__ == "__main__":
    main()
