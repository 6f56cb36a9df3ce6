"""The cases of `python -m bench run` under pytest-benchmark: `make bench`, or `pytest bench/test_bench.py`.

    make bench ARGS="--benchmark-save=before"
    make bench ARGS="--benchmark-compare=0001 -k decode"

A case's providers form a group. Each is checked against float64 before it is timed; a wrong one fails, a missing one is
skipped by name. Here one provider runs after another: `python -m bench run` and `compare` take turns instead, and are
what to trust where a few per cent matter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import suites
from bench.problem import beyond
from bench.providers import LABELS, Missing
from bench.run import Options, Run

SUITES = ("norm", "compose", "layer", "decode", "host")
ROUNDS = 15


def _cases() -> list[Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(Options(SUITES, device, ["bf16"] if device == "cuda" else ["fp32"]))
    found: list[Any] = []
    run.measure = lambda case, **_: found.append(case)  # type: ignore[method-assign]
    for name in SUITES:
        for _, work in suites.load(name).stages(run):
            work()
    return found


def _parameters() -> list[Any]:
    return [
        pytest.param(case, provider, id=f"{case.suite}-{case.label.replace(', ', '-').replace(' ', '_')}-{provider}")
        for case in _cases()
        for provider in case.providers
    ]


_PARTS = {"layer": "forward and backward", "decode": "inference", "host": "inference"}


@pytest.mark.parametrize(("case", "provider"), _parameters())
def test(benchmark: Any, case: Any, provider: str) -> None:
    """One provider at one case."""
    try:
        subject = case.subject(provider)
    except Missing as reason:
        pytest.skip(f"{LABELS[provider]}: {reason}")
    assert not beyond(subject.errors, subject.limits)
    part = _PARTS.get(case.suite, next(iter(subject.parts)))
    calls = subject.parts[part]
    benchmark.group = f"{case.suite}: {part}, {case.label}"
    benchmark.extra_info.update(case.facts, errors=subject.errors, least=subject.least[part])

    def work() -> None:
        for call in calls:
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(work, rounds=ROUNDS, iterations=1, warmup_rounds=2)
