"""Learners without gradients that see each task once, in order."""
