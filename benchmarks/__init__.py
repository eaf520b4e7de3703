"""Measurements, each a command: ``python -m benchmarks.pruner_speed --help``."""
