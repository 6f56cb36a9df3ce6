"""Track who may have written the parameters: optimizers seen to step, and backwards that produced gradients for them.

Read the counters as attributes of this module: imported names do not change.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

steps = 0
"""Counts the start and the end of every optimizer step: an interrupted step may have written too."""

backwards = 0
"""Backwards that produced gradients for W, A or B; afterwards an unseen optimizer may change them."""

_watching = False


def note_backward(of_norm: bool) -> None:
    """Count a backward if it produced a gradient of W, A or B."""
    global backwards
    backwards += of_norm


def watch_optimizers() -> None:
    """Register the hooks that count optimizer steps: on first use, not at import."""
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
    """A live optimizer that was seen to step. `captured`: in a CUDA graph's capture, whose replays run no Python."""

    def __init__(self, optimizer: weakref.ref[torch.optim.Optimizer], captured: bool) -> None:
        self.optimizer, self.captured = optimizer, captured
        self._lists: list[tuple[list[Tensor], int]] = []
        self._ids: frozenset[int] = frozenset()

    def owns(self, parameter: Tensor) -> bool:
        """True if the parameter is in the optimizer's current parameter groups."""
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

PARAMETER = "_dora_kernels_parameter"
"""Attribute of a process's part of a split parameter: that parameter, which the optimizer owns."""


def owned(*tensors: Tensor) -> bool | None:
    """True if only optimizers whose steps are seen write those that train; None if some have no optimizer yet.

    With FSDP2 the optimizer owns the sharded parameter, not the one gathered from it for a call. In a distributed
    process a parameter without an owner may be gathered again at the same address, so the answer is then False.
    """
    parameters = [getattr(t, PARAMETER, t) for t in tensors]
    owners = [[one for one in list(_stepped.values()) if one.owns(p)] for p in parameters if p.requires_grad]
    if any(owner.captured for each in owners for owner in each):
        return False
    if all(owners):
        return True
    return False if torch.distributed.is_available() and torch.distributed.is_initialized() else None
