"""One layer in training.

`forward` and `forward and backward` find the norm at hand, as the further micro-batches of an optimizer step do; a
`step` is one micro-batch, then AdamW, so that the norm is computed in each; the longer step has four of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from bench.layers import PARTS, LayerCase
from bench.problem import LayerShape

if TYPE_CHECKING:
    from bench.run import Run

TRAINING = tuple(part for part in PARTS if not part.startswith("inference"))


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of dtypes, hidden size, tokens and rank."""
    given, cuda = run.given, run.device.type == "cuda"
    hidden = given.hidden or ([4096] if cuda else [1024])
    tokens = given.tokens or ([256, 8192] if cuda else [256])
    for dtypes, size, count, rank in itertools.product(given.dtypes, hidden, tokens, given.ranks or [16]):
        shape = LayerShape(size, rank, count, dtypes, run.device)
        # One call's tensors fill a cache by themselves, and reading W is a hundredth of its time.
        case = LayerCase("layer", shape, TRAINING, most_copies=2)
        yield f"layer: {case.label}", lambda case=case: run.measure(case)
