"""A layer so small that what is timed is Python, the launches and PyTorch's own work for each call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.layers import IN_EVALUATION, LayerCase
from bench.problem import LayerShape

if TYPE_CHECKING:
    from bench.run import Run


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of dtypes and rank."""
    for dtypes, size, count, rank in itertools.product(
        run.given.dtypes, run.given.hidden or [64], run.given.tokens or [1], run.given.ranks or [8]
    ):
        shape = LayerShape(size, rank, count, dtypes, run.device)
        case = LayerCase("host", shape, ("inference", "forward and backward"), IN_EVALUATION, most_copies=1)
        yield f"host: {case.label}", lambda case=case: run.measure(case)
