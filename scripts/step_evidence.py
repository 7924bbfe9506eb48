"""One captured SSD step on the GPU beside the CPU's, for each form of the hidden layer.

    python scripts/step_evidence.py [--profile]

Prints the error of the weights after the step, relative to its length; the time of a replay; and
with --profile its kernels. Exit status: the number of phases that failed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.step_cases import EXCITED, INHIBITED, LATE, Problem, make_trainer
from benchmarks.timing import Run, alternate
from ssd.cli import ArgumentParser, exit_status
from ssd.learner import Learner, build_model
from ssd.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALLOWED = 1e-3  # of the step's length
LONGER = 100  # times the usual learning rate, or rounding would hide the step
ROUNDING = 1e-7  # of weights that are scaled to unit length
REPLAYS = 20  # under the profiler


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="the kernels of a replay")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    failed = 0
    for phase in (INHIBITED, LATE, EXCITED):
        try:
            path, error, milliseconds = _step(phase, given.profile)
        except Exception:
            print(f"step {phase}: raised\n{traceback.format_exc(limit=-6)}", flush=True)
            failed += 1
            continue
        right = error <= ALLOWED  # NaN is not
        failed += not right
        verdict = "ok" if right else "WRONG"
        said = f"off by {error:.2g} of the step, {1e3 * milliseconds:.1f} us a replay"
        print(f"step {phase} ({path}): {verdict}, {said}", flush=True)
    print(f"{DEVICE}: {failed} phases failed")
    return failed


def _step(phase: str, profiled: bool) -> tuple[str, float, float]:
    """The step's path, the error of the weights after it, and its milliseconds."""
    problem = Problem()
    cpu = make_trainer(problem, "ssd", torch.device("cpu"), phase=phase)
    (learner,) = cpu.learners
    learner.config = replace(learner.config, lr=LONGER * learner.config.lr)
    cpu.stacks[0].lr *= LONGER
    gpu = _copy(cpu, problem)
    before = [p.detach().clone() for p in cpu.learners[0].parameters]
    order = cpu.learners[0].order(cpu.task, cpu.epoch)
    assert gpu.graphed is not None
    (path,) = gpu.graphed._forms()
    run = gpu.graphed.first_step(gpu.task, gpu.epoch)
    run()
    cpu.step([order[: problem.B]])
    error = error_of([p.cpu() for p in gpu.learners[0].parameters], learner.parameters, before)
    times, errors = alternate({"": run}, 1.0, DEVICE)
    if errors:
        raise errors[""]
    if profiled:
        _profile(run)
    return path, error, times[""].p50


def error_of(ours: Sequence[Tensor], theirs: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """The largest error of a parameter beyond rounding over its step; NaN if one is NaN."""
    errors = [
        ((mine - other).norm() - ROUNDING * old.norm()).clamp(min=0) / (other - old).norm()
        for mine, other, old in zip(ours, theirs, before, strict=True)
    ]
    return torch.stack(errors).max().item()


def _copy(trainer: Trainer, problem: Problem) -> Trainer:
    """The same trainer on the device, where graphs run whole epochs."""
    (learner,) = trainer.learners
    tasks = [task.to(DEVICE) for task in learner.tasks]
    model = build_model(learner.config, problem.d, trainer.stacks[0].weights[1].shape[1]).to(DEVICE)
    copy = Trainer([Learner(learner.config, tasks, model)], graphs=True)
    tensors, numbers = trainer.state()
    copy.load_state({name: t.to(DEVICE) for name, t in tensors.items()}, numbers)
    assert copy.graphed is not None
    model.encoder.anneal_samples = learner.model.encoder.anneal_samples
    copy.graphed.anneal_samples.fill_(model.encoder.anneal_samples)
    copy.learners[0].begin_task(copy.task)
    copy.load_task()
    return copy


def _profile(run: Run) -> None:
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(REPLAYS):
            run()
        if cuda:
            torch.cuda.synchronize()
    rows = [row for row in seen.key_averages() if not cuda or row.self_device_time_total > 0]
    rows.sort(key=lambda row: -row.self_device_time_total)
    kernels = sum(row.count for row in rows) / REPLAYS
    total = sum(row.self_device_time_total for row in rows) / REPLAYS
    print(f"  {kernels:.0f} kernels a replay, {total:.1f} us in them")
    for row in rows[:40]:
        taken, count = row.self_device_time_total / REPLAYS, row.count / REPLAYS
        print(f"  {taken:8.2f} us  {count:4.1f} x  {row.key[:90]}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
