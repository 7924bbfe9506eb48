"""Trains a sparse autoencoder on several processes: samples split, or neurons split.

torchrun --nproc-per-node 2 examples/ddp_sae.py            # DistributedDataParallel
torchrun --nproc-per-node 2 examples/ddp_sae.py --neurons  # each process holds its share of them
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssd_kernels.parallel import ShardedTopKSAE, reduce_activity
from ssd_kernels.sae import TopKSAE

WIDTH, NEURONS, K, SAMPLES = 64, 2048, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", action="store_true", help="split the neurons")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    dist.init_process_group("gloo")  # "nccl" on GPUs, after torch.cuda.set_device
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    make = ShardedTopKSAE if options.neurons else TopKSAE
    sae = model = make(WIDTH, NEURONS, K, auxk=0)
    if not options.neurons:
        model = DistributedDataParallel(sae, broadcast_buffers=False)
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    features = torch.randn(4 * WIDTH, WIDTH)
    for step in range(options.steps):
        # All processes draw the same batch: seeded alike, they remain so.
        code = torch.rand(SAMPLES, len(features))
        x = code.where(code > 0.98, 0.0) @ features
        own = x if options.neurons else x[rank::world]
        loss = model(own).fvu
        optimizer.zero_grad()
        loss.backward()
        sae.project_gradient()
        optimizer.step()
        sae.normalize_decoder()
        if rank == 0 and step in (0, options.steps - 1):
            print(f"step {step}: fraction of variance unexplained {loss.item():.3f}")
    counts = sae.counts if options.neurons else reduce_activity(sae.counts)[0]
    if rank == 0:
        share = counts.sum().item() / (options.steps * SAMPLES * K)
        print(f"{int((counts > 0).sum())} neurons were active, {share:.2f} of the slots")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
