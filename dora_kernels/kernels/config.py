"""Tile sizes: frozen data, chosen by a pure function of shapes and dtypes, the same on every target.

Each choice fits the smallest shared memory among the targets (64 KiB, gfx942 and gfx1100) and does not spill on the
CUDA targets in bfloat16 and float16; tests/test_aot.py compiles all of them for all targets. None has been timed on a
GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

# Programs that fill a large GPU a few times over (132 multiprocessors on an H100, 304 compute units on an MI300X).
_FULL_GRID = 1024


class NormConfig(NamedTuple):
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class ComposeConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class ScaleReduceConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_F: int
    num_warps: int
    num_stages: int


def products(operands_wide: bool, result_wide: bool) -> int:
    """How many bfloat16 products make up one tile product (`dora_kernels.kernels.dot`)."""
    if not operands_wide:
        return 1
    return 6 if result_wide else 3


def norm_config(rank: int, products: int) -> NormConfig:
    """Up to rank 64 B's rows are held across the loop over K; above, both factors go through in chunks."""
    block_r = _rank_block(rank, 64)
    if products > 1:
        # 32 rows spill a few registers on sm_90 and sm_100, 64 with 1 stage or a larger BLOCK_R on sm_120.
        return NormConfig(64, 64, 16, 8, 2)
    return NormConfig(64, 128 if block_r <= 32 else 64, block_r, 8, 2)


def compose_config(tokens: int, rank: int, products: int) -> ComposeConfig:
    few = tokens <= 16
    if products > 1:
        return ComposeConfig(16, 64, 16, 4, 1) if few else ComposeConfig(32, 64, _rank_block(rank, 32), 4, 1)
    if few:
        return ComposeConfig(16, 128, _rank_block(rank, 64), 4, 2)
    # With 2 stages and a float32 B, sm_100 and sm_120 spill a few registers.
    return ComposeConfig(64, 128, _rank_block(rank, 64), 8, 1)


def scale_reduce_config(tokens: int) -> ScaleReduceConfig:
    return ScaleReduceConfig(4 if tokens <= 64 else 16, 128, 4, 2)


def splits(blocks: int, steps: int) -> int:
    """Into how many parts a loop of `steps` is cut, so that `blocks` programs become enough to fill a GPU."""
    return max(1, min(steps, _FULL_GRID // max(blocks, 1)))


def _rank_block(rank: int, largest: int) -> int:
    """The power of two that holds the rank, between 16 (the least a matrix instruction takes) and `largest`."""
    return min(max(16, 1 << (rank - 1).bit_length()), largest)
