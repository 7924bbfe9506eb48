"""What the documents show runs; the links, commands, options and files that they name exist."""

import csv
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest

from ssd.__main__ import COMMANDS
from ssd.data import load

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "results/peers/README.md",
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
GENERATED = re.compile(r"<!-- (medians|targets) .*?<!-- /\1 .*?-->", re.DOTALL)
ELSEWHERE = {  # where their examples run
    "CONTRIBUTING.md": "tests/test_contributing.py",
    "docs/parallel.md": "tests/kernels/test_parallel.py",
}
EXAMPLES = {
    f"{name} {number}": example
    for name, text in TEXTS.items()
    if name not in ELSEWHERE
    for number, example in enumerate(code for kind, code in FENCE.findall(text) if kind == "python")
}
# Named with the commit that has them.
GONE = {"benchmarks/trials/cpu_loops.py", "benchmarks/trials/encoder_pipeline.py"}

every_document = pytest.mark.parametrize("name", TEXTS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if "TensorBoard" in EXAMPLES[name]:
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert len(EXAMPLES[name].splitlines()) <= 25
    exec(compile(EXAMPLES[name], name, "exec"), {})
    for features in tmp_path.glob("*.npz"):
        assert load("features", tmp_path, features, strict=True).classes == 10


def test_examples_are_found() -> None:
    once = "README", "docs/cluster", "docs/kernels", "docs/own-data", "docs/own-network"
    blocks = dict.fromkeys(once, 1)
    blocks |= {"docs/autoencoders": 2, "docs/getting-started": 2, "docs/continual-learning": 3}
    expected = {f"{page}.md {number}" for page, count in blocks.items() for number in range(count)}
    assert set(EXAMPLES) == expected


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Of the headings, as mkdocs and forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(name: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(TEXTS[name])):
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@every_document
def test_named_files_exist(name: str) -> None:
    paths = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|csv|json|png|toml|txt))`", prose(TEXTS[name]))
    assert [path for path in paths if not (ROOT / path).exists() and path not in GONE] == []


@every_document
def test_lines_are_at_most_100_characters_long(name: str) -> None:
    text = GENERATED.sub("", TEXTS[name])
    long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert [line for line in long if "](" not in line] == []


def commands(text: str) -> Iterator[list[str]]:
    """Whatever of the text is a command, in words, without variables of the environment."""
    shown = [
        line for kind, code in FENCE.findall(text) if kind == "sh" for line in code.split("\n")
    ]
    inline = [
        span
        for span in re.findall(r"`([^`\n]+)`", prose(text))
        if re.match(r"(?:[A-Z_]+=\S+ )?(?:python|pytest|pip|mkdocs|ssd|scripts/\S+\.sh) ", span)
    ]
    for line in [*shown, *inline]:
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words


@cache
def help_of(module: str) -> str:
    """What a command of ssd prints for --help."""
    name = f"{module}.__main__" if find_spec(module).submodule_search_locations else module
    with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
        import_module(name).main(["--help"])
    return shown.getvalue()


def source_of(words: list[str]) -> tuple[str, list[str]]:
    """The text that names the options of a command, and the words that follow its name."""
    match words:
        case ["ssd", name, *rest]:
            assert name in COMMANDS
            return help_of(f"ssd.{name}"), rest
        case ["python", "-m", "pytest", *rest] | ["pytest", *rest]:
            options = "--benchmark-enable"  # of a plugin
            return (ROOT / "pyproject.toml").read_text(encoding="utf-8") + options, rest
        case ["python", "-m", "build" | "twine", *rest]:
            return "--strict --repository", rest
        case ["python", "-m", name, *rest] if name.startswith("ssd."):
            return help_of(name), rest
        case ["python", "-m", name, *rest]:
            return (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"), rest
        case ["torchrun", "--nproc-per-node", _, file, *rest]:
            return (ROOT / file).read_text(encoding="utf-8"), rest
        case ["pip", *rest]:
            return (ROOT / "setup.py").read_text(encoding="utf-8") + " --no-deps", rest
        case ["mkdocs", "build" | "serve", *rest]:
            return "--strict", rest
        case ["python" | "bash", file, *rest] | [file, *rest]:
            return (ROOT / file).read_text(encoding="utf-8"), rest
    raise AssertionError(words)


@every_document
def test_commands_are_real(name: str) -> None:
    for words in commands(TEXTS[name]):
        if "COMMAND" in " ".join(words[:3]):  # stands for any of them
            continue
        source, rest = source_of(words)
        for word in rest:
            if word.startswith("--"):
                assert word in source, words
            elif extra := re.fullmatch(r"\.\[(\w+)\]", word):
                assert f'"{extra[1]}": ' in source, words
        if "-m" in rest:  # a marker of pytest
            assert f'"{rest[rest.index("-m") + 1]}: ' in source, words
        if words[0].endswith(".sh"):
            assert re.search(rf"^{rest[0]}[()]", source, re.MULTILINE), words


def test_commands_are_found() -> None:
    found = {" ".join(words) for text in TEXTS.values() for words in commands(text)}
    assert {
        "python -m ssd.train --dataset mnist",
        "python -m pytest",
        "pip install .[test]",
        "python benchmarks/train_bench.py --quick",
        "scripts/gpu_evidence.sh first",
        "ssd sweep FILE.toml",
    } <= found
    tests = re.search(r'pip install "\.\[test\]".*', TEXTS["README.md"])  # as .ci/run finds it
    assert tests is not None
    assert tests[0] == 'pip install ".[test]" && python -m pytest'


def test_installation_table_holds_the_figures_of_its_file() -> None:
    with open(ROOT / "benchmarks/results/cpu/install.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = re.findall(
        r"\| (\d+ \| [\d,]+ \| \d+) \|$", TEXTS["docs/getting-started.md"], re.MULTILINE
    )
    written = [
        f"{row['packages']} | {float(row['MB']):,.0f} | {float(row['seconds']):.0f}" for row in rows
    ]
    assert len(shown) == 4
    assert set(shown) < set(written)
