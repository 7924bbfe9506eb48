"""Selective Subnetwork Distillation: continual learning with k-sparse networks."""

import os

# How long an OpenMP thread spins for work before it sleeps; by default for milliseconds. Next to
# another busy process spinning threads hold the cores that working ones need: two runs at once on
# two cores took 3.5 times one. Torch reads it when it is imported; what the user set stands.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
