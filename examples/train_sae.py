"""Trains a Top-K sparse autoencoder on real activations, saves it and loads it again.

    python examples/train_sae.py [FOLDER]

The activations are features of CIFAR-10 where the folder SSD_DATA has them; else the hidden layer
of a small network, trained here on the bundled digits. FOLDER (default: sae) gets the autoencoder
in SAELens' format.
"""

import sys

import torch
from torch import Tensor, nn

from ssd.data import default_root, load
from ssd_kernels import sae_files
from ssd_kernels.sae import TopKSAE, annealed_k, l0

NEURONS, K, STEPS, BATCH = 2048, 16, 300, 512


def activations() -> tuple[str, Tensor]:
    """Where they come from, and [N, d]."""
    features = default_root() / "features" / "cifar10.npz"
    if features.is_file():
        return "features of CIFAR-10", load("features", default_root(), features).x_train
    digits = load("mnist-5k", default_root())
    network = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(300):
        batch = torch.randint(len(digits.x_train), (128,))
        loss = nn.functional.cross_entropy(network(digits.x_train[batch]), digits.y_train[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return "hidden layer of a network of digits", network[:2](digits.x_train)


def train(x: Tensor) -> TopKSAE:
    sae = TopKSAE(x.shape[1], NEURONS, K, dead_after=20_000)
    with torch.no_grad():
        sae.decoder.bias.copy_(x.mean(0))  # the code is of what differs from the mean
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(STEPS):
        sae.k = annealed_k(step, STEPS // 3, start=4 * K, k=K)
        out = sae(x[torch.randint(len(x), (BATCH,))])
        optimizer.zero_grad()
        (out.fvu + out.auxk / 32).backward()
        sae.project_gradient()
        optimizer.step()
        sae.normalize_decoder()
        if step % 50 == 0 or step == STEPS - 1:
            dead = sae.dead.float().mean()
            print(f"step {step:3d}  k {sae.k:2d}  FVU {out.fvu:.3f}  dead {dead:.1%}")
    return sae


def main(folder: str = "sae") -> None:
    torch.manual_seed(0)
    source, x = activations()
    x = x[torch.randperm(len(x))]
    held_out, x = x[:1000], x[1000:]
    print(f"{source}: {len(x):,} samples, d = {x.shape[1]}")
    sae = train(x).eval()
    with torch.no_grad():
        out = sae(held_out)
    print(
        f"held out: FVU {out.fvu:.3f}, L0 {l0(out.values):.1f}, dead {sae.dead.float().mean():.1%}"
    )

    sae_files.save(sae, folder, model_name=source)
    with torch.no_grad():
        again = sae_files.load(folder)(held_out)
    assert torch.equal(again.output, out.output)
    print(f"saved to {folder}, loaded again: the same FVU, {again.fvu:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
