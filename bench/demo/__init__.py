"""The main job on a real model and real text: `python -m bench.demo --help`."""

LEAST_STEPS = 20
"""The losses are compared over at least this many."""
