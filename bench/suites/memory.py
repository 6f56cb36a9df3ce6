"""The most memory that one layer's training holds at once, beside what it began with; nothing is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.layers import PROVIDERS, LayerCase
from bench.problem import LayerShape

if TYPE_CHECKING:
    from bench.run import Run


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of dtypes, hidden size, tokens and rank."""
    given, cuda = run.given, run.device.type == "cuda"
    hidden, tokens = given.hidden or ([4096] if cuda else [2048]), given.tokens or ([8192] if cuda else [256])
    for dtypes, size, count, rank in itertools.product(given.dtypes, hidden, tokens, given.ranks or [16]):
        shape = LayerShape(size, rank, count, dtypes, run.device)
        case = LayerCase("memory", shape, ("forward and backward", "step"), PROVIDERS, most_copies=1)
        yield f"memory: {case.label}", lambda case=case: run.measure(case, timed=False)
