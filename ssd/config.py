"""Every setting of a run, every number of the papers, and the named presets.

SSD = Xue et al., AAAI 2026 (arXiv 2512.15267). SDMLP = Bricken et al., ICLR 2023.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from typing import Any

from ssd.data import SOURCES
from ssd.distillation import CHOICES, SELECTIONS
from ssd.errors import UserError
from ssd.losses import HIDDEN_LOSSES
from ssd.models import NETWORKS, SCHEDULES
from ssd.regularizers import PENALTIES

DEFAULT_NETWORK = "sdmlp"
DISTILLATIONS = ("ssd", "lwf")
JOINT = "joint"  # trains each task on the data of all tasks up to it, the upper bound
ALIASES = {"naive": "relu-mlp"}  # the plain MLP, one task after the other


def method_parts() -> list[str]:
    """The parts of a method, joined by "+": at most one network and one distillation."""
    return [*NETWORKS, *DISTILLATIONS, *PENALTIES, JOINT, *ALIASES]


# The smallest and largest normal float32: training uses numbers between them, or 0.
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
LIMIT = 2**31  # of sizes and counts: neurons are indexed with 32 bits


def _setting(
    default: Any, help: str, choices: tuple[str, ...] | None = None, *, later: bool = False
) -> Any:
    """A dataclass field that the command line offers under the same name.

    Args:
        default: of the setting.
        help: for --help.
        choices: the strings it may be.
        later: whether runs were made before there was this setting. At its default it is then no
            part of what identifies a run, so that those runs stay known.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "later": later})


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of one run; equal configs give equal results."""

    dataset: str = _setting("mnist", "data set")
    features: str | None = _setting(None, "feature file (.npz or .pt) for --dataset features")
    method: str = _setting("ssd", f"parts joined by +, of {', '.join(method_parts())}")
    tasks: int = _setting(5, "number of tasks; must divide the number of classes; 50 for cifar100")
    seed: int = _setting(0, "seed of class order (0: in order), initial weights and batch order")
    order_seed: int | None = _setting(None, "seed of the class order; 0: in order", later=True)
    weight_seed: int | None = _setting(None, "seed of the initial weights", later=True)
    validation: float = _setting(
        0.0, "evaluate on this fraction of the training data instead of the test set"
    )

    epochs: int = _setting(20, "epochs a task")
    batch_size: int = _setting(128, "samples a step")
    lr: float = _setting(0.05, "learning rate of SGD")
    momentum: float = _setting(0.0, "momentum of SGD; also moves inactive neurons")
    max_norm: float = _setting(1.0, "clip of the global gradient norm")

    neurons: int = _setting(1000, "hidden neurons R")
    k: int = _setting(10, "neurons active for an input")
    inhibition: str = _setting("subtract", "how the top-k pass on", ("subtract", "mask"))
    center: str = _setting(
        "never",
        "subtract the mean input of the first task: never (paper), auto: where inputs are almost "
        "parallel, or always; for sdmlp",
        ("never", "auto", "always"),
        later=True,
    )
    schedule: str = _setting(
        "gaba", "from dense to k-sparse: GABA switch, k falling linearly, or at once", SCHEDULES
    )
    anneal_samples: int = _setting(
        100_000, "GABA: activations of a neuron until it is inhibited in full; linear: samples"
    )

    alpha: float = _setting(0.7, "weight of the cross entropy; the rest distils")
    lam: float = _setting(0.1, "lambda: share of the hidden term in the distillation; 0 is LwF")
    temperature: float = _setting(8.0, "temperature T of both distillation terms")
    subnetwork: float = _setting(1.0, "n / k: size of the distilled subnetwork in units of k")
    kl: str = _setting(
        "reverse",
        "reverse: KL(student || teacher); forward: KL(teacher || student)",
        CHOICES["kl"],
    )
    hidden: str = _setting("after", "hidden z after or before inhibition", CHOICES["hidden"])
    logits: str = _setting(
        "all", "logits distilled: all outputs or classes seen", CHOICES["logits"]
    )
    hidden_loss: str = _setting(
        "kl",
        "hidden term: KL (paper), or mse relative to the norm of the teacher's code",
        tuple(HIDDEN_LOSSES),
        later=True,
    )
    hidden_weight: float = _setting(1.0, "factor of the hidden term", later=True)
    selection: str = _setting(
        "frequency",
        "neurons distilled: the most frequent (paper), those active on the new inputs too, or all",
        tuple(SELECTIONS),
        later=True,
    )
    protection: str = _setting(
        "none",
        "what ssd protects besides: nothing (paper), or the addresses in use, as metaplasticity",
        ("none", "use"),
        later=True,
    )
    frequency: str = _setting(
        "last", "activation frequency of the last task or accumulated", CHOICES["frequency"]
    )

    ewc_coefficient: float = _setting(200.0, "strength of the EWC penalty")
    ewc_beta: float = _setting(0.005, "inverse temperature of the EWC importance")
    mas_coefficient: float = _setting(0.5, "strength of the MAS penalty")
    si_coefficient: float = _setting(1500.0, "strength of the SI penalty")
    si_beta: float = _setting(0.005, "inverse temperature of the SI importance")
    l2_coefficient: float = _setting(10.0, "strength of the L2 pull to the last task's weights")
    metaplasticity_coefficient: float = _setting(
        3.0, "how much past use slows a neuron's address", later=True
    )

    eval_every: int = _setting(5, "epochs between evaluations; there is one after every task too")

    def __post_init__(self) -> None:
        """Writes equal settings alike: they name the folder of a run."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if setting.type == "float" and real:
                object.__setattr__(self, setting.name, _as_float(value))
        if isinstance(self.method, str):
            object.__setattr__(self, "method", _in_order(self._names()) or self.method)

    @property
    def parts(self) -> frozenset[str]:
        """The method's parts but its network: any of DISTILLATIONS, PENALTIES and JOINT."""
        return frozenset(self._names()) - set(NETWORKS)

    @property
    def penalties(self) -> list[str]:
        """The names in PENALTIES of what acts on the gradients, in their order."""
        protected = "ssd" in self.parts and self.protection == "use"
        acting = self.parts | {"metaplasticity"} if protected else self.parts
        return [name for name in PENALTIES if name in acting]

    @property
    def network(self) -> str:
        """The method's network; SDMLP unless another is named."""
        return next((name for name in self._names() if name in NETWORKS), DEFAULT_NETWORK)

    def _names(self) -> list[str]:
        return [ALIASES.get(name, name) for name in self.method.split("+")]

    def validate(self) -> None:
        """Raises UserError for a value that no run could use."""
        self._validate_types()
        self._validate_method()

        def check(fits: Callable[[Any], bool], rule: str, *names: str) -> None:
            for name in names:
                self._require(name, fits(getattr(self, name)), rule)

        sizes = ("tasks", "epochs", "batch_size", "neurons", "k", "eval_every")
        check(lambda v: v is None or _is_path(v), "a path", "features")
        check(lambda v: 1 <= v < LIMIT, f"in 1..{LIMIT - 1}", *sizes)
        check(lambda v: v <= self.neurons, f"at most --neurons {self.neurons}", "k")
        check(lambda v: 0 < v < inf, "above 0 and finite", "lr", "max_norm", "temperature")
        check(lambda v: 1 <= v < 2**63, "in 1..2^63-1", "anneal_samples")
        seeds = ("seed", "order_seed", "weight_seed")
        check(lambda v: v is None or 0 <= v < 2**63, "in 0..2^63-1", *seeds)
        check(lambda v: 0 <= v <= 1, "in 0..1", "alpha", "lam")
        check(lambda v: 0 <= v < 1, "in 0..1, below 1", "validation", "momentum")
        numbers = [f.name for f in fields(self) if isinstance(f.default, float)]
        penalties = [n for n in penalty_settings(*PENALTIES) if n in numbers]
        check(lambda v: 0 <= v < inf, "at least 0 and finite", "hidden_weight", *penalties)
        # These two are shares of samples and neurons, and take no part in a step.
        in_steps = [n for n in numbers if n not in ("validation", "subnetwork")]
        rule = f"0 or in {SMALLEST:.1e}..{LARGEST:.1e}, as float32"
        check(lambda v: v == 0 or SMALLEST <= v <= LARGEST, rule, *in_steps)
        most = LARGEST / 2  # the gradient has twice the coefficient as a factor
        coefficients = (n for n in penalties if n.endswith("_coefficient"))
        check(lambda v: v <= most, f"at most {most:.1e}", *coefficients)
        rule = "in 1e-18..1e18, as its square is float32"
        check(lambda v: SMALLEST <= v**2 <= LARGEST, rule, "temperature")
        limit = self.neurons / self.k
        check(lambda v: 1 <= v <= limit, f"in 1..{limit:g}", "subnetwork")

    def _validate_method(self) -> None:
        names, known = self._names(), method_parts()
        self._require("method", set(names) <= set(known), f"any of {', '.join(known)} joined by +")
        for group in (NETWORKS, DISTILLATIONS):
            one = sum(n in group for n in names) <= 1
            self._require("method", one, f"made with one of {', '.join(group)}")
        self._require("method", len(set(names)) == len(names), "made of different parts")
        layered = "k" in NETWORKS[self.network].settings or not self.parts & set(DISTILLATIONS)
        self._require("method", layered, "made with a Top-K network: ssd and lwf distil its layer")

    def _validate_types(self) -> None:
        """For settings from a file; the command line has checked its own."""
        known: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
        known |= {f"{name} | None": (known[name], type(None)) for name in ("int", "str")}
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            kinds = known[str(setting.type)]
            fits = isinstance(value, kinds) and not isinstance(value, bool)
            self._require(setting.name, fits, f"of type {setting.type}")
            if choices is not None:
                self._require(setting.name, value in choices, f"one of {', '.join(choices)}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, name)
            shown = value if str(value).isprintable() else ascii(value)
            raise UserError(f"{option(name)} {shown} must be {rule}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a character
        return False


def _as_float(value: float) -> float:
    try:
        return float(value) + 0.0  # -0.0 + 0.0 is 0.0
    except OverflowError:
        return inf if value > 0 else -inf


def _in_order(names: Sequence[str]) -> str:
    """The method of these parts, without the default network; "" if it is none."""
    known = method_parts()
    if not set(names) <= set(known) or len(set(names)) < len(names):
        return ""
    parts = sorted(names, key=known.index)
    return "+".join(parts[1:] if parts[0] == DEFAULT_NETWORK and len(parts) > 1 else parts)


def option(name: str) -> str:
    """The command-line option of a setting."""
    return "-k" if name == "k" else f"--{name.replace('_', '-')}"


def penalty_settings(*penalties: str) -> list[str]:
    """The settings of penalties: those that begin with a penalty's name."""
    return [f.name for p in penalties for f in fields(Config) if f.name.startswith(f"{p}_")]


@dataclass(frozen=True)
class Protocol:
    """What the papers fix for one data set, besides its number of tasks."""

    paper: Mapping[str, Any]
    sdmlp: Mapping[str, Any] = field(default_factory=dict)  # where its code differs from `paper`


# The SSD paper: 2,000 epochs a task. The SDMLP code: 500 for MNIST; N = 5,000,000.
_SDMLP_MNIST = {"epochs": 500}
_MNIST = {
    "epochs": 2000,
    "anneal_samples": 5_000_000,
    "ewc_coefficient": 200.0,
    "ewc_beta": 0.005,
    "mas_coefficient": 0.5,
    "si_coefficient": 1500.0,
    "si_beta": 0.005,
    "l2_coefficient": 10.0,
}
_CIFAR = {
    **_MNIST,
    "ewc_coefficient": 100.0,
    "ewc_beta": 0.08,
    "mas_coefficient": 10.0,
    "si_coefficient": 1350.0,
    "si_beta": 0.02,
    "l2_coefficient": 30.0,
}

# A neuron counts at most once per sample, so N is at most epochs x samples of the first task.
_MNIST_5K = {**_MNIST, "anneal_samples": 175_000}
_CIFAR100 = {**_CIFAR, "anneal_samples": 500_000}
# k = 1: neurons are rarely active, so N of the SDMLP code; one neuron alone cannot be distilled.
_K1_SUBNETWORK, _K1_ANNEAL_SAMPLES = 2.0, 500_000

EVERYDAY = "everyday"
# Chosen at once on the validation splits of several data sets: results/sweeps/everyday-*.md.
_EVERYDAY = {
    "lr": 4.0,
    "alpha": 0.8,
    "lam": 0.05,
    "temperature": 2.0,
    "hidden_loss": "mse",
    "hidden_weight": 0.5,
    "selection": "all",
    "protection": "use",
    "center": "auto",
    "metaplasticity_coefficient": 3.0,
    "ewc_coefficient": 500.0,
}
# Epochs and N of the everyday preset follow from the samples of a task.
EVERYDAY_STEPS = 600  # of a task
EVERYDAY_EPOCHS = (3, 100)  # at least and at most
EVERYDAY_SWITCH = 0.5  # N, as a share of the first task's epochs x samples
TYPICAL_SAMPLES = 12_000  # of a task, where the data are not known yet: Split MNIST

# A data set without a row has the protocol of "features".
PROTOCOLS: Mapping[str, Protocol] = {
    "mnist": Protocol(_MNIST, _SDMLP_MNIST),
    "fashion-mnist": Protocol(_MNIST, _SDMLP_MNIST),
    "mnist-5k": Protocol(_MNIST_5K, _SDMLP_MNIST),
    "cifar10": Protocol(_CIFAR),
    "cifar100": Protocol(_CIFAR100),
    "features": Protocol(_CIFAR),
}

# The full protocols: their paper or code, R and k.
_FULL = {
    f"{whose}-{size}{suffix}": (whose, neurons, k)
    for whose in ("paper", "sdmlp")
    for k, suffix in ((10, ""), (1, "-k1"))
    for neurons, size in ((1_000, "1k"), (10_000, "10k"))
}
PRESETS = (EVERYDAY, *_FULL)


def preset(name: str, dataset: str) -> dict[str, Any]:
    """The settings of a preset for a data set.

    - `everyday` trains half a minute or so on a CPU; `resolve` adds what depends on the samples.
    - `paper-1k` and `paper-10k` are the SSD paper's protocol at R = 1,000 and 10,000, k = 10;
      `paper-1k-k1` and `paper-10k-k1` have k = 1.
    - `sdmlp-` in place of `paper-` is the protocol of the SDMLP code, shorter on MNIST.

    Raises:
        UserError: there is no such preset or data set.
    """
    if dataset not in SOURCES:
        raise UserError(f"--dataset {dataset} is unknown; choose from {', '.join(SOURCES)}")
    protocol, tasks = PROTOCOLS.get(dataset, PROTOCOLS["features"]), SOURCES[dataset].tasks
    if name == EVERYDAY:
        return {"tasks": tasks, **_EVERYDAY}
    if name in _FULL:
        whose, neurons, k = _FULL[name]
        settings = {"neurons": neurons, "k": k, **protocol.paper}
        if whose == "sdmlp":
            settings |= protocol.sdmlp
        if k == 1:
            settings["subnetwork"] = _K1_SUBNETWORK
            settings["anneal_samples"] = min(_K1_ANNEAL_SAMPLES, settings["anneal_samples"])
        return {"tasks": tasks, "eval_every": settings["epochs"] // 20, **settings}
    raise UserError(f"--preset {name} is unknown; choose from {', '.join(PRESETS)}")


def resolve(given: Mapping[str, Any], samples: int | None = None) -> Config:
    """The settings of a run: defaults, then the preset's, then those given.

    A feature file split into as many tasks as CIFAR-100 takes its protocol: the tasks are short.

    Args:
        given: settings by name, and "preset"; other keys are ignored.
        samples: training samples of the data set; None: those of Split MNIST. The everyday
            preset depends on them.

    Raises:
        UserError: there is no such preset or data set.
    """
    names = {setting.name for setting in fields(Config)}
    dataset = given.get("dataset", "features" if "features" in given else "mnist")
    many = dataset == "features" and given.get("tasks") == SOURCES["cifar100"].tasks
    name = given.get("preset", EVERYDAY)
    settings = preset(name, "cifar100" if many else dataset)
    settings |= {name: value for name, value in given.items() if name in names}
    config = Config(**{**settings, "dataset": dataset})
    return _sized(config, settings, samples) if name == EVERYDAY else config


def _sized(config: Config, chosen: Mapping[str, Any], total: int | None) -> Config:
    """The everyday preset's epochs and N for `total` training samples, unless they are chosen."""
    try:
        config.validate()
    except UserError:  # the caller validates too, and has words for it
        return config
    samples = TYPICAL_SAMPLES
    if total is not None:
        samples = max(1, round((1 - config.validation) * total / config.tasks))
    least, most = EVERYDAY_EPOCHS
    epochs = min(most, max(least, round(EVERYDAY_STEPS * config.batch_size / samples)))
    epochs = chosen.get("epochs", epochs)
    sized = {
        "epochs": epochs,
        "anneal_samples": max(1, round(EVERYDAY_SWITCH * epochs * samples)),
        "eval_every": max(1, epochs // 2),
    }
    return replace(config, **{n: value for n, value in sized.items() if n not in chosen})


def hints(config: Config, samples: int, largest: float = 1.0) -> list[str]:
    """Probable mistakes in valid settings, one line each.

    Args:
        config: the settings.
        samples: training samples of the first task.
        largest: the largest magnitude in the training data.
    """
    found = []
    divides = "ssd" in config.parts and config.lam > 0 and config.hidden_loss == "kl"
    if divides and config.selection != "all" and round(config.subnetwork * config.k) < 2:
        found.append("a subnetwork of one neuron has nothing to distil; use --subnetwork 2")
    network = NETWORKS[config.network]
    reach = config.epochs * samples  # a neuron counts at most once per sample
    anneals = "anneal_samples" in network.settings and config.schedule != "flat"
    if anneals and config.anneal_samples > reach:  # then the first teacher is not k-sparse
        found.append(
            f"--anneal-samples {config.anneal_samples:,} is more than the {reach:,} that the first "
            "task gives (epochs x samples): the switch to k-sparse cannot end in it"
        )
    if not network.normalizes and not 1e-3 <= largest <= 1e3:
        found.append(
            f"the largest feature is {largest:.1e}, and {config.network} takes features as they "
            "are; scale them to about 1"
        )
    return found
