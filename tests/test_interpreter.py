"""Runs the tests of the kernels once more in Triton's interpreter, on CPU tensors.

TRITON_INTERPRET must be set before Triton is imported, so this starts a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_kernels import _dispatch

ROOT = Path(__file__).parents[1]


# Two processes of about the same length, so that two cores share them.
FIRST = (
    "test_linear_topk.py",
    "test_linear_inhibit.py",
    "test_library.py",
    "test_citizens.py",
    "test_cuda_graph.py",
)


@pytest.mark.skipif(not _dispatch.TRITON, reason="Triton is not installed")
@pytest.mark.skipif(_dispatch.interpreted(), reason="this process is the interpreter's already")
@pytest.mark.parametrize("half", ["first", "second"])
def test_triton_kernels_in_the_interpreter(half: str) -> None:
    every = [
        *sorted((ROOT / "tests/kernels").glob("test_*.py")),
        *sorted((ROOT / "tests/ssd/ops").glob("test_*.py")),
        ROOT / "tests/ssd/test_cuda_graph.py",
    ]
    assert {path.name for path in every} >= {*FIRST}
    files = [str(path) for path in every if (path.name in FIRST) == (half == "first")]
    # "triton" is in the id of every test that runs a kernel; CUDA must not be found.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "triton", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None, run.stdout
    assert int(passed[1]) > 0, run.stdout
