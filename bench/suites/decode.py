"""One layer in evaluation, a few tokens at a time, the adapter not merged; on a GPU also replayed from a CUDA graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.layers import IN_EVALUATION, LayerCase
from bench.problem import LayerShape

if TYPE_CHECKING:
    from bench.run import Run


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of dtypes, hidden size, tokens and rank."""
    given, cuda = run.given, run.device.type == "cuda"
    hidden, tokens = given.hidden or ([4096] if cuda else [1024]), given.tokens or ([1, 8, 64] if cuda else [1])
    for dtypes, size, count, rank in itertools.product(given.dtypes, hidden, tokens, given.ranks or [16]):
        shape = LayerShape(size, rank, count, dtypes, run.device)
        case = LayerCase("decode", shape, ("inference", "inference in a graph"), IN_EVALUATION)
        yield f"decode: {case.label}", lambda case=case: run.measure(case)
