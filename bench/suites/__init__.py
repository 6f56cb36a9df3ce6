"""The suites by name: each a module here, with `stages(run)`, imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

SUITES = {
    "norm": "the weight norm: what one refresh costs, in every form",
    "compose": "the kernels beside the base product: compose, product and compose, scale_reduce",
    "layer": "one layer in training: forward, forward and backward, optimizer steps",
    "decode": "one layer in evaluation, a few tokens at a time",
    "memory": "peak memory of one layer in training; nothing is timed",
    "host": "a tiny layer: what is timed is Python and launches",
    "model": "SmolLM2-135M: training steps, generated tokens, peak memory",
    "block": "a decoder block of a Llama's shape, with and without checkpointing",
    "fidelity": "errors of the output and every gradient beside PEFT's; nothing is timed",
    "finetune": "learning curves of SmolLM2-135M from several seeds (half an hour on two cores)",
    "classify": "an encoder on a classification task at several ranks (half an hour on two cores)",
}
DEFAULT = ("norm", "compose", "layer", "decode", "memory", "host", "model")


def load(name: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(f"bench.suites.{name}")
