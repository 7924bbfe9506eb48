"""A network that learns task by task, read out in closed form: a learner of ssd.peers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from ssd.config import Config
from ssd.data import Task
from ssd.errors import UserError
from ssd.learner import Learner, build_model
from ssd.models import SDMLP
from ssd.ops.code_gram import code_gram
from ssd.peers.readout import CHUNK, CodeReadout, Encoder, LearnedCode, ridge_solution
from ssd.trainer import Trainer

# Inputs that are drawn for a map, over all classes.
DRAWN = 10_000


class InputMoments:
    """Class means and one covariance of sqrt(relu(x)): a Gaussian model of the inputs so far.

    Features of a ReLU network are skewed; their roots are less so, which validation prefers.

    Args:
        features: d.
        classes: C.
        seed: of the draws.
        device: of the data.
    """

    def __init__(self, features: int, classes: int, seed: int, device: torch.device) -> None:
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.sums = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds x [N, d] with labels y [N]."""
        roots = x.double().relu().sqrt()
        self.gram.addmm_(roots.T, roots)
        self.sums.index_add_(0, y, roots)
        self.counts += y.bincount(minlength=len(self.counts))

    def draw(self, count: int) -> Tensor:
        """About `count` inputs [.., d] float32, equally many of each class seen."""
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen].unsqueeze(1)
        within = (self.gram - means.T @ self.sums[seen]) / self.counts.sum()
        values, vectors = torch.linalg.eigh(within)
        noise = torch.randn(
            len(means),
            -(-count // len(means)),
            len(within),
            dtype=torch.float64,
            device=within.device,
            generator=self.generator,
        )
        roots = means.unsqueeze(1) + noise @ (vectors * values.clamp(min=0).sqrt()).T
        return roots.relu().square().flatten(0, 1).float()


class TrainedReadout(CodeReadout):
    """An SDMLP trained on a stream, with a closed-form decoder of its code in place of its own.

    The statistics of a task are taken once, after training on it. Later tasks change the code,
    which costs more the more neurons are read. `freeze` stops that change; `follow` moves the
    statistics with it. It draws inputs like those of earlier tasks, see InputMoments. For their
    codes H before training on a task and H' after, the map A = (H^T H + r m I)^-1 (H^T H' + r m I)
    turns the Gram matrix G of earlier tasks into A^T G A and the class sums X into A^T X. That is
    drift compensation by a linear map (Gomez-Villa et al. 2024), but of second moments too, and on
    drawn inputs in place of the newest task's. m is the mean diagonal entry of H^T H.

    Args:
        config: of the network; its method may add distillation or penalties.
        tasks: the stream that fit_task is given, in its order.
        classes: C.
        share: k / R of the code that is read; None: the network's own.
        readout: as of CodeReadout.
        strength: as of CodeReadout.
        freeze: trains the network on the first task alone.
        follow: r above, more than 0; None: the statistics stay as they were taken. Inputs are
            drawn with the seed of config.

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
        follow: float | None = None,
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
        self._frozen, self._freeze, self._ridge = False, freeze, follow
        if follow is not None:
            self._inputs = InputMoments(first.shape[1], classes, config.seed, first.device)

    def fit_task(self, x: Tensor, y: Tensor) -> None:
        """Trains the network on its next task unless frozen, then adds the code's statistics."""
        if not self._frozen:
            before = deepcopy(self.encoder)
            next(event for event in self._events if event.kind == "task")
            if self._ridge is not None:
                if self.counts.any():
                    self._follow(before, self._inputs.draw(DRAWN), self._ridge)
                self._inputs.add(x, y)
        self._frozen = self._freeze
        super().fit_task(x, y)

    def _follow(self, before: Encoder, x: Tensor, ridge: float) -> None:
        """Maps the statistics from the code `before` to the present one, both of x [N, d]."""
        gram, cross = torch.zeros_like(self.gram), torch.zeros_like(self.gram)
        for part in x.split(CHUNK):
            code, after = before(part), self.encoder(part)
            present = after.values.new_zeros(len(part), len(gram))
            present.scatter_add_(1, after.indices, after.values)
            code_gram(code.values, code.indices, gram, cross, present)
        cross.diagonal().add_(ridge * gram.diagonal().mean())
        change = ridge_solution(gram, cross, ridge).to(self.gram.dtype)
        self.gram.copy_(change.T @ self.gram @ change)
        self.cross.copy_(change.T @ self.cross)

    @property
    def fixed(self) -> bool:
        return self._freeze
