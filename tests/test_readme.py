"""The README's examples run as they stand, and its commands are the ones that exist."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == 2
    assert len(EXAMPLES[number].splitlines()) <= 20
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})


def test_commands_name_modules_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    assert "python -m ssd.train --dataset mnist" in text
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (README.parent / path).exists(), path
