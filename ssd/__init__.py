"""Selective Subnetwork Distillation: continual learning with k-sparse networks."""
