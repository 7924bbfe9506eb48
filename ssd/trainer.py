"""The task loop for one or several learners side by side; resumable at every step.

Learners agree in all settings but OWN. Each has its own weights, stream and order of samples, and
takes its own steps. On CUDA they share launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssd.config import PENALTIES, Config, option, penalty_settings
from ssd.cuda_graph import GraphedEpochs
from ssd.errors import Diverged, fitting
from ssd.learner import Learner, Stack, part
from ssd.metrics import finite
from ssd.step import plain_step, step

# Settings in which learners that are trained together may differ.
OWN = (
    *("seed", "order_seed", "weight_seed"),
    *("alpha", "lam", "temperature", "hidden_weight", "lr", "max_norm", "anneal_samples"),
    *penalty_settings(*PENALTIES),
)


def together(config: Config) -> tuple[Any, ...]:
    """Learners whose configs agree in this can be trained side by side."""
    return tuple(value for name, value in config.to_dict().items() if name not in OWN)


@dataclass(frozen=True)
class Event:
    """What has just ended: a "step", an "epoch" or a "task", numbered from 0."""

    kind: str
    task: int
    epoch: int
    step: int
    records: Sequence[Mapping[str, Any]] = ()  # of an epoch, one per learner


class Trainer:
    """Trains learners side by side on their streams of tasks.

    Args:
        learners: at least one; their configs agree in `together` and their networks in shape.
        graphs: whether epochs run on the device, see cuda_graph; None: on CUDA if possible.
    """

    def __init__(self, learners: Sequence[Learner], graphs: bool | None = None) -> None:
        self.learners = list(learners)
        self.config = self.learners[0].config
        if any(together(learner.config) != together(self.config) for learner in self.learners):
            raise ValueError(f"Trainer: learners may differ in {', '.join(OWN)} alone")
        self.device = self.learners[0].device
        self.task = self.epoch = self.position = self.steps = 0
        self._loaded = -1
        if graphs is None:
            # On a CPU single steps are as fast, and can be interrupted and resumed.
            graphs = self.device.type == "cuda" and GraphedEpochs.serves(self.learners)
        with self._fitting():
            self.graphed = GraphedEpochs(self.learners) if graphs else None
        sparse = all(learner.sparse for learner in self.learners)
        self.stacks = [Stack([learner]) for learner in self.learners] if sparse else []

    def run(self) -> Iterator[Event]:
        """Trains from the present position; at each event the state can be saved.

        Raises:
            Diverged: what was trained is not finite. Checked on a CPU after every step, elsewhere
                after every epoch, and in every state to be saved.
            UserError: the device has too little memory.
        """
        with self._fitting():
            yield from self._run()

    def _fitting(self) -> AbstractContextManager[None]:
        """UserError if the work within does not fit into memory."""
        count = len(self.learners)
        runs = f" of {count} runs side by side" if count > 1 else ""
        return fitting(f"{option('neurons')} {self.config.neurons}{runs}", self.device)

    def _run(self) -> Iterator[Event]:
        config = self.config
        for learner in self.learners:
            if not learner.model.training:  # else frozen submodules stay as they are
                learner.model.train()
        while self.task < len(self.learners[0].tasks):
            if self.epoch == self.position == 0:
                for learner in self.learners:
                    learner.begin_task(self.task)
            self.load_task()
            while self.epoch < config.epochs:
                batches = self.steps_per_epoch()[self.task]
                if self.graphed is not None and self.position == 0:
                    self.graphed.train_epoch(self.task, self.epoch)
                    self.steps, self.position = self.steps + batches, batches
                orders = [learner.order(self.task, self.epoch) for learner in self.learners]
                while self.position < batches:
                    first = self.position * config.batch_size
                    self.step([order[first : first + config.batch_size] for order in orders])
                    self.position += 1
                    if self.device.type == "cpu":  # elsewhere the host would wait for the step
                        for number, learner in enumerate(self.learners):
                            with self._blamed(number):
                                learner.require_finite_loss()
                    yield Event("step", self.task, self.epoch, self.position)
                records = self._end_epoch()
                yield Event("epoch", self.task, self.epoch - 1, batches, records)
            for number, learner in enumerate(self.learners):
                learner.end_task(self.task)
                self._require_finite(number, learner.state())
            self.task, self.epoch = self.task + 1, 0
            yield Event("task", self.task - 1, config.epochs, 0)

    def steps_per_epoch(self) -> list[int]:
        """Per task: the steps of the learner with the most samples."""
        streams = zip(*(learner.tasks for learner in self.learners), strict=True)
        size = self.config.batch_size
        return [-(-max(len(t.y_train) for t in tasks) // size) for tasks in streams]

    def load_task(self) -> None:
        """Readies the task's data and the neurons that are distilled in it."""
        if self._loaded == self.task:
            return
        for learner in self.learners:
            learner.load_task(self.task)
        self._loaded = self.task
        for stack in self.stacks:
            stack.load_task()
        if self.graphed is not None:
            self.graphed.load_task()

    def step(self, samples: Sequence[Tensor]) -> None:
        """One step on the samples [B] of each learner, positions in its task's training set."""
        self.load_task()
        for number, chosen in enumerate(samples):
            if len(chosen) == 0:  # its epoch is over
                continue
            if self.stacks:
                step(self.stacks[number], chosen)
            else:
                plain_step(self.learners[number], chosen)
        self.steps += 1

    def _end_epoch(self) -> list[dict[str, Any]]:
        done = self.epoch + 1
        evaluate = done % self.config.eval_every == 0 or done == self.config.epochs
        records = []
        for number, learner in enumerate(self.learners):
            with self._blamed(number):
                records.append(learner.end_epoch(self.task, evaluate))
        self.epoch, self.position = done, 0
        return records

    @contextmanager
    def _blamed(self, number: int) -> Iterator[None]:
        """Adds to Diverged which learner, where it was and what to change."""
        try:
            yield
        except Diverged as error:
            learner = self.learners[number]
            config = learner.config
            own = [n for n in OWN if len({getattr(e.config, n) for e in self.learners}) > 1]
            named = {n: getattr(config, n) for n in own}
            which = " ".join(f"{option(n)} {v}" for n, v in named.items() if v is not None)
            causes = ["lr", "max_norm"]
            if any(r.active for r in learner.regularizers):
                settings = penalty_settings(*PENALTIES)
                causes += [n for n in settings if n.removesuffix("_coefficient") in config.parts]
            shown = [f"{option(n)} {getattr(config, n):g}" for n in causes]
            where = f"task {min(self.task + 1, config.tasks)}"
            if self.epoch < config.epochs:
                where += f", epoch {self.epoch + 1}, step {self.position}"
            raise Diverged(
                f"{f'the run with {which}' if which else 'training'} diverged: {error} in {where}; "
                f"most likely one of {', '.join(shown)} is too large",
                number,
            ) from error

    def _require_finite(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        with self._blamed(number):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not finite(tensor):
                    raise Diverged(f"{name} is not finite")

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and numbers that load_state needs to go on from here.

        Raises:
            Diverged: a tensor is not finite; nothing could go on from it.
        """
        tensors: dict[str, Tensor] = {}
        for number, learner in enumerate(self.learners):
            own = learner.state()
            self._require_finite(number, own)
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
        return tensors, {n: getattr(self, n) for n in ("task", "epoch", "position", "steps")}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Restores what state() returned; KeyError or RuntimeError for another model."""
        for number, learner in enumerate(self.learners):
            learner.load_state(part(tensors, str(number)))
        for name in ("task", "epoch", "position", "steps"):
            setattr(self, name, int(numbers[name]))
