"""A network that learns task by task, read out in closed form: a learner of ssd.peers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ssd.config import Config
from ssd.data import Task
from ssd.errors import UserError
from ssd.learner import Learner, build_model
from ssd.models import SDMLP
from ssd.peers.readout import CodeReadout, LearnedCode
from ssd.trainer import Trainer


class TrainedReadout(CodeReadout):
    """An SDMLP trained on a stream, with a closed-form decoder of its code in place of its own.

    The statistics of a task are taken once, after training on it. Later tasks change the code,
    which costs more the more neurons are read; `freeze` stops that change.

    Args:
        config: of the network; its method may add distillation or penalties.
        tasks: the stream that fit_task is given, in its order.
        classes: C.
        share: k / R of the code that is read; None: the network's own.
        readout: as of CodeReadout.
        strength: as of CodeReadout.
        freeze: trains the network on the first task alone.

    Raises:
        UserError: the method's network is no SDMLP.
    """

    def __init__(
        self,
        config: Config,
        tasks: Sequence[Task],
        classes: int,
        share: float | None = None,
        readout: str = "lda",
        strength: float = 1e-3,
        freeze: bool = False,
    ) -> None:
        first = tasks[0].x_train
        model = build_model(config, first.shape[1], classes).to(first.device)
        if not isinstance(model, SDMLP):
            raise UserError(
                f"method {config.method} has no k-sparse code to read; use sdmlp or ssd"
            )
        code = LearnedCode(model, None if share is None else max(1, round(share * config.neurons)))
        super().__init__(code, classes, readout, strength, first.device)
        self._events = Trainer([Learner(config, tasks, model)]).run()
        self._frozen, self._freeze = False, freeze

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Trains the network on its next task unless frozen, then adds the code's statistics."""
        if not self._frozen:
            next(event for event in self._events if event.kind == "task")
        self._frozen = self._freeze
        super().fit_task(x, y)

    @property
    def fixed(self) -> bool:
        return self._freeze
