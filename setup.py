"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CPU = ["numba>=0.60"]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100"]

setup(
    name="ssd-kernels",
    version="0.1.0",
    description="Exact k-sparse layers as Triton kernels, and Selective Subnetwork Distillation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["ssd", "ssd.*", "ssd_kernels"]),
    package_data={"ssd": ["py.typed"], "ssd_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "torchvision>=0.21",
        "numpy>=1.26",
        "rich>=13",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "mlxtend>=0.23",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "cpu": CPU,
        "test": TEST,
        "dev": [*TEST, *CPU, "ruff>=0.9", "mypy>=1.11", "pre-commit>=3"],
    },
)
