"""Measures a training step of Top-K autoencoders beside four libraries that are installed.

    python benchmarks/sae_bench.py [--quick] [--budget SECONDS]

A step is forward, losses, backward, the decoder's gradient without its parallel part, and unit
rows; "Adam alone" is the optimizer's, the same for all. `saved` is what autograd keeps for the
backward pass beyond parameters and inputs. FVU is that of other samples after training on the same
batches from the same weights.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.progress import track
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks import bench, sae_peers, sae_targets
from benchmarks.report import table
from benchmarks.sae_peers import Build, Peer
from benchmarks.timing import Quantiles, alternate, peak_extra_bytes, quantiles
from ssd.cli import exit_status
from ssd_kernels.sae import TopKSAE, fvu
from ssd_kernels.sparse_linear import sparse_linear

LR = 1e-3
POOL = 16  # batches that training draws from


@dataclass(frozen=True)
class Case:
    """A shape: batch, width, neurons, k, and how many neurons are dead."""

    B: int
    d: int
    R: int
    k: int
    dtype: torch.dtype = torch.float32
    dead: int = 0
    steps: int = 0  # of training; 0: the step is timed

    @property
    def shape(self) -> dict[str, int]:
        sizes = {"B": self.B, "d": self.d, "R": self.R, "k": self.k}
        extra = {"dead": self.dead, "steps": self.steps}
        return sizes | {name: size for name, size in extra.items() if size}


QUICK = [Case(64, 16, 128, 4), Case(64, 16, 128, 4, dead=64), Case(64, 16, 128, 4, steps=20)]
CPU = [
    *(Case(1024, d, R, 32) for R in (4096, 16_384) for d in (256, 768)),
    Case(1024, 256, 4096, 32, dead=2048),
    Case(1024, 256, 16_384, 32, dead=8192),
    Case(256, 128, 4096, 32, steps=200),
]
CUDA = [
    Case(*sizes, 32, dtype, dead)
    for dtype in (torch.bfloat16, torch.float32)
    for sizes in ((8192, 1024, 65_536), (8192, 768, 16_384), (1024, 256, 4096))
    for dead in (0, sizes[-1] // 2)
] + [Case(8192, 768, 16_384, 32, steps=500)]


def samples(case: Case, count: int, device: torch.device) -> Tensor:
    """[count, d]: sums of k of 2 d random features, and noise."""
    source = torch.Generator().manual_seed(0)
    features = torch.randn(2 * case.d, case.d, generator=source)
    features /= features.norm(dim=1, keepdim=True)
    which = torch.randint(len(features), (count, case.k), generator=source)
    amounts = torch.rand(count, case.k, generator=source)
    x = sparse_linear(amounts, which, features)
    x += 0.02 * torch.randn(count, case.d, generator=source)
    return x.to(device, case.dtype)


def autoencoder(op: str, case: Case, device: torch.device, dead: Tensor | None) -> TopKSAE:
    """The weights that all begin with."""
    torch.manual_seed(0)
    kind = sae_peers.CLASSES[op]
    sae = kind(case.d, case.R, case.k, device=device, dtype=case.dtype)
    if dead is not None:
        with torch.no_grad():
            sae.encoder.bias[dead] = -10.0  # so that they stay dead
    return sae


def wrong(build: Build, sae: TopKSAE, x: Tensor) -> str:
    """How a library's autoencoder differs from ours with the same weights; empty if it does not."""
    sae = deepcopy(sae)
    with torch.no_grad():
        sae.encoder.bias.normal_(std=0.1)
        sae.decoder.bias.normal_(std=0.1)
    theirs = build(sae, len(x), None)
    if not theirs.biased:
        with torch.no_grad():
            sae.decoder.bias.zero_()
    mine = sae_peers.ours(sae, len(x), None)
    coarse = theirs.rounded or x.dtype != torch.float32
    with torch.no_grad():
        found, expected = (fvu(peer.reconstruct(x), x).item() for peer in (theirs, mine))
    if not abs(found - expected) <= (2e-2 if coarse else 1e-4) * expected:
        return f"its FVU is {found:.6f}, ours {expected:.6f}"
    for peer in (theirs, mine):
        peer.gradients(x)
    pair = [peer.encoder_gradient().double().flatten() for peer in (theirs, mine)]
    cosine = torch.nn.functional.cosine_similarity(*pair, dim=0).item()
    if not cosine >= (0.98 if coarse else 0.9999):
        return f"the gradient of its encoder has a cosine of {cosine:.5f} with ours"
    return ""


def saved_bytes(peer: Peer, x: Tensor) -> int:
    """What the forward pass keeps for backward, beyond parameters, buffers and x."""
    there = [x, *peer.model.parameters(), *peer.model.buffers()]
    given = {t.untyped_storage().data_ptr() for t in there}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        parts = [tensor]
        if tensor.is_sparse:
            parts = [tensor._indices(), tensor._values()]
        for part in parts:
            storage = part.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = peer.loss(x)
    del loss
    return sum(kept.values())


def adam(peer: Peer) -> torch.optim.Optimizer:
    return torch.optim.Adam(peer.model.parameters(), lr=LR)


def trained(peer: Peer, pool: Tensor, case: Case) -> float:
    """FVU of samples that were not trained on."""
    optimizer, order = adam(peer), torch.Generator().manual_seed(1)
    train, test = pool[case.B :], pool[: case.B]
    for _ in range(case.steps):
        batch = torch.randint(len(train), (case.B,), generator=order)
        peer.gradients(train[batch.to(train.device)])
        optimizer.step()
        optimizer.zero_grad()
        peer.constrain()
    with torch.no_grad():
        return fvu(peer.reconstruct(test), test).item()


class Autoencoders:
    """Measures cases until they are done or the time budget is spent."""

    def __init__(self, run: bench.Bench) -> None:
        self.bench, self.device, self.quick = run, run.device, run.options.quick
        self.say = run.console.print
        self.wrong = 0  # cases in which ours raises
        self.cut = 0

    def measure_all(self, cases: Sequence[Case], budget: float) -> None:
        deadline, said = time.monotonic() + budget, set()
        for case in track(cases, "autoencoders"):
            for op in sae_peers.CLASSES:
                if time.monotonic() > deadline:
                    self.say(f"[red]not measured, the time budget is spent:[/red] {op} {case}")
                    self.cut += 1
                    continue
                found, missing = sae_peers.builders(op, dead=case.dead > 0)
                for line in missing:
                    if line not in said:
                        self.say(line)
                    said.add(line)
                self.measure(op, case, found)
                if self.bench.cuda:
                    torch.cuda.empty_cache()

    def measure(self, op: str, case: Case, found: dict[str, Build]) -> None:
        """Checks every library, then times those that compute what ours does, in turns."""
        dead = None
        if case.dead:
            dead = torch.arange(case.R, device=self.device) < case.dead
        sae = autoencoder(op, case, self.device, dead)
        pool = samples(case, case.B * (POOL + 1 if case.steps else 1), self.device)
        x = pool[: case.B]
        peers: dict[str, Peer] = {}
        for name, build in found.items():
            try:
                if name != "ours" and (why := wrong(build, sae, x)):
                    self._reject(op, case, name, why)
                    continue
                peers[name] = build(sae, case.B, dead)
                if case.steps:
                    figure = quantiles([trained(peers.pop(name), pool, case)])
                    self._write(op, case, name, "FVU", figure, "")
                    continue
                peers[name].step(x)
                saved = quantiles([saved_bytes(peers[name], x) / 2**20])
                self._write(op, case, name, "saved", saved, "MiB")
                peak = peak_extra_bytes(lambda: peers[name].step(x), self.device)  # noqa: B023
                if peak is not None:
                    self._write(op, case, name, "memory", quantiles([peak / 2**20]), "MiB")
            except Exception as error:  # a library that raises must not end the run
                peers.pop(name, None)
                text = next(iter(str(error).splitlines()), "")
                self._reject(op, case, name, f"raised {type(error).__name__}: {text}")
        if case.steps:
            return
        runs = {name: (lambda peer=peer: peer.step(x)) for name, peer in peers.items()}
        if "ours" in found and not case.dead:
            alone = sae_peers.ours(sae, case.B, None)
            alone.gradients(x)
            runs[sae_targets.OPTIMIZER] = adam(alone).step
        times, errors = alternate(runs, 0.01 if self.quick else 0.5, self.device)
        for name, error in errors.items():
            self._reject(op, case, name, f"raised {type(error).__name__}: {error}")
        for name, taken in times.items():
            self._write(op, case, name, "time", taken, "ms")

    def _write(
        self, op: str, case: Case, provider: str, metric: str, figure: Quantiles | None, unit: str
    ) -> None:
        dtype = str(case.dtype).removeprefix("torch.")
        mode = "train" if case.steps else "step"
        self.bench.write((op, provider, mode, dtype, case.shape), metric, figure, unit)

    def _reject(self, op: str, case: Case, name: str, why: str) -> None:
        """Says why a library gets no time, in its row too."""
        self.say(f"[red]{op} {case.shape}: {name} is not timed:[/red] {escape(why)}")
        self.wrong += name == "ours"
        self._write(op, case, name, "time", None, "ms")


def show(run: bench.Bench) -> None:
    """All figures, and the targets."""
    rows = run.writer.rows
    run.console.print(table(run.title, sae_targets.COLUMNS, sae_targets.lines(rows)))
    judged = sae_targets.verdicts(rows)
    run.console.print(table("targets", ("target", "measured", ""), judged))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = bench.parser(__doc__, "tiny shapes, seconds")
    parser.add_argument("--budget", type=float, default=280, help="seconds; begins no case after")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with bench.running("sae_bench", options) as run:
        measured = Autoencoders(run)
        cases = QUICK if options.quick else CUDA if run.cuda else CPU
        try:
            measured.measure_all(cases, options.budget)
        finally:
            show(run)
    run.console.print(f"left out for lack of time: {measured.cut}; ours raised: {measured.wrong}")
    return 1 if measured.wrong else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
