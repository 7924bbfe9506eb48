"""What is reproduced: benchmarks, tables, ablations, peers, and the figures that were published.

Everything here is data, except how a row's settings follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ssd.config import JOINT, Config, resolve
from ssd.data import Task
from ssd.peers.learners import entries, evaluate_stream
from ssd.peers.trained_readout import TrainedReadout


@dataclass(frozen=True)
class Benchmark:
    """A stream of tasks that figures were published for."""

    name: str
    title: str
    dataset: str
    protocol: str  # the data set of ssd.config whose presets hold
    features: str | None = None  # file in the features folder


BENCHMARKS = (
    Benchmark("mnist", "Split MNIST", "mnist", "mnist"),
    Benchmark("cifar10", "Split CIFAR-10 features", "features", "features", "cifar10.npz"),
    # The 50 tasks are short, so their switch to inhibition is too.
    Benchmark(
        "cifar100", "Split CIFAR-100 features (50 tasks)", "features", "cifar100", "cifar100.npz"
    ),
)

PLAIN = ("naive", "topk-mlp")
# In the order of the tables.
TABLE1 = (*PLAIN, "sdmlp", "l2", "si", "mas", "ewc", "lwf", "ssd", "ssd+ewc", JOINT)
# The rows of the paper's claims. With --short they have all SEEDS too, at R = 10,000 only with
# --large, as a run there takes a minute or two.
SHORT_LARGE = ("sdmlp", "ssd", "ssd+ewc")
SHORT_LARGE_ON = ("mnist", "cifar10")
SIZES = (1_000, 10_000)
SEEDS = (0, 1, 2, 3, 4)  # class orders; 0 is the ordinal one
SHORT_SEEDS = (0, 1)  # of all other rows of --short

_LARGE = {"epochs": 3, "anneal_samples": 24_000}
# --short: (benchmark, R, method) -> settings that differ from the preset's, chosen by validation
# sweeps (results/sweeps). Methods may differ in epochs too.
SHORT_OWN: Mapping[tuple[str, int, str], Mapping[str, Any]] = {
    ("mnist", 1_000, "ssd+ewc"): {"alpha": 0.7},
    ("mnist", 10_000, "sdmlp"): _LARGE,
    ("mnist", 10_000, "ssd"): {**_LARGE, "alpha": 0.25},
    ("mnist", 10_000, "ssd+ewc"): {**_LARGE, "alpha": 0.7, "ewc_coefficient": 600.0},
    ("cifar10", 1_000, "ssd"): {"alpha": 0.3},
    ("cifar10", 10_000, "ssd"): {"alpha": 0.3},
    # One long task: the switch takes the same share of it as of the stream's first task.
    ("mnist", 1_000, JOINT): {"anneal_samples": 400_000},
    ("cifar10", 1_000, JOINT): {"anneal_samples": 250_000},
    ("cifar100", 1_000, JOINT): {"anneal_samples": 100_000, "lr": 2.0},
}
# SDMLP's own best learning rate in the sweeps; the preset's suits SSD + EWC.
SHORT_SLOWER = 0.5

# Each factor's values. The method's default makes no row of its own; --short takes the last two
# of the others. "R/k" distils all neurons, lambda 0 none.
ABLATED = "cifar10"
ABLATIONS: Mapping[str, Sequence[Any]] = {
    "subnetwork": (1.0, 2.0, 5.0, 10.0, "R/k"),
    "lam": (0.1, 0.5, 0.0, 1.0),
    "alpha": (0.3, 0.5, 0.7, 0.9),
    "temperature": (1.0, 2.0, 4.0, 8.0),
    "kl": ("reverse", "forward"),
    "hidden": ("after", "before"),
    "logits": ("all", "seen"),
    "frequency": ("last", "accumulated"),
    "schedule": ("gaba", "linear", "flat"),
    "inhibition": ("subtract", "mask"),
}
DEFAULT = "default"


@dataclass(frozen=True, eq=False)
class Peer:
    """A learner of another kind, measured on the same streams.

    Args:
        evaluate: (tasks, classes C, neurons R, config, **settings) -> accuracy matrix [T, T]; a
            peer without gradients takes only the seed from the config.
        sizes: R of its rows; empty for a peer without neurons, which is given R = 0.
        settings: by the benchmark's name; chosen on a validation split, never here.
        method: of the network that it trains with the preset `short`; empty if it trains none.
    """

    evaluate: Callable[..., Tensor]
    sizes: tuple[int, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    method: str = ""


_Settings = Mapping[str, Any] | None  # of a peer on a benchmark; None: it is not measured there


def _peer(
    name: str, sizes: tuple[int, ...], *settings: _Settings, method: str = ""
) -> dict[str, Peer]:
    """A learner of ssd.peers by its name there; with a method, a readout of its network's code.

    Args:
        name: in the tables, and without a method in ssd.peers.
        sizes: see Peer.
        settings: on each of BENCHMARKS, in their order.
        method: see Peer.
    """

    def evaluate(
        tasks: Sequence[Task], classes: int, neurons: int, config: Config, **chosen: Any
    ) -> Tensor:
        if method:
            return evaluate_stream(TrainedReadout(config, tasks, classes, **chosen), tasks)
        features = tasks[0].x_train.shape[1]
        entry = next(e for e in entries(features, neurons) if e.name == name)
        learner = entry.make(features, classes, neurons, config.seed, chosen)
        return evaluate_stream(learner, [task.to(torch.device("cpu")) for task in tasks])

    pairs = zip(BENCHMARKS, settings, strict=True)
    known = {benchmark.name: chosen for benchmark, chosen in pairs if chosen is not None}
    return {name: Peer(evaluate, sizes, known, method)}


def _code(share: float, strength: float, **more: float) -> dict[str, Any]:
    return {"share": share, "readout": "lda", "strength": strength, **more}


_FLY_SETTINGS = {"share": 0.05, "lr": 0.005}
_FLYCL = {"share": 0.4, "connections": 0.4}
_CODE = _code(0.4, 1e-4, power=0.5)
# Of the closed-form readouts: readout, strength and share are those of Gaussian addresses.
_FROZEN = _code(0.4, 1e-4, freeze=True)
_KEPT = {"readout": "lda", "strength": 1e-2}
_FOLLOWING = _code(0.4, 1e-2, follow=1e-3)
_READ = SIZES[:1]  # sizes of the networks whose code is read out
# By name, in the order of the table. Their settings were chosen on a validation split at R = 1,000:
# results/peers/*.csv.
PEERS: dict[str, Peer] = {
    **_peer("nearest class mean", (), {}, {}, {}),
    **_peer("streaming LDA", (), {"shrinkage": 0.1}, {"shrinkage": 1e-3}, {"shrinkage": 1e-3}),
    **_peer("FlyModel", SIZES, _FLY_SETTINGS, _FLY_SETTINGS, {"share": 0.05, "lr": 0.02}),
    **_peer("random ReLU + ridge", SIZES, {"ridge": 1e-3}, {"ridge": 1e-4}, {"ridge": 1e-4}),
    # An eigenvalue decomposition a task, so not at R = 10,000.
    **_peer("RanPAC", SIZES[:1], {}, {}, {}),
    **_peer("Fly-CL", SIZES[:1], {"share": 0.4, "connections": 0.1}, _FLYCL, _FLYCL),
    **_peer("sparse code, Gaussian addresses", SIZES, _CODE, _code(0.4, 1e-2, power=0.5), _CODE),
    **_peer("sparse code, local addresses", SIZES, _code(0.3, 1e-4, width=6.0), None, None),
    **_peer("sparse code beside the input", SIZES, None, _CODE, _code(0.4, 1e-3, power=0.5)),
    **_peer(
        "control: ReLU beside the input",
        SIZES,
        None,
        _code(1.0, 1e-4, power=0.5),
        _code(1.0, 1e-3, power=1.0),
    ),
    # Nothing was chosen for these. A code that keeps training is read at the network's own k.
    **_peer("sdmlp code, closed-form readout", _READ, None, _KEPT, None, method="sdmlp"),
    **_peer("ssd code, closed-form readout", _READ, None, _KEPT, None, method="ssd"),
    # Chosen on the validation split of CIFAR-10 with class order 1000.
    **_peer("ssd code, statistics that follow", _READ, None, _FOLLOWING, None, method="ssd"),
    **_peer(
        "sdmlp code of the first task, closed-form readout",
        _READ,
        _FROZEN,
        _code(0.4, 1e-2, freeze=True),
        _FROZEN,
        method="sdmlp",
    ),
}


@dataclass(frozen=True)
class Published:
    """A figure of a publication."""

    value: float
    source: str
    inferred: bool = False  # which row of the publication it belongs to is our reading


_SSD = "Xue et al., AAAI 2026"
_LISTED = "secondary listing of the tables of Xue et al., AAAI 2026"
_FLY = "result files of TrentBrick/SDMContinualLearner"

# (benchmark, R, method, measure); R of a peer without neurons is 0.
PAPER: Mapping[tuple[str, int, str, str], Published] = {
    ("cifar10", 10_000, "sdmlp", "mean_accuracy"): Published(0.71, _SSD),
    ("cifar10", 10_000, "ssd", "mean_accuracy"): Published(0.81, _SSD),
    ("cifar10", 10_000, "ssd+ewc", "mean_accuracy"): Published(0.87, _SSD),
    ("cifar10", 10_000, "sdmlp", "bwt"): Published(-0.1828, _SSD),
    ("cifar10", 10_000, "ssd", "bwt"): Published(-0.1234, _SSD),
    ("cifar10", 1_000, "ssd+ewc", "mean_accuracy"): Published(0.80, _LISTED, True),
    ("cifar100", 1_000, "ssd+ewc", "mean_accuracy"): Published(0.40, _LISTED, True),
    ("cifar100", 10_000, "ssd+ewc", "mean_accuracy"): Published(0.52, _LISTED, True),
    ("mnist", 1_000, "ssd+ewc", "mean_accuracy"): Published(0.86, _LISTED, True),
    ("mnist", 10_000, "ssd+ewc", "mean_accuracy"): Published(0.86, _LISTED, True),
    ("mnist", 10_000, "FlyModel", "mean_accuracy"): Published(0.906, _FLY, True),
    ("cifar10", 10_000, "FlyModel", "mean_accuracy"): Published(0.822, _FLY),
    ("cifar100", 10_000, "FlyModel", "mean_accuracy"): Published(0.528, _FLY, True),
}
# Data set, size and moments of these two are not named.
PAPER_ENTROPY = "the paper's mean activation entropy falls from 0.99 to 0.003 bits with SSD"


@dataclass(frozen=True)
class Row:
    """A line of a table: one setting of one method or peer, run once per seed."""

    benchmark: Benchmark
    method: str
    config: Config  # of seed 0
    seeds: tuple[int, ...]
    factor: str = ""  # what an ablation changes, and to what
    value: str = ""
    peer: Peer | None = None
    note: str = ""  # shown in the table

    @property
    def neurons(self) -> int:
        """R; 0 for a peer without neurons."""
        return self.config.neurons if self.peer is None or self.peer.sizes else 0

    @property
    def place(self) -> str:
        """Benchmark and size, as a title says them."""
        return f"{self.benchmark.title}, R = {self.neurons:,}"

    @property
    def settings(self) -> dict[str, Any]:
        """What a peer's figures depend on, apart from its stream."""
        return {} if self.peer is None else dict(self.peer.settings.get(self.benchmark.name, {}))

    def published(self, measure: str) -> Published | None:
        """The publication's figure for this line; in ablations only the default has one."""
        if self.factor not in ("", DEFAULT):
            return None
        return PAPER.get((self.benchmark.name, self.neurons, self.method, measure))


def table1(short: bool, features: Mapping[str, str]) -> list[Row]:
    """The paper's methods on every benchmark at both sizes.

    Args:
        short: use the preset `short`, with fewer seeds and only R = 1,000 except for SHORT_LARGE.
        features: path of each benchmark's feature file.
    """
    rows = []
    for benchmark in BENCHMARKS:
        for neurons in SIZES:
            large = short and neurons > SIZES[0]
            if large and benchmark.name not in SHORT_LARGE_ON:
                continue
            for method in SHORT_LARGE if large else TABLE1:
                config = _config(benchmark, method, neurons, short, features)
                if method == JOINT:
                    # One task of all classes, which the last of many tasks would be too. The
                    # tasks before it would cost 25 times as much for 50 tasks.
                    config = replace(config, tasks=1)
                few = large or (short and method not in SHORT_LARGE)
                rows.append(Row(benchmark, method, config, SHORT_SEEDS if few else SEEDS))
    return rows


def over_all_orders(rows: Sequence[Row]) -> list[Row]:
    """The rows with those at R = 10,000 over all class orders: what --large adds to --short."""
    return [row if row.neurons <= SIZES[0] else replace(row, seeds=SEEDS) for row in rows]


def streams(short: bool, features: Mapping[str, str]) -> list[Row]:
    """The rows of table1 that learn task by task."""
    return [row for row in table1(short, features) if row.config.tasks > 1]


def table2(short: bool, features: Mapping[str, str]) -> list[Row]:
    """Peers beside SDMLP and the paper's methods at R = 1,000; --short: only peers of that size."""
    rows = []
    for benchmark in BENCHMARKS:
        for method in SHORT_LARGE:
            config = _config(benchmark, method, SIZES[0], short, features)
            rows.append(Row(benchmark, method, config, SEEDS))
        seeds = SHORT_SEEDS if short else SEEDS
        for name, peer in PEERS.items():
            if peer.settings and benchmark.name not in peer.settings:
                continue
            scaled = bool(peer.method) and not short
            note = "its network is trained as with --short" if scaled else ""
            for neurons in peer.sizes or SIZES[:1]:
                if short and neurons > SIZES[0]:
                    continue
                method = peer.method or Config().method
                config = _config(benchmark, method, neurons, short or scaled, features)
                rows.append(Row(benchmark, name, config, seeds, peer=peer, note=note))
    return rows


def ablations(short: bool, features: Mapping[str, str]) -> list[Row]:
    """SSD with one factor changed at a time, on one benchmark at R = 1,000."""
    benchmark = next(b for b in BENCHMARKS if b.name == ABLATED)
    config = _config(benchmark, "ssd", SIZES[0], short, features)
    seeds = SHORT_SEEDS if short else SEEDS
    rows = [Row(benchmark, "ssd", config, seeds, DEFAULT)]
    for factor, values in ABLATIONS.items():
        settings = {v: config.neurons / config.k if v == "R/k" else v for v in values}
        others = [v for v in values if settings[v] != getattr(config, factor)]
        for value in others[-2:] if short else others:
            changed = Config(**{**config.to_dict(), factor: settings[value]})
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            rows.append(Row(benchmark, "ssd", changed, seeds, factor, shown))
    if short:  # how much of SSD's gain comes from its learning rate
        for method in ("sdmlp", "ssd"):
            own = _config(benchmark, method, SIZES[0], short, features)
            slower = replace(own, lr=SHORT_SLOWER)
            rows.append(Row(benchmark, method, slower, seeds, "lr", f"{SHORT_SLOWER:g}"))
    return rows


def _config(
    benchmark: Benchmark, method: str, neurons: int, short: bool, features: Mapping[str, str]
) -> Config:
    """The settings of a method: the benchmark's, and with --short its own."""
    name = "short" if short else "paper-1k" if neurons == SIZES[0] else "paper-10k"
    config = replace(
        resolve({"preset": name, "dataset": benchmark.protocol}),
        dataset=benchmark.dataset,
        features=features.get(benchmark.name),
        neurons=neurons,
        method=method,
    )
    if not short:
        return config
    if method in PLAIN:  # the preset's learning rate is SDMLP's; plain networks keep the papers'
        config = replace(config, lr=Config().lr)
    config = replace(config, **SHORT_OWN.get((benchmark.name, neurons, method), {}))
    return replace(config, eval_every=config.epochs)  # after tasks only, as the preset


@dataclass(frozen=True)
class Result:
    """A table with its figure: its rows and its measures.

    The first measure is compared with the publications. Measures are names in summary.json; for a
    list over tasks the mean is shown.
    """

    title: str
    rows: Callable[[bool, Mapping[str, str]], list[Row]]
    measures: tuple[str, ...]
    claims: bool = False  # whether the paper's claims are judged on its rows
    per_task: bool = False  # whether it has a table and a figure over tasks too


_STRUCTURE = "Structure of the code, mean over tasks"
_OF_THE_CODE = """mean_entropy_bits dead_fraction mean_active jaccard kl_bits address_cosine
    effective_rank used_fraction"""
_TABLE2 = ("mean_accuracy", "forgetting", "seconds")
_ABLATIONS = "Ablations of SSD, one factor at a time"
RESULTS: Mapping[str, Result] = {
    "table1": Result("Accuracy after the last task", table1, ("mean_accuracy",), claims=True),
    "bwt": Result("Backward transfer and forgetting", streams, ("bwt", "forgetting"), claims=True),
    "structure": Result(_STRUCTURE, streams, tuple(_OF_THE_CODE.split()), per_task=True),
    "table2": Result("Peers on the same streams", table2, _TABLE2),
    "ablations": Result(_ABLATIONS, ablations, ("mean_accuracy", "bwt")),
}
