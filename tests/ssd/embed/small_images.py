"""Small image data sets in memory."""

import torch

from ssd.data import Dataset

SIZES = {"cifar10": 3072, "cifar100": 3072, "mnist": 784, "fashion-mnist": 784, "mnist-5k": 784}
TRAIN, TEST = 40, 12
SEEDS = {name: seed for seed, name in enumerate(SIZES)}


def make(name: str) -> Dataset:
    """Noise around the colour of a class; four classes; pixels as of uint8 images."""
    generator = torch.Generator().manual_seed(SEEDS[name])

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 4
        noise = torch.randint(100, (count, SIZES[name]), generator=generator)
        return (noise + 50 * labels[:, None]).float() / 255, labels

    return Dataset(name, *part(TRAIN), *part(TEST))
