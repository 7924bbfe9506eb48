"""Shared fixtures: nothing here depends on a GPU or on data outside the repository."""

import os
from collections import Counter

# Tests run side by side, a thread each; set before torch is imported, for child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "cuda" if torch.cuda.is_available() and not interpreted else "cpu"


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_interpreter" not in item.nodeid)  # the longest begin first
    if torch.cuda.is_available():
        for item in items:
            if "triton" in item.nodeid.partition("[")[2]:
                item.add_marker("cuda")
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none here")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    interpreter = "on" if os.environ.get("TRITON_INTERPRET") == "1" else "off"
    return f"torch {torch.__version__}, {device}, Triton interpreter {interpreter}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each reason to skip."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
