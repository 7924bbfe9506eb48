"""Files of runs: written whole, read with care, locked, and where their numbers come from."""
