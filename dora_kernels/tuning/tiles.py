"""Measure other tile sizes than the shipped ones, for the kernels that take a layer's time on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dora_kernels.engine import tiles
from dora_kernels.tuning.candidates import Call, Layer
from dora_kernels.tuning.timing import in_turns

_WARPS, _STAGES = (2, 4, 8), (1, 2, 3, 4)
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 256
_LEAST_GAIN = 0.97
"""Other tiles than the shipped ones have to be this much faster."""


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ in one number: a block half or twice as large, other warps or stages."""
    for name, value in config._asdict().items():
        if name == "num_warps":
            others = [warps for warps in _WARPS if warps != value]
        elif name == "num_stages":
            others = [stages for stages in _STAGES if abs(stages - value) == 1]
        else:
            others = [size for size in (value // 2, 2 * value) if min(value, _LEAST_BLOCK) <= size <= _LARGEST_BLOCK]
        for other in others:
            yield config._replace(**{name: other})


def tuned(layer: Layer, tokens: int, seconds: float, note: Callable[[str, dict[str, float]], object]) -> dict[str, Any]:
    """Return the tiles that are faster than the shipped ones for a layer, by question.

    Args:
        note: called with each question and the times of all its candidates.
    """
    calls = {
        "compose_config": layer.calls(["fused"], tokens, False)["fused"],
        "scale_reduce_config": layer.calls(["fused"], tokens, True)["fused"],
        "norm_config": layer.refreshes(["fused"])["fused"],
    }
    found = {}
    for function, call in calls.items():
        asked: dict[str, Any] = {}
        with tiles.replaced({}, asked.__setitem__):
            wanted = _tensors(call())
        questions = {key: config for key, config in asked.items() if key.startswith(function)}
        for key, shipped in questions.items():
            candidates = {str(tuple(shipped)): shipped}
            for config in neighbours(shipped):
                if _is_right(call, {key: tuple(config)}, wanted):
                    candidates[str(tuple(config))] = config
            answers = {name: {key: tuple(one)} for name, one in candidates.items()}
            same = dict.fromkeys(candidates, call)
            timed = in_turns(same, layer.device, seconds, functools.partial(_replaced, answers))
            note(key, timed)
            best = min(timed, key=lambda name: timed[name])
            if timed[best] <= _LEAST_GAIN * timed[str(tuple(shipped))]:
                found[key] = list(candidates[best])
    return found


def _replaced(answers: dict[str, dict[str, Any]], name: str) -> AbstractContextManager[None]:
    return tiles.replaced(answers[name])


def _is_right(call: Call, answers: dict[str, Any], wanted: list[Tensor]) -> bool:
    """True if the kernel compiles, runs, and gives what the shipped tiles give, to rounding."""
    try:
        with tiles.replaced(answers):
            found = _tensors(call())
    except Exception:  # out of shared memory or registers, or a shape that the compiler refuses
        return False
    return all(
        bool((one.double() - other.double()).norm() <= 4 * torch.finfo(other.dtype).eps * other.double().norm())
        for one, other in zip(found, wanted, strict=True)
    )


def _tensors(result: Any) -> list[Tensor]:
    """The result of a forward, of a forward and backward, or of a refresh."""
    if isinstance(result, Tensor):
        return [result.detach()]
    return [result.divisor] if hasattr(result, "divisor") else [one.detach() for one in result]
