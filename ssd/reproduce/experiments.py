"""What is reproduced: benchmarks, tables, ablations, peers, and the figures that were published.

Everything here is data, except how a row's settings follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssd.config import DEFAULT_NETWORK, EVERYDAY, JOINT, Config, preset, resolve
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
    classes: int
    samples: int  # of the training set
    features: str | None = None  # file in the features folder
    # What --short changes in the preset.
    short: Mapping[str, Any] = field(default_factory=dict, hash=False)


BENCHMARKS = (
    Benchmark("mnist", "Split MNIST", "mnist", "mnist", 10, 60_000),
    Benchmark(
        "cifar10", "Split CIFAR-10 features", "features", "features", 10, 50_000, "cifar10.npz"
    ),
    Benchmark(
        "cifar100",
        "Split CIFAR-100 features (50 tasks)",
        "features",
        "cifar100",
        100,
        50_000,
        "cifar100.npz",
        {"epochs": 16},  # the preset's would take five times as long
    ),
)


@dataclass(frozen=True)
class Method:
    """A row of the tables: the parts of a method, and what it changes in a preset.

    Args:
        parts: `--method`.
        settings: by name.
        own: --short: by benchmark, the best of several settings on its validation split with class
            orders 11 and 12 (results/sweeps/controls-*.md, everyday-cifar100.md), in part those of
            CIFAR-10 on CIFAR-100; those of the preset where it has none. They were chosen at
            R = 1,000 and hold at R = 10,000 too.
    """

    parts: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _own(*settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Settings on each of BENCHMARKS, in their order."""
    return {b.name: chosen for b, chosen in zip(BENCHMARKS, settings, strict=True)}


# What SSD distils and protects in the everyday preset, and in the paper.
_TERMS = ("alpha", "lam", "temperature", "hidden_loss", "hidden_weight", "selection", "protection")
_SSD = {name: preset(EVERYDAY, "mnist")[name] for name in _TERMS}
_PAPER = {name: getattr(Config(), name) for name in _TERMS}
_OPEN = {**_SSD, "protection": "none"}
_PAPERS_RATE = {"lr": Config().lr}  # of plain networks, which are not tuned
_MIXED = {"lr": 2.0, "alpha": 0.4, "temperature": 2.0}
_L2 = {"lr": 2.0, "l2_coefficient": 0.003}
_SI = {"lr": 0.5, "si_coefficient": 1.0, "si_beta": 0.005}
_MAS = {"lr": 2.0, "mas_coefficient": 10.0}
_OPEN_OWN = {**_MIXED, "hidden_weight": 1.0}
PAPER_SSD, PAPER_SSD_EWC = "ssd (paper)", "ssd+ewc (paper)"
# In the order of the tables.
METHODS: Mapping[str, Method] = {
    "naive": Method("naive", _PAPERS_RATE),
    "topk-mlp": Method("topk-mlp", _PAPERS_RATE),
    "sdmlp": Method("sdmlp", own=_own({"lr": 2.0}, {"lr": 0.5}, {"lr": 2.0})),
    "l2": Method("l2", own=_own(_L2, _L2, _L2)),
    "si": Method("si", own=_own({**_SI, "lr": 2.0}, _SI, _SI)),
    "mas": Method("mas", own=_own({"lr": 4.0, "mas_coefficient": 0.5}, _MAS, _MAS)),
    "ewc": Method(
        "ewc",
        own=_own(
            {"lr": 2.0, "ewc_coefficient": 400.0},
            {"lr": 0.5, "ewc_coefficient": 1500.0},
            {"lr": 2.0, "ewc_coefficient": 800.0},
        ),
    ),
    "lwf": Method("lwf", own=_own(_MIXED, _MIXED, _MIXED)),
    PAPER_SSD: Method("ssd", _PAPER, _own(_MIXED, {**_MIXED, "lr": 0.5}, _MIXED)),
    PAPER_SSD_EWC: Method(
        "ssd+ewc",
        _PAPER,
        _own(
            {"lr": 2.0, "ewc_coefficient": 400.0},
            {**_MIXED, "ewc_coefficient": 400.0},
            {**_MIXED, "lr": 6.0, "ewc_coefficient": 800.0},
        ),
    ),
    # At the settings of the next row.
    "cross entropy times alpha": Method(
        "ssd", {**_OPEN, "lam": 1.0, "hidden_weight": 0.0}, _own(_MIXED, _MIXED, _MIXED)
    ),
    "ssd without protection": Method("ssd", _OPEN, _own(_OPEN_OWN, _OPEN_OWN, _OPEN_OWN)),
    "metaplasticity": Method("metaplasticity"),
    "ssd with logits alone": Method("ssd", {**_SSD, "lam": 0.0}),
    "ssd with hidden term alone": Method(
        "ssd", {**_SSD, "lam": 1.0, "hidden_weight": _SSD["lam"] * _SSD["hidden_weight"]}
    ),
    "ssd": Method("ssd", _SSD),
    "ssd+ewc": Method("ssd+ewc", _SSD),
    JOINT: Method(JOINT),
}
# Three methods of which each should beat the one before: the paper's claim, and this project's.
CLAIMS = (("sdmlp", PAPER_SSD, PAPER_SSD_EWC), ("sdmlp", "ssd", "ssd+ewc"))
# Whose codes are compared over tasks.
COMPARED = ("sdmlp", "ewc", *CLAIMS[0][1:], "metaplasticity", *CLAIMS[1][1:])
# Differences that are tested, paired by class order: the second less the first.
PAIRS = (
    ("sdmlp", PAPER_SSD),
    ("lwf", PAPER_SSD),
    ("ewc", PAPER_SSD_EWC),
    ("cross entropy times alpha", "ssd without protection"),
    ("lwf", "ssd without protection"),
    ("ssd without protection", "ssd"),
    ("metaplasticity", "ssd"),
    ("ssd with logits alone", "ssd"),
    ("ssd with hidden term alone", "ssd"),
    ("sdmlp", "ssd"),
    ("lwf", "ssd"),
    ("ewc", "ssd"),
    ("mas", "ssd"),
    ("l2", "ssd"),
    ("si", "ssd"),
    (PAPER_SSD, "ssd"),
    ("ewc", "ssd+ewc"),
    ("mas", "ssd+ewc"),
    ("l2", "ssd+ewc"),
    (PAPER_SSD_EWC, "ssd+ewc"),
    ("ssd", "ssd+ewc"),
)
SIZES = (1_000, 10_000)
SEEDS = (0, 1, 2, 3, 4)  # class orders; 0 is the ordinal one
# --short: of ablations, peers, R = 10,000, the longest stream, and methods of which no difference
# is tested.
SHORT_SEEDS = (0, 1, 2)
LONGEST = "cifar100"
ASIDE = ("naive", "topk-mlp", JOINT)
# --short --large: what is run at R = 10,000, as a run there takes a minute or two.
LARGE, LARGE_ON = (*CLAIMS[0], *CLAIMS[1][1:]), ("mnist", "cifar10")

# What each method's factors are changed to, one at a time. The method's own value makes no row;
# --short takes the last two of the others. "R/k" distils all neurons, lambda 0 none.
ABLATED = "cifar10"
_LAYER = {"schedule": ("gaba", "linear", "flat"), "inhibition": ("subtract", "mask")}
ABLATIONS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    PAPER_SSD: {
        "subnetwork": (1.0, 2.0, 5.0, 10.0, "R/k"),
        "lam": (0.1, 0.5, 0.0, 1.0),
        "alpha": (0.3, 0.5, 0.7, 0.9),
        "temperature": (1.0, 2.0, 4.0, 8.0),
        "kl": ("reverse", "forward"),
        "hidden": ("after", "before"),
        "logits": ("all", "seen"),
        "frequency": ("last", "accumulated"),
        **_LAYER,
    },
    "ssd": {
        "selection": ("all", "activation", "frequency"),
        "hidden_weight": (0.5, 0.1, 2.0),
        "alpha": (0.6, 0.8, 0.9),
        "temperature": (1.0, 2.0, 8.0),
        "metaplasticity_coefficient": (1.0, 3.0, 10.0),
        "lr": (1.0, 2.0, 4.0),
        **_LAYER,
    },
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
        method: of the network that it trains, a key of METHODS; empty if it trains none.
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
    pairs = zip(BENCHMARKS, settings, strict=True)
    known = {benchmark.name: chosen for benchmark, chosen in pairs if chosen is not None}
    evaluate = _evaluate_readout if method else partial(_evaluate_learner, name)
    return {name: Peer(evaluate, sizes, known, method)}


def _evaluate_readout(
    tasks: Sequence[Task], classes: int, neurons: int, config: Config, **chosen: Any
) -> Tensor:
    return evaluate_stream(TrainedReadout(config, tasks, classes, **chosen), tasks)


def _evaluate_learner(
    name: str, tasks: Sequence[Task], classes: int, neurons: int, config: Config, **chosen: Any
) -> Tensor:
    features = tasks[0].x_train.shape[1]
    entry = next(e for e in entries(features, neurons) if e.name == name)
    learner = entry.make(features, classes, neurons, config.seed, chosen)
    return evaluate_stream(learner, [task.to(torch.device("cpu")) for task in tasks])


def _code(share: float, strength: float, **more: float) -> dict[str, Any]:
    return {"share": share, "readout": "lda", "strength": strength, **more}


_FLY_SETTINGS = {"share": 0.05, "lr": 0.005}
_FLYCL = {"share": 0.4, "connections": 0.4}
_CODE = _code(0.4, 1e-4, power=0.5)
# Of the closed-form readouts: readout, strength and share are those of Gaussian addresses.
_FROZEN = _code(0.4, 1e-4, freeze=True)
_KEPT = {"readout": "lda", "strength": 1e-2}
_FOLLOWING = _code(0.4, 1e-3, follow=1e-3)
LINEAR = ("ridge probe", "streaming LDA")  # classifiers of the input
REFERENCES = (JOINT, *LINEAR)  # lines in the figures
_READ = SIZES[:1]  # sizes of the networks whose code is read out
# By name, in the order of the table. Their settings were chosen on a validation split at R = 1,000:
# results/peers/*.csv.
PEERS: dict[str, Peer] = {
    **_peer("nearest class mean", (), {}, {}, {}),
    **_peer("streaming LDA", (), {"shrinkage": 0.1}, {"shrinkage": 1e-3}, {"shrinkage": 1e-3}),
    **_peer("ridge probe", (), {"ridge": 1e-1}, {"ridge": 1e-6}, {"ridge": 1e-6}),
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


_XUE = "Xue et al., AAAI 2026"
_LISTED = "secondary listing of the tables of Xue et al., AAAI 2026"
_FLY = "result files of TrentBrick/SDMContinualLearner"

# (benchmark, R, method, measure); R of a peer without neurons is 0.
PUBLISHED: Mapping[tuple[str, int, str, str], Published] = {
    ("cifar10", 10_000, "sdmlp", "mean_accuracy"): Published(0.71, _XUE),
    ("cifar10", 10_000, PAPER_SSD, "mean_accuracy"): Published(0.81, _XUE),
    ("cifar10", 10_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.87, _XUE),
    ("cifar10", 10_000, "sdmlp", "bwt"): Published(-0.1828, _XUE),
    ("cifar10", 10_000, PAPER_SSD, "bwt"): Published(-0.1234, _XUE),
    ("cifar10", 1_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.80, _LISTED, True),
    ("cifar100", 1_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.40, _LISTED, True),
    ("cifar100", 10_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.52, _LISTED, True),
    ("mnist", 1_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.86, _LISTED, True),
    ("mnist", 10_000, PAPER_SSD_EWC, "mean_accuracy"): Published(0.86, _LISTED, True),
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
    def name(self) -> str:
        """Its method, and in ablations what is changed."""
        return f"{self.method}, {self.factor} = {self.value}" if self.value else self.method

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
        return PUBLISHED.get((self.benchmark.name, self.neurons, self.method, measure))


def table1(short: bool, features: Mapping[str, str]) -> list[Row]:
    """The methods on every benchmark at both sizes, and linear classifiers.

    Args:
        short: use the everyday preset, with fewer seeds, and at R = 10,000 LARGE on LARGE_ON.
        features: path of each benchmark's feature file.
    """
    rows = []
    for benchmark in BENCHMARKS:
        for neurons in SIZES:
            large = short and neurons > SIZES[0]
            if large and benchmark.name not in LARGE_ON:
                continue
            for method in LARGE if large else METHODS:
                few = large or method in ASIDE
                rows.append(_row(benchmark, method, neurons, short, features, few))
            if neurons == SIZES[0]:
                rows += [_peer_row(benchmark, name, 0, short, features) for name in LINEAR]
    return rows


def streams(short: bool, features: Mapping[str, str]) -> list[Row]:
    """The rows of table1 that train a network task by task."""
    return [row for row in table1(short, features) if row.config.tasks > 1 and row.peer is None]


def structure(short: bool, features: Mapping[str, str]) -> list[Row]:
    """The rows of `streams` whose codes are compared over tasks: as many as a figure can show."""
    return [row for row in streams(short, features) if row.method in COMPARED]


def table2(short: bool, features: Mapping[str, str]) -> list[Row]:
    """Peers beside the methods at R = 1,000; --short: only peers of that size."""
    rows = []
    for benchmark in BENCHMARKS:
        for method in (m for m in METHODS if m == JOINT or m not in ASIDE):
            few = method in ASIDE
            rows.append(_row(benchmark, method, SIZES[0], short, features, few))
        for name, peer in PEERS.items():
            if not peer.settings or benchmark.name in peer.settings:
                sizes = [n for n in peer.sizes or (0,) if n <= SIZES[0] or not short]
                rows += [_peer_row(benchmark, name, n, short, features) for n in sizes]
    return rows


def ablations(short: bool, features: Mapping[str, str]) -> list[Row]:
    """Each method of ABLATIONS with one factor changed at a time, on one benchmark, R = 1,000."""
    benchmark = next(b for b in BENCHMARKS if b.name == ABLATED)
    rows = []
    for method, factors in ABLATIONS.items():
        default = _row(benchmark, method, SIZES[0], short, features, few=True)
        config = default.config
        rows.append(replace(default, factor=DEFAULT))
        for factor, values in factors.items():
            settings: dict[Any, Any] = {
                v: config.neurons / config.k if v == "R/k" else v for v in values
            }
            others = [v for v in values if settings[v] != getattr(config, factor)]
            for value in others[-2:] if short else others:
                changed = replace(config, **{factor: settings[value]})
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                rows.append(replace(default, config=changed, factor=factor, value=shown))
    return rows


def _row(
    benchmark: Benchmark,
    method: str,
    neurons: int,
    short: bool,
    features: Mapping[str, str],
    few: bool,
) -> Row:
    """A method's row; few: with --short over SHORT_SEEDS, as all rows of LONGEST are."""
    config = _config(benchmark, method, neurons, short, features)
    few = short and (few or benchmark.name == LONGEST)
    return Row(benchmark, method, config, SHORT_SEEDS if few else SEEDS)


def _peer_row(
    benchmark: Benchmark, name: str, neurons: int, short: bool, features: Mapping[str, str]
) -> Row:
    """A peer's row; neurons: 0 if it has none. A network under it is always trained short."""
    peer = PEERS[name]
    scaled = bool(peer.method) and not short
    method, width = peer.method or DEFAULT_NETWORK, neurons or SIZES[0]
    config = _config(benchmark, method, width, short or scaled, features)
    note = "its network is trained as with --short" if scaled else ""
    return Row(benchmark, name, config, SHORT_SEEDS if short else SEEDS, peer=peer, note=note)


def _config(
    benchmark: Benchmark, method: str, neurons: int, short: bool, features: Mapping[str, str]
) -> Config:
    """The settings of a method: those of the protocol, its own, and with --short the tuned ones."""
    row = METHODS[method]
    given = {"dataset": benchmark.protocol, "neurons": neurons, "method": row.parts, **row.settings}
    if short:
        given |= {**benchmark.short, **row.own.get(benchmark.name, {})}
        config = resolve({"preset": EVERYDAY, **given}, benchmark.samples)
        config = replace(config, eval_every=config.epochs)  # after tasks only
    else:
        config = resolve({"preset": "paper-1k" if neurons == SIZES[0] else "paper-10k", **given})
    if method == JOINT:
        # One task of all classes, which the last of many tasks would be too: the tasks before it
        # would cost 25 times as much for 50 tasks. --short: the switch takes the same share of it.
        longer = config.tasks if short else 1
        config = replace(config, tasks=1, anneal_samples=longer * config.anneal_samples)
    return replace(config, dataset=benchmark.dataset, features=features.get(benchmark.name))


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
    "structure": Result(_STRUCTURE, structure, tuple(_OF_THE_CODE.split()), per_task=True),
    "table2": Result("Peers on the same streams", table2, _TABLE2),
    "ablations": Result(_ABLATIONS, ablations, ("mean_accuracy", "bwt")),
}
