"""Files of runs: written whole, checked when read, locked, and with their provenance."""
