"""Who may have written the parameters: optimizers that were seen to step, and backwards that made gradients for them.

Counters are read as attributes of this module.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

steps = 0
"""Half-steps of all optimizers; a step that is interrupted half-way has written too."""

backwards = 0
"""Backwards that produced gradients of what a norm depends on: an optimizer nobody has seen may write it afterwards."""

_watching = False


def note_backward(of_norm: bool) -> None:
    """Count a backward, if it produced gradients of what a norm depends on."""
    global backwards
    backwards += of_norm


def watch_optimizers() -> None:
    """Register the hooks that count steps: on first use, not at import."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)


def _before_step(*_: Any) -> None:
    global steps
    steps += 1


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global steps
    steps += 1
    key = id(optimizer)
    known = _stepped.get(key)
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if known is not None and known.optimizer() is optimizer:
        captured = captured or known.captured
    _stepped[key] = _Stepped(weakref.ref(optimizer, functools.partial(_forget, key)), captured)


def _forget(key: int, _: Any) -> None:
    _stepped.pop(key, None)


class _Stepped:
    """A live optimizer that was seen to step, and whether in a graph's capture: a replay runs nothing in Python."""

    def __init__(self, optimizer: weakref.ref[torch.optim.Optimizer], captured: bool) -> None:
        self.optimizer, self.captured = optimizer, captured
        self._lists: list[tuple[list[Tensor], int]] = []
        self._ids: frozenset[int] = frozenset()

    def owns(self, parameter: Tensor) -> bool:
        """True if the parameter is among the optimizer's, as they are now."""
        optimizer = self.optimizer()
        if optimizer is None:
            return False
        lists = [group["params"] for group in optimizer.param_groups]
        if len(lists) != len(self._lists) or any(
            one is not known or len(one) != length for one, (known, length) in zip(lists, self._lists)
        ):
            self._lists = [(one, len(one)) for one in lists]
            self._ids = frozenset(id(parameter) for one in lists for parameter in one)
        return id(parameter) in self._ids


_stepped: dict[int, _Stepped] = {}


def owned(*tensors: Tensor) -> bool | None:
    """True if every write to those that train is an optimizer's step that is seen; None: some have no optimizer yet.

    An optimizer owns the sharded parameter, not the one that is gathered from it for a call (FSDP2): where there are
    other processes, a parameter without an owner may be gathered anew at the same address, and the answer is False.
    """
    owners = [[one for one in list(_stepped.values()) if one.owns(t)] for t in tensors if t.requires_grad]
    if any(owner.captured for each in owners for owner in each):
        return False
    if all(owners):
        return True
    return False if torch.distributed.is_available() and torch.distributed.is_initialized() else None
