"""Measure other tile sizes than the shipped ones, for the kernels that take a layer's time on a GPU."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
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


def tuned(
    layer: Layer, tokens: list[int], seconds: float, asked: set[str]
) -> Iterator[tuple[str, dict[str, float], list[int] | None]]:
    """Yield each question of a layer's kernels, the times of the answers, and tiles faster than the shipped ones.

    Args:
        tokens: the most are used, and for the kernel of few tokens the fewest.
        seconds: for one question, with the compilation of its candidates.
        asked: questions that were measured before; those of this layer are added.
    """
    training = layer.calls(["fused"], max(tokens), True)["fused"]
    calls = {
        "compose_config": layer.calls(["fused"], max(tokens), False)["fused"],
        "scale_reduce_config": training,
        "product_config": training,
        "norm_config": layer.refreshes(["fused"])["fused"],
    }
    if "one pass" in layer.ways():
        calls["one_pass_config"] = layer.calls(["one pass"], min(tokens), False)["one pass"]
    for function, call in calls.items():
        found: dict[str, Any] = {}
        with tiles.replaced({}, found.__setitem__):
            wanted = _tensors(call())
        for key, shipped in found.items():
            if key.startswith(function) and key not in asked:
                asked.add(key)
                yield key, *_fastest(layer, key, shipped, call, wanted, seconds)


def _fastest(
    layer: Layer, key: str, shipped: Any, call: Call, wanted: list[Tensor], seconds: float
) -> tuple[dict[str, float], list[int] | None]:
    """The times of a question's answers, and the fastest answer, if it is not the shipped one."""
    start = time.perf_counter()
    candidates = {str(tuple(shipped)): shipped}
    for config in neighbours(shipped):
        if time.perf_counter() - start > seconds:  # each has to be compiled
            break
        if _is_right(call, {key: tuple(config)}, wanted):
            candidates[str(tuple(config))] = config
    answers = {name: {key: tuple(one)} for name, one in candidates.items()}
    same, left = dict.fromkeys(candidates, call), seconds - (time.perf_counter() - start)
    timed = in_turns(same, layer.device, left, functools.partial(_replaced, answers))
    best = min(timed, key=lambda name: timed[name])
    return timed, list(candidates[best]) if timed[best] <= _LEAST_GAIN * timed[str(tuple(shipped))] else None


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
