"""The tables and figures of the paper, from data to files."""
