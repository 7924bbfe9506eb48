"""Where numba is not installed PyTorch serves: a run ends where it would, but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssd_kernels import _dispatch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
out, hidden = sys.argv[1:]
if hidden == "hidden":
    sys.modules["numba"] = None  # what an import of a package that is not there does
from dataclasses import replace
import torch
torch.set_num_threads(1)
from ssd.trainer import Trainer
from tests.ssd.test_together import BASE, make_learner
config = replace(BASE, method="ssd", tasks=2, epochs=5, eval_every=5, neurons=600)
(learner,) = Trainer([make_learner(config, torch.float32)]).learners
for _ in Trainer([learner]).run():
    pass
counts = learner.model.encoder.counts
torch.save([learner.accuracy, counts, *(p.detach() for p in learner.model.parameters())], out)
loops = [name for name in ("ssd_kernels._loops", "ssd.ops._loops") if name in sys.modules]
print(*loops, sep=",")
try:
    from ssd_kernels._graded_code import linear_active
    linear_active(torch.rand(2, 3), torch.rand(5, 3), 2, impl="numba")
except ValueError as error:
    print(error)
"""


def trained(out: Path, hidden: str) -> tuple[list[torch.Tensor], str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out), hidden],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert run.returncode == 0, run.stderr
    return torch.load(out), run.stdout


@pytest.mark.skipif(not _dispatch.NUMBA, reason="numba is not installed")
def test_the_torch_path_ends_where_the_loops_do(tmp_path: Path) -> None:
    """All 10 epochs, through the GABA switch, where a rounding rarely changes what fires."""
    looped, said = trained(tmp_path / "looped", "installed")
    assert said.splitlines() == ["ssd_kernels._loops,ssd.ops._loops"]
    plain, said = trained(tmp_path / "plain", "hidden")
    assert said.splitlines()[0] == ""
    assert "linear_active: impl='numba' is not one of reference, torch" in said
    for ours, theirs in zip(looped, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
