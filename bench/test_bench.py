"""The cases of `python -m bench run` under pytest-benchmark: `make bench`, or `pytest bench/test_bench.py`.

    make bench ARGS="--benchmark-save=before"
    make bench ARGS="--benchmark-compare=0001 -k decode"

The providers of a case form a group for each of its parts. Each is checked against float64 before and after; a wrong
one fails, a missing one is skipped by name. Here one provider runs after another: `python -m bench run` and `compare`
take turns instead, and are what to trust where a few per cent matter. Models and memory are theirs alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.providers import LABELS, Missing, Subject
from bench.run import Options, Run
from bench.suites.layer import LayerCase
from dora_kernels.testing import beyond

SUITES = ("norm", "compose", "layer", "decode", "host", "block")
ROUNDS = 15


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = Run(Options(SUITES, DEVICE, ["bf16"] if DEVICE == "cuda" else ["fp32"])).cases()


def _parameters() -> Iterator[Any]:
    for index, case in enumerate(CASES):
        words = f"{case.suite}-{case.label.replace(', ', '-').replace(' ', '_')}"
        for provider in case.providers:
            if not isinstance(case, LayerCase):
                yield pytest.param(index, provider, None, id=f"{words}-{provider}")
                continue
            for part in case.parts:
                trains = not part.startswith("inference")
                if part != "inference in a graph" and not (trains and provider == "ours_frozen"):
                    yield pytest.param(index, provider, part, id=f"{words}-{provider}-{part.replace(' ', '_')}")


@functools.lru_cache(maxsize=1)
def _subject(index: int, provider: str) -> Subject:
    """The parts of one follow each other."""
    torch.compiler.reset()  # after a few recompilations of one function torch runs it uncompiled
    return CASES[index].subject(provider)


@pytest.mark.parametrize(("index", "provider", "part"), list(_parameters()))
def test(benchmark: Any, index: int, provider: str, part: str | None) -> None:
    """One provider's part of a case: the time of one call, the copies of the inputs taken in turn."""
    case = CASES[index]
    try:
        subject = _subject(index, provider)
    except Missing as reason:
        pytest.skip(f"{LABELS[provider]}: {reason}")
    assert not beyond(subject.errors, subject.limits)
    part = part or next(iter(subject.parts))
    calls, turn = subject.parts[part], 0
    benchmark.group = f"{case.suite}: {part}, {case.label}"
    benchmark.extra_info.update(case.facts, errors=subject.errors, least=subject.least.get(part))

    def call() -> None:
        nonlocal turn
        calls[turn % len(calls)]()
        turn += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=ROUNDS, iterations=len(calls), warmup_rounds=2)
    assert not (subject.again and beyond(*subject.again()))
