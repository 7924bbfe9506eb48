"""Every worked example of CONTRIBUTING.md runs as it stands, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in TEXT.split("\n## ")[1:]
}
WORKED = (
    "A new data set",
    "A new penalty",
    "A new distillation term",
    "Your own network",
    "A new op",
    "A new benchmark op",
)


@pytest.mark.parametrize("section", WORKED)
def test_example_runs(section: str, tmp_path: Path) -> None:
    (example,) = EXAMPLES[section]
    assert len(example.splitlines()) <= 30
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
