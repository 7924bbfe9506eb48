"""Times steps and epochs of another checkout in its own process, in turns with ours.

This file as a script is that process: it answers lines of JSON, with the other checkout as
PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

# Seconds until the idle threads of a process stop spinning.
REST = 0.005


class Previous:
    """The process of a checkout. Use as a context manager.

    Args:
        checkout: has benchmarks/step_cases.py with Problem, make_trainer, step_runs, epoch_runs.
    """

    def __init__(self, checkout: Path) -> None:
        own = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            cwd=checkout,
            env={**os.environ, **own},
            encoding="utf-8",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def prepare(self, mode: str, problem: dict[str, int | None], phase: str) -> None:
        """Builds the "step" or "epoch" that sample() times; RuntimeError if that fails."""
        self._ask({"mode": mode, "problem": problem, "phase": phase})

    def sample(self) -> list[float]:
        """Milliseconds of a call, see timing.sample; RuntimeError if it fails."""
        time.sleep(REST)
        taken = self._ask({})
        time.sleep(REST)
        return taken

    def _ask(self, question: dict[str, Any]) -> list[float]:
        with suppress(BrokenPipeError):  # if it has ended there is no answer either
            print(json.dumps(question), file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError("the previous checkout's process has ended")
        taken = json.loads(answer)
        if isinstance(taken, str):
            raise RuntimeError(taken)
        return list(taken)

    def __enter__(self) -> Previous:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.kill()
        self._child.communicate()


def serve() -> None:
    """Answers Previous on standard output; all else is printed on standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    timing = import_module("timing")  # of this file's folder
    del sys.path[0]
    step_cases = import_module("benchmarks.step_cases")  # of the other checkout
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run: Any = None
    answer: list[float] | str
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if not question:
                answer = timing.sample(run, device)
            elif question["phase"] not in vars(step_cases).values():
                answer = f"has no phase {question['phase']!r}"
            else:
                problem = step_cases.Problem(**question["problem"])
                run = None  # frees its memory first
                trainer = step_cases.make_trainer(problem, "ssd", device, phase=question["phase"])
                if question["mode"] == "epoch":
                    runs = step_cases.epoch_runs(trainer)
                else:
                    runs = step_cases.step_runs(trainer, False)
                run, answer = runs["ours"], []
        except (Exception, SystemExit) as error:
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
