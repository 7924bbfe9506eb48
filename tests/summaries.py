"""The content of a run's summary.json."""

from typing import Any

from ssd.config import Config


def summary_of(matrix: list[list[float]], **settings: Any) -> dict[str, Any]:
    """Of a run with this accuracy matrix [T, T] and these settings."""
    count = len(matrix)
    return {
        "dataset": "mnist",
        "method": "ssd",
        "seed": 0,
        "evaluated_on": "test",
        "accuracy_matrix": matrix,
        "mean_accuracy": 0.5,
        "bwt": -0.1,
        "forgetting": 0.2,
        **dict.fromkeys(("mean_entropy_bits", "dead_fraction", "mean_active"), [0.5] * count),
        "trained_together": 1,
        "seconds": 2.0,
        "device": "cpu",
        "versions": {"torch": "2.6"},
        "commit": "c0ffee",
        "config": Config(tasks=count, **settings).to_dict(),
    }
