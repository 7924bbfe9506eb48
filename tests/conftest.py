"""Shared fixtures: nothing here depends on a GPU or on data outside the repository."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
