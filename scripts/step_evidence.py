"""One captured SSD step on the GPU beside the CPU's, in each form that its hidden layer has.

    python scripts/step_evidence.py [--profile]

Prints how far the weights end from the CPU's, beyond rounding and relative to how far the step
moved them, the time of a replay, and with --profile its kernels. Exit status: phases that failed.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from benchmarks.step_cases import EXCITED, INHIBITED, LATE, Problem, make_trainer
from benchmarks.timing import alternate
from ssd.cli import ArgumentParser, exit_status
from ssd.learner import Learner, build_model
from ssd.trainer import Trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALLOWED = 1e-3  # of the step's length
LONGER = 100  # the step that is compared, or the rounding of the weights would hide it
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
        print(f"step {phase} ({path}): {verdict}, off by {error:.2g} of the step, "
              f"{1e3 * milliseconds:.1f} us a replay", flush=True)  # fmt: skip
    print(f"{DEVICE}: {failed} phases failed")
    return failed


def _step(phase: str, profile: bool) -> tuple[str, float, float]:
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
    if profile:
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
    """The same trainer on the device, with its steps as whole epochs there."""
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


def _profile(run: object) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU]
    with profile(activities=activities) as seen:
        for _ in range(REPLAYS):
            run()  # type: ignore[operator]
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    rows = [e for e in seen.key_averages() if DEVICE.type != "cuda" or e.self_device_time_total > 0]
    rows.sort(key=lambda e: -e.self_device_time_total)
    kernels = sum(e.count for e in rows) / REPLAYS
    total = sum(e.self_device_time_total for e in rows) / REPLAYS
    print(f"  {kernels:.0f} kernels a replay, {total:.1f} us in them")
    for e in rows[:40]:
        each = e.self_device_time_total / REPLAYS
        print(f"  {each:8.2f} us  {e.count / REPLAYS:4.1f} x  {e.key[:90]}")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:]), place=""))
