"""The suites by name: each has a module here, imported when it is asked for.

A module has `cases(run, suite)`, comparisons for `bench.run.Run.measure`, or `stages(run, suite)`, work of its own by
name.
"""

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
    "experts": "a layer of experts, and a small Qwen3-MoE: training, one token, memory",
    "model": "SmolLM2-135M: training steps, generated tokens, peak memory",
    "block": "a decoder block of a Llama's shape, with and without checkpointing",
    "fidelity": "errors of the output and every gradient beside PEFT's; nothing is timed",
    "finetune": "learning curves of SmolLM2-135M from several seeds (half an hour on two cores)",
    "serve": "many adapters in one batch: the bank, PEFT's mixed batches and the base alone",
    "classify": "an encoder on a classification task at several ranks (half an hour on two cores)",
}
DEFAULT = ("norm", "compose", "layer", "decode", "memory", "host", "model")
LONG = ("fidelity", "finetune", "classify")
"""Suites that may take longer than five minutes."""
_MODULES = {"decode": "layer", "memory": "layer", "host": "layer", "block": "model", "classify": "finetune"}


def load(name: str) -> ModuleType:
    """The module of a suite."""
    return importlib.import_module(f"bench.suites.{_MODULES.get(name, name)}")
