"""Exact, deterministic, trainable k-sparse layers; ssd_kernels.reference is the specification."""

from ssd_kernels import nn, parallel, reference, sae, sae_files
from ssd_kernels.count_active import count_active
from ssd_kernels.linear_inhibit import linear_inhibit
from ssd_kernels.linear_topk import linear_topk
from ssd_kernels.reference import TopKOutput
from ssd_kernels.row_update import row_update
from ssd_kernels.sparse_linear import sparse_linear
from ssd_kernels.topk import topk

__version__ = "0.1.0"

__all__ = [
    "TopKOutput",
    "__version__",
    "count_active",
    "linear_inhibit",
    "linear_topk",
    "nn",
    "parallel",
    "reference",
    "row_update",
    "sae",
    "sae_files",
    "sparse_linear",
    "topk",
]
