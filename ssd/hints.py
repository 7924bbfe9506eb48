"""What the user should know of settings that run, but cannot do what they are for."""

from __future__ import annotations

from ssd.config import Config

# Inputs whose largest entry lies in this range suit networks that do not normalise them.
ORDINARY = (1e-3, 1e3)


def hints(config: Config, samples: int, largest: float = 1.0) -> list[str]:
    """One line each; none for settings that are as they should be.

    Args:
        config: the settings. samples: training samples of the first task.
        largest: magnitude in the training data.
    """
    found = []
    if "ssd" in config.parts and config.lam > 0 and round(config.subnetwork * config.k) < 2:
        found.append("a subnetwork of one neuron has nothing to distil; use --subnetwork 2")
    # A neuron counts at most once a sample; the other tasks' teachers need a k-sparse one.
    reach = config.epochs * samples
    anneals = config.network == "sdmlp" and config.schedule != "flat"
    if anneals and config.anneal_samples > reach:
        found.append(
            f"--anneal-samples {config.anneal_samples:,} is more than the {reach:,} that the first "
            "task gives (epochs x samples): the switch to k-sparse cannot end in it"
        )
    if config.network != "sdmlp" and not ORDINARY[0] <= largest <= ORDINARY[1]:
        found.append(
            f"the largest feature is {largest:.1e}, and {config.network} takes features as they "
            "are; scale them to about 1"
        )
    return found
