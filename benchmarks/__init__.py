"""Benchmarks of this repository; not part of the installed packages."""
