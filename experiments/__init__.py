"""Command lines: one module a kind of run, `python -m experiments.NAME`."""
