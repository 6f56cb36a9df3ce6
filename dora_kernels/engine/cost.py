"""The stated model by which the shipped defaults choose between formula, fused and merged: bytes, launches, host time.

    seconds = max(host, launches * gap + FLOPs / rate + bytes / bandwidth)

for the forward and backward of one layer, or its forward alone, with the norm (or the merged weight) at hand. Passes
over activations are counted operation by operation; W is read once by each large product. The machine is an H200 in
16 bits. Host times are those of one CPU core with launches that launch nothing. **No figure that this model gives has
been compared with a GPU.** ``dora_kernels.tune`` measures instead, and ``python -m bench static --choices`` prints it.

The host times: CPU time of a `DoRALinear` of 32 features, rank 8, one token, bfloat16 (merged: float32), the norm at
hand, on an AMD EPYC with torch 2.13 and triton 3.8, whose compiled kernels went through their launchers to a driver
that does nothing; the least of 25 rounds in which all took turns. PEFT's LoRA took 74 and 24 us, `torch.add` of 16
numbers 2.3, evaluation in one pass 26. What a driver needs for each launch comes on top.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

BANDWIDTH = 4.3e12
"""Bytes per second of a large copy, read plus written."""
RATE = 790e12
"""Dense 16-bit FLOPs per second."""
GAP = 2e-6
"""Seconds between two launches on the device."""


class Path(NamedTuple):
    """What one way to run a layer costs beside its large products."""

    launches: int
    passes_out: int
    """Over ``[tokens, out_features]``, in the layer's dtype."""
    passes_in: int
    """Over ``[tokens, in_features]``."""
    low_rank: int
    """Products of rank r with an activation, of ``tokens * features * rank`` multiply-adds each."""
    host: float
    """Seconds of the host."""


PATHS = {
    ("formula", True): Path(14, 13, 8, 6, 115e-6),
    ("formula", False): Path(5, 5, 2, 2, 26e-6),
    ("fused", True): Path(10, 8, 6, 6, 255e-6),
    ("fused", False): Path(4, 3, 2, 2, 36e-6),
    ("merged", True): Path(9, 6, 4, 4, 135e-6),
    ("merged", False): Path(1, 1, 1, 0, 14e-6),
}
"""By path, and whether there is a backward."""


def seconds(path: str, gradients: bool, tokens: int, out_features: int, in_features: int, rank: int) -> float:
    """The model's time of one call in a 16-bit dtype."""
    one = PATHS[path, gradients]
    weight, large = out_features * in_features, 2 if gradients else 1
    flops = 2 * tokens * (large * weight + one.low_rank * rank * (out_features + in_features) / 2)
    size = 2 * (tokens * (one.passes_out * out_features + one.passes_in * in_features) + large * weight)
    return max(one.host, one.launches * GAP + flops / RATE + size / BANDWIDTH)


def refresh_seconds(path: str, out_features: int, in_features: int, rank: int) -> float:
    """The model's time of what a step does once: the norm, or with it the merged weight, whose W is read twice."""
    flops, size = 2 * out_features * in_features * rank, 2 * out_features * in_features
    if path == "merged":
        flops, size = 2 * flops, 3 * size
    return 2 * GAP + flops / RATE + size / BANDWIDTH


@functools.lru_cache(maxsize=1024)
def first_tokens(path: str, other: str, gradients: bool, out_features: int, in_features: int, rank: int) -> int | None:
    """The fewest tokens, a power of two up to 2**20, from which `path` costs less than `other`; None if never."""
    shape = out_features, in_features, rank
    found = None
    for tokens in reversed([1 << i for i in range(21)]):
        mine, theirs = (
            seconds(one, gradients, tokens, *shape) + (refresh_seconds(one, *shape) if gradients else 0.0)
            for one in (path, other)
        )
        if mine >= theirs:
            break
        found = tokens
    return found
