"""The examples run as they stand; what it and docs/ name as a command or link exists."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    f"{path.stem} {number}": example
    for path in DOCUMENTS
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    )
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES[name].splitlines()) <= 25
    exec(compile(EXAMPLES[name], name, "exec"), {})


def test_examples_are_found() -> None:
    assert list(EXAMPLES) == ["README 0", "README 1", "kernels 0"]


def commands(text: str) -> tuple[list[str], list[str]]:
    """The modules run by python -m, and the files run by python or by the shell."""
    modules = re.findall(r"python -m ([\w.]+\w)", text)
    return modules, re.findall(r"(?:python |\b(?=scripts/))([\w/]+\.(?:py|sh))\b", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_links_name_what_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    modules, files = commands(text)
    for module in modules:
        spec = find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        if spec.submodule_search_locations:  # a package, which python -m runs by its __main__
            assert find_spec(f"{module}.__main__") is not None, module
        else:
            assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8"), module
    for file in files:
        assert (ROOT / file).is_file(), file
    for path in re.findall(r"\]\(((?!http)[^)#]+)[^)]*\)", text):
        assert (document.parent / path).exists(), path


def test_commands_are_found() -> None:
    found = [commands(path.read_text(encoding="utf-8")) for path in DOCUMENTS]
    assert {"ssd.train", "benchmarks.report"} <= {name for modules, _ in found for name in modules}
    assert {"scripts/gpu_evidence.sh", "benchmarks/train_bench.py"} <= {
        name for _, files in found for name in files
    }
    assert "python -m ssd.train --dataset mnist" in README.read_text(encoding="utf-8")
