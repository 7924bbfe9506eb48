"""Selective Subnetwork Distillation: continual learning with k-sparse networks."""

import os

from ssd.interrupt import guard_imports

# How long an OpenMP thread spins for work before it sleeps; by default for milliseconds, in which
# it holds a core that another busy process needs (docs/performance.md has what that costs). OpenMP
# reads it when torch is imported; what the user set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

guard_imports()
