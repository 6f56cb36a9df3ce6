"""Times of candidates that take turns, so that a machine that drifts favours none."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

FEWEST, MOST = 5, 21
"""Rounds."""
_SAMPLE_SECONDS = 2e-3


def in_turns(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    limit: float,
    around: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
) -> dict[str, float]:
    """Seconds per call of each candidate: the best round's, which other work on the machine has disturbed least.

    No round begins after `limit` seconds, except for the first five.

    Args:
        around: makes a context in which a candidate runs; entering it is not timed.
    """
    start = time.perf_counter()
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        with around(name):
            call()  # compiles, allocates
            once = _elapsed(call, 1, device)
        repeats[name] = max(1, min(100, int(_SAMPLE_SECONDS / max(once, 1e-7))))
    for done in range(MOST):
        if done >= FEWEST and time.perf_counter() - start > limit:
            break
        names = list(calls)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            with around(name):
                calls[name]()
                samples[name].append(_elapsed(calls[name], repeats[name], device) / repeats[name])
    return {name: min(each) for name, each in samples.items()}


def _elapsed(call: Callable[[], object], times: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
