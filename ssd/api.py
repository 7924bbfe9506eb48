"""Experiments from Python: result = ssd.run("mnist", method="ssd+ewc", seeds=3)."""

from __future__ import annotations

import copy
import html
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ssd.activations import count_activations, find_layers
from ssd.cli import check_seeds, choose_device, note
from ssd.config import JOINT, Config, resolve
from ssd.data import (
    ARRAYS,
    SOURCES,
    Dataset,
    Task,
    cumulated,
    default_root,
    from_arrays,
    load,
    to_tensor,
)
from ssd.errors import UserError
from ssd.learner import Learner
from ssd.models import Network
from ssd.progress import Display, watcher
from ssd.runs import RunOptions, make_learner, make_tasks, run_together
from ssd.storage.run_folder import CHECKPOINT, read_frequency, read_records
from ssd.tables import plus_minus, rich_table
from ssd.trainer import Event, Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MEASURES = ("mean_accuracy", "bwt", "forgetting")


@dataclass(frozen=True, repr=False)
class Result:
    """What the runs of one experiment measured, S of them with different seeds.

    Args:
        config: the settings of the first run.
        summaries: of each run, as in summary.json.
        records: of each run, one per epoch, as in metrics.jsonl.
        frequency: [S, T, R], each neuron's activation frequency after each task.
        network: the class of a network of the caller's own, else empty.
    """

    config: Config
    summaries: list[dict[str, Any]]
    records: list[list[dict[str, Any]]]
    frequency: np.ndarray
    network: str = ""

    @property
    def name(self) -> str:
        """The method, or what is trained without one."""
        alone = self.network if not self.config.parts else ""
        return alone or self.config.method

    @property
    def accuracies(self) -> np.ndarray:
        """[S, T, T]: accuracy after training task t, on task i."""
        return np.array([summary["accuracy_matrix"] for summary in self.summaries])

    @property
    def accuracy(self) -> np.ndarray:
        """The accuracy matrix [T, T], the mean of the runs."""
        return self.accuracies.mean(0)

    @property
    def mean_accuracy(self) -> float:
        """Accuracy on all tasks after the last one, the mean of the runs."""
        return mean(self._values("mean_accuracy"))

    @property
    def bwt(self) -> float:
        """Backward transfer, the mean of the runs."""
        return mean(self._values("bwt"))

    @property
    def forgetting(self) -> float:
        """How far the accuracy on a task fell from its best, the mean of the runs."""
        return mean(self._values("forgetting"))

    def _values(self, measure: str) -> list[float]:
        return [summary[measure] for summary in self.summaries]

    def table(self) -> Table:
        """Each measure with its standard deviation over the seeds, for a terminal or notebook."""
        return rich_table(self._title, ["measure", "value"], self._rows())

    def plot(self, axes: Axes | None = None, **style: Any) -> Axes:
        """Draws the accuracy on the tasks so far, with its standard deviation over the seeds.

        Args:
            axes: to draw on, so that several results can share them; None: new ones.
            style: of the line, see matplotlib's plot.
        """
        from ssd.figures import integer_ticks

        if axes is None:
            from matplotlib import pyplot as plt

            axes = plt.subplots()[1]
        tasks = np.arange(1, self.config.tasks + 1)
        so_far = np.array([[run[t - 1, :t].mean() for t in tasks] for run in self.accuracies])
        center, spread = so_far.mean(0), so_far.std(0, ddof=min(1, len(so_far) - 1))
        (line,) = axes.plot(tasks, center, **{"marker": "o", "label": self.name, **style})
        axes.fill_between(
            tasks, center - spread, center + spread, color=line.get_color(), alpha=0.2
        )
        axes.set(xlabel="tasks trained", ylabel="accuracy on them", ylim=(0, 1))
        integer_ticks(axes.xaxis)
        axes.legend()
        return axes

    def frame(self) -> DataFrame:
        """A row for each run and each pair of tasks: seed, after_task, on_task, accuracy.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        runs, after, on = (index.ravel() for index in np.indices(self.accuracies.shape))
        seeds = np.array([summary["seed"] for summary in self.summaries])
        return pandas.DataFrame(
            {
                "seed": seeds[runs],
                "after_task": after,
                "on_task": on,
                "accuracy": self.accuracies.ravel(),
            }
        )

    @property
    def _title(self) -> str:
        count = len(self.summaries)
        runs = f", {count} seeds" if count > 1 else ""
        return f"{self.name} on {self.summaries[0]['dataset']}{runs}"

    def _rows(self) -> list[tuple[str, str]]:
        found = []
        for measure in MEASURES:
            values = self._values(measure)
            error = stdev(values) if len(values) > 1 else None
            found.append((measure.replace("_", " "), plus_minus(mean(values), error)))
        return found

    def __repr__(self) -> str:
        return f"<{self._title}: " + ", ".join(" ".join(row) for row in self._rows()) + ">"

    def _repr_html_(self) -> str:
        matrix = "".join(
            "<tr>" + f"<th>{t}</th>" + "".join(f"<td>{value:.3f}</td>" for value in row) + "</tr>"
            for t, row in enumerate(self.accuracy)
        )
        heads = "".join(f"<th>{i}</th>" for i in range(self.config.tasks))
        measures = "; ".join(" ".join(row) for row in self._rows())
        return (
            f"<p><b>{html.escape(self._title)}</b>: {measures}</p>"
            f"<table><caption>accuracy after each task (rows) on each task</caption>"
            f"<tr><th></th>{heads}</tr>{matrix}</table>"
        )


def run(
    data: str | Path | Dataset | Sequence[Any] | Mapping[str, Any] | None = None,
    method: str = "ssd",
    *,
    seeds: int = 1,
    tasks: int | Sequence[Any] | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    callbacks: Sequence[Callable[[Trainer, Event], None]] = (),
    out: str | Path | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
    quiet: bool | None = None,
    **settings: Any,
) -> Result:
    """Trains a continual learner once for each seed, all side by side.

    Args:
        data: the name of a data set, a feature file, or the arrays x_train [N, d], y_train [N],
            x_test and y_test, numpy or torch. None: "mnist", or what `tasks` holds.
        method: parts joined by "+", see ssd.config.Config.
        seeds: number of runs; their seeds are `seed`, `seed` + 1, ..
        tasks: into how many tasks the classes are split; or the tasks themselves, each as four
            such arrays or as a pair of torch data sets (training, test) of samples (x, label).
            Labels are 0..C-1 over all tasks.
        model: a network of your own, x [B, d] -> logits [B, C], or a function that returns a new
            one for each run. An ssd.models.Network says which layer is recorded; of another module
            it is the first Top-K layer. Its lr is 0.05 unless given, and ssd protects no weights
            if the layer has none.
        callbacks: each is called with the trainer and an Event after every step, epoch and task. A
            context manager, as those of ssd.callbacks are, is left when the training ends.
        out: folder that keeps the runs, one folder a seed; the same call goes on in it after an
            interruption. None: nothing is kept.
        device: "cpu" or "cuda"; None: CUDA if there is a GPU.
        data_root: folder of the data sets; None: SSD_DATA, or ./data.
        quiet: whether to show no progress; None: unless stdout is a terminal.
        settings: preset, and any of ssd.config.Config.

    Raises:
        TypeError: an unknown setting.
        UserError: data or settings that do not fit, or a folder of other runs.
        Diverged: numbers of a run are not finite.
    """
    known = {f.name for f in fields(Config)} - {"dataset", "features", "method", "tasks"}
    if strange := sorted(set(settings) - known - {"preset"}):
        raise TypeError(f"ssd.run has no setting {strange[0]!r}")
    check_seeds(seeds)
    place = choose_device(device)
    stream: Sequence[Task] | None = None
    given: dict[str, Any] = {**settings, "method": method}
    if tasks is None or isinstance(tasks, int):
        found, named = _dataset("mnist" if data is None else data, data_root)
        given |= named if tasks is None else {**named, "tasks": tasks}
    elif data is not None:
        raise UserError("data and a stream of tasks exclude each other; leave one of them out")
    else:
        found, stream = _stream(tasks)
        given |= {"dataset": found.name, "tasks": len(stream)}
    build, network = None if model is None else _builder(model), ""
    if build is not None:
        built = build()
        network = type(built.module if isinstance(built, Wrapped) else built).__name__
        given = {**_settings_of(built, found.x_train[:1]), **given}
    first = resolve(given, len(found.y_train))
    first.validate()
    if stream is not None and first.validation > 0:
        raise UserError("validation needs data, not a stream of tasks; split the tasks yourself")

    def make(config: Config) -> Learner:
        own = make_tasks(config, found) if stream is None else stream
        if stream is not None and JOINT in config.parts:
            own = cumulated(stream)
        if build is None:
            return make_learner(config, own, found.classes, place)
        return Learner(config, [task.to(place) for task in own], build().to(place))

    display = Display(Console(), not sys.stdout.isatty() if quiet is None else quiet)
    watches = [watcher(display), *callbacks]

    def watch(trainer: Trainer, event: Event) -> None:
        for call in watches:
            call(trainer, event)

    configs = [replace(first, seed=seed) for seed in range(first.seed, first.seed + seeds)]
    with ExitStack() as held:
        folder = Path(held.enter_context(TemporaryDirectory()) if out is None else out)
        folders = [folder / f"seed{config.seed}" for config in configs]
        options = RunOptions(place, resume=True, watch=watch)
        held.enter_context(display)
        for call in callbacks:
            if isinstance(call, AbstractContextManager):
                held.enter_context(call)
        summaries = run_together(configs, found, folders, folder / CHECKPOINT, options, make)
        pairs = list(zip(folders, configs, strict=True))
        return Result(
            first,
            summaries,
            [read_records(*pair) for pair in pairs],
            np.stack([read_frequency(*pair) for pair in pairs]),
            network,
        )


def _dataset(data: Any, root: str | Path | None) -> tuple[Dataset, dict[str, Any]]:
    """The data of a run, and the settings that name them."""
    if isinstance(data, str) and data in SOURCES and data != "features":
        found = load(data, Path(root or default_root()), notice=note)
        return found, {"dataset": found.name}
    if isinstance(data, (str, Path)):
        if isinstance(data, str) and not Path(data).exists():
            known = ", ".join(name for name in SOURCES if name != "features")
            raise UserError(f"data {data!r} is neither a file nor one of {known}")
        found = load("features", Path(), Path(data), notice=note)
        return found, {"dataset": found.name, "features": str(data)}
    found = data if isinstance(data, Dataset) else from_arrays(*_four(data, "data"), notice=note)
    return found, {"dataset": found.name}


def _four(arrays: Any, what: str) -> list[Any]:
    """x_train, y_train, x_test and y_test of a sequence, a mapping or a pair of torch data sets."""
    if isinstance(arrays, Mapping) and set(arrays) == set(ARRAYS):
        return [arrays[name] for name in ARRAYS]
    parts = list(arrays) if isinstance(arrays, Sequence) else []
    if len(parts) == 2:
        return [array for part in parts for array in _stacked(part, what)]
    if len(parts) != len(ARRAYS):
        raise UserError(
            f"{what} must hold {', '.join(ARRAYS)}, or a training and a test set of torch, "
            f"not {type(arrays).__name__} of {len(parts)}"
        )
    return parts


def _stacked(samples: Any, what: str) -> tuple[Tensor, Tensor]:
    """The samples (x, label) of a torch data set as tensors [N, ..] and [N]."""
    try:
        pairs = [samples[number] for number in range(len(samples))]
        x = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        return x, torch.tensor([int(label) for _, label in pairs])
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{what}: a set must hold pairs (x, label) of one shape ({error})"
        ) from error


def _stream(tasks: Sequence[Any]) -> tuple[Dataset, list[Task]]:
    """All samples of a stream as one data set, and its tasks."""
    if not isinstance(tasks, Sequence) or not tasks:
        raise UserError(f"tasks must be a number or a list of tasks, not {tasks!r}")
    given = [
        [to_tensor(array) for array in _four(task, f"task {number}")]
        for number, task in enumerate(tasks)
    ]
    try:
        joined = [torch.cat(parts) for parts in zip(*given, strict=True)]
    except RuntimeError as error:
        raise UserError(f"tasks differ in the shape of their samples ({error})") from error
    found = from_arrays(*joined, notice=note)
    pieces = [
        getattr(found, name).split([len(task[i]) for task in given])
        for i, name in enumerate(ARRAYS)
    ]
    labels = pieces[1]
    return found, [
        Task(tuple(labels[number].unique().tolist()), *arrays)
        for number, arrays in enumerate(zip(*pieces, strict=True))
    ]


def _builder(model: nn.Module | Callable[[], nn.Module]) -> Callable[[], Network]:
    """Builds the network of a run: a copy of the module, or what the function returns."""

    def build() -> Network:
        made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        return made if isinstance(made, Network) else Wrapped(made)

    return build


class Wrapped(Network):
    """Any module x [B, d] -> logits [B, C] as a Network, whose first Top-K layer is recorded.

    Args:
        module: with a TopK or TopKLinear.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.layer = next(iter(find_layers(self, None)))

    def respond(self, address: Tensor) -> Tensor:
        return self.module(address)


def _settings_of(network: Network, x: Tensor) -> dict[str, Any]:
    """What a network of one's own is trained with unless it is given; x [1, d]."""
    counts = count_activations(network, [network.layer], network.address(x))[network.layer]
    layer = network.get_submodule(network.layer)
    found: dict[str, Any] = {"neurons": len(counts), "lr": Config.lr}  # the preset's is for SDMLP
    if hasattr(layer, "k"):
        found["k"] = layer.k
    if not hasattr(layer, "weight"):
        found["protection"] = "none"  # it slows the weights of the layer
    return found
