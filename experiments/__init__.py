"""Experiments: one file per claim, run as `python -m experiments.NAME`."""
