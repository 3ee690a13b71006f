"""Measurements; each module is a command, its results are committed under ``results/``."""
