"""Writes synthetic data sets for `ssd train --features`: other scales and correlations than images.

    python scripts/synthetic_streams.py FOLDER

common.npz: dense positive features of size 1,000 that share a large mean, three clusters a class.
counts.npz: word counts, most of them 0, four topics a class over a common vocabulary.
signed.npz: 20 classes in 20 of 64 dimensions, both signs, of size 0.01.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def common(rng: np.random.Generator, labels: NDArray[np.int64], parts: dict[str, Array]) -> Array:
    centre = parts["centres"][labels, rng.integers(0, 3, len(labels))]
    noise = 2 * rng.normal(size=centre.shape) @ parts["mixing"]
    return 100 * np.maximum(parts["mean"] + 1.2 * centre + noise, 0)


def counts(rng: np.random.Generator, labels: NDArray[np.int64], parts: dict[str, Array]) -> Array:
    topic = parts["topics"][labels, rng.integers(0, 4, len(labels))]
    return rng.poisson(60 * (0.25 * topic + 0.75 * parts["vocabulary"])).astype(float)


def signed(rng: np.random.Generator, labels: NDArray[np.int64], parts: dict[str, Array]) -> Array:
    inner = parts["centres"][labels] + 1.8 * rng.normal(size=(len(labels), 20))
    noise = 0.5 * rng.normal(size=(len(labels), 64))
    return 0.01 * (inner @ parts["basis"] + noise)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    topics, vocabulary = rng.gamma(0.15, size=(10, 4, 400)), rng.gamma(0.3, size=400)
    streams = {
        "common": (
            common,
            (10, 600),
            {
                "mean": 10 + 5 * rng.random(128),
                "centres": rng.normal(size=(10, 3, 128)),
                "mixing": np.eye(128) + 0.1 * rng.normal(size=(128, 128)) / np.sqrt(128),
            },
        ),
        "counts": (
            counts,
            (10, 800),
            {
                "topics": topics / topics.sum(-1, keepdims=True),
                "vocabulary": vocabulary / vocabulary.sum(),
            },
        ),
        "signed": (
            signed,
            (20, 400),
            {"basis": rng.normal(size=(20, 64)), "centres": rng.normal(size=(20, 20))},
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, (classes, samples), parts) in streams.items():
        arrays = {}
        for part, count in (("train", samples), ("test", 200)):
            labels = np.arange(count * classes) % classes
            arrays[f"x_{part}"] = draw(rng, labels, parts).astype(np.float32)
            arrays[f"y_{part}"] = labels
        np.savez(folder / f"{name}.npz", **arrays)
        print(folder / f"{name}.npz", arrays["x_train"].shape, f"{classes} classes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/synthetic_streams.py FOLDER")
    main(Path(sys.argv[1]))
