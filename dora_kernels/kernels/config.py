"""Tile sizes and thresholds: frozen data, chosen by pure functions of shapes and dtypes, the same on every target.

Each choice fits the smallest shared memory among the targets (64 KiB, gfx942 and gfx1100) and does not spill on the
CUDA targets in bfloat16 and float16. tests/kernels/test_aot.py compiles them for all targets. None has been timed on a
GPU yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Programs that fill a large GPU several times over (132 multiprocessors on an H100, 304 compute units on an MI300X).
_FULL_GRID = 1024
# Programs of `one_pass`: one for each multiprocessor keeps 6 MB of loads under way, more than memory of 4.3 TB/s and a
# microsecond's latency needs. W of 4096 rows is not split.
_ONE_PASS_GRID = 128
# Programs of a product, whose loads are pipelined: about two for each multiprocessor. More parts are more sums to add.
_PRODUCT_GRID = 256


# A configuration lists the tile sizes, in the order of the kernel's last arguments, and then two compiler options.
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


class ProductConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class FinishConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class OnePassConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    num_warps: int
    num_stages: int

    @property
    def finish(self) -> FinishConfig:
        """Of the kernel that adds the parts."""
        return FinishConfig(self.BLOCK_M, self.BLOCK_N, self.BLOCK_R, self.num_warps, 1)


class ScaleReduceConfig(NamedTuple):
    BLOCK_M: int
    BLOCK_F: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class FactoredConfig(NamedTuple):
    BLOCK_N: int
    BLOCK_R: int
    num_warps: int
    num_stages: int


class VectorConfig(NamedTuple):
    """For kernels that walk along a vector."""

    BLOCK: int
    num_warps: int
    num_stages: int


class WatchConfig(NamedTuple):
    """A program reads up to CHUNK elements, in blocks of BLOCK elements. CHUNK is a multiple of BLOCK."""

    CHUNK: int
    BLOCK: int
    num_warps: int
    num_stages: int


# The fingerprints need one more launch, about 2 us, in which a GPU of 4 TB/s reads 8 MB. An estimate, not timed.
_KEPT_BYTES = 1 << 23

# If a row's squared norm is below this fraction of the terms it is summed from, it has lost digits. A quarter costs at
# most two bits. The same as `engine.blocked.CANCELLATION`, which this folder may not import.
CANCELLATION = 0.25
# The most programs that share a tensor's fingerprint.
_FINGERPRINTS = 256

# With fewer features the errors of three products do not average out: up to 2.8e-5 of a norm of 1 feature, 1.1e-5 of 4,
# 6e-6 of 16 (random float16 weights, float32 adapters).
_FEW_FEATURES = 16

# The largest rank at which a bfloat16 weight's norm is computed directly. Counted (tests/support/aot/traffic.py), not
# timed, for 8192x8192 and bfloat16 adapters: the direct form reads 285 MB of factors from L2 at rank 128 and, with the
# largest tiles that do not spill, 1610 MB at rank 384. The factored form reads 183 MB at rank 384, besides the vendor's
# product of W and A.
DIRECT_RANK = 128


def products_for(operands_wide: bool, result_wide: bool) -> int:
    """How many bfloat16 products make up one tile product (`dora_kernels.kernels.dot`)."""
    if not operands_wide:
        return 1
    return 6 if result_wide else 3


def norm_products(
    weight: torch.dtype, lora_A: torch.dtype, lora_B: torch.dtype, features: int, exact: bool = False
) -> int:
    """`products_for` a tile of ``B A`` with `features` columns in total. `exact`: as if W were float32."""
    wide = lora_A == torch.float32 or lora_A != lora_B
    return products_for(wide, exact or weight == torch.float32 or features < _FEW_FEATURES)


def is_worth_keeping(weight: Tensor) -> bool:
    """True if checking on the device whether the norm of such a weight has changed is cheaper than computing it."""
    return weight.numel() * weight.element_size() >= _KEPT_BYTES


def norm_config(rank: int, products: int, held: int = 128) -> NormConfig:
    """Up to rank `held`, B's rows are held across the loop over K; above that, both factors are read in chunks."""
    if products == 3 and rank <= 16:
        # 64 columns spill on sm_120 if no load is aligned, and take 254 registers on sm_80 instead of 159.
        return NormConfig(64, 32, 16, 8, 2)
    if products > 1:
        # 32 rows spill a few registers on sm_90 and sm_100, 64 with 1 stage or a larger BLOCK_R on sm_120, 32 columns
        # on sm_80.
        return NormConfig(64, 64, 16, 8, 2)
    # Tiles of 64x128 spill: at rank 32 on sm_80 and sm_100 if W is transposed, in chunks on sm_80 or sm_120. With a
    # BLOCK_R of 16, tiles of 64x64 spill on sm_80.
    return NormConfig(64, 64, max(32, _rank_block(rank, held)) if rank <= held else 64, 8, 2)


def kept_norm_config(config: NormConfig, rank: int, products: int) -> NormConfig:
    """The norm's `config` where the norm is kept: the same tiles, for the same bits."""
    # With three products and a rank in chunks, 2 stages spill on sm_90 if no load is aligned. 1 stage spills on sm_120
    # if the rank is held, and on sm_100 with six products.
    return config._replace(num_stages=1) if products == 3 and rank > config.BLOCK_R else config


def merge_config(rank: int, products: int, stochastic: bool) -> NormConfig:
    # If a rank of 128 is held, the second sweep spills on sm_100.
    config = norm_config(rank, products, held=64)
    # The random words spill with 64 columns or more: with a product in pieces on sm_120 if loads are not aligned, with
    # one product on sm_100.
    return config._replace(BLOCK_K=32) if stochastic else config


def factored_config() -> FactoredConfig:
    # BLOCK_R 64 spills with float32 adapters on sm_100, 32 rows with 4 warps on sm_120.
    return FactoredConfig(64, 32, 8, 1)


def factor_grads_config(rank: int, split: bool) -> FactoredConfig:
    """`split`: P is in parts."""
    # With parts 32 ranks, or less than 8 parts at a time, spill on sm_80 or sm_90.
    return FactoredConfig(16, _rank_block(rank, 16 if split else 64), 4, 1)


def combine_config() -> VectorConfig:
    return VectorConfig(64, 2, 1)


def fingerprint_config() -> VectorConfig:
    return VectorConfig(2048, 8, 1)


def watch_config() -> WatchConfig:
    return WatchConfig(16384, 1024, 4, 2)


def most_fingerprints() -> int:
    """A power of two not below the fingerprints of three tensors. Smaller blocks of flags spill on sm_100."""
    return power_of_two(3 * _FINGERPRINTS)


def fingerprints(elements: int) -> int:
    """How many programs share a tensor's fingerprint."""
    return min(blocks(elements, fingerprint_config().BLOCK), _FINGERPRINTS)


def compose_config(few: bool, rank: int, products: int) -> ComposeConfig:
    """`few`: at most 16 tokens, or 16 for each group."""
    if products > 1:
        # BLOCK_R 32 spills a few registers with 3 products on sm_80.
        largest = 32 if products == 6 else 16
        return ComposeConfig(16, 64, 16, 4, 1) if few else ComposeConfig(32, 64, _rank_block(rank, largest), 4, 1)
    if few:
        return ComposeConfig(16, 128, _rank_block(rank, 64), 4, 2)
    # With 2 stages and a float32 B, sm_100 and sm_120 spill a few registers.
    return ComposeConfig(64, 128, _rank_block(rank, 64), 8, 1)


def product_config(rows: int, columns: int, products: int) -> ProductConfig:
    """`rows`: of a group."""
    block_m, block_n = _rank_block(rows, 64), _rank_block(columns, 64)
    # With 4 warps the largest tiles spill on sm_90 and sm_120 if loads are not aligned.
    warps = 8 if block_m == block_n == 64 else 4
    if products == 6:
        # BLOCK_K 32 spills with 1 stage or 2 on sm_90, sm_100 or sm_120. With 16, 2 stages spill at 32 columns on sm_86
        # and sm_100, at 64 on sm_90; 3 stages at 16 and 32 columns on sm_80, at 32 and 64 on sm_90 and sm_120.
        return ProductConfig(min(block_m, 32), block_n, 16, 4, 2 if block_n == 16 else 1)
    if products > 1:
        # Three stages hold the tiles in shared memory and need fewer registers than two, which spill on sm_120: 64x16
        # takes 52 on sm_90, 64x64 86. With 32 features 32x32 spills on sm_100, 64x32 on sm_86 and sm_89.
        return ProductConfig(block_m, block_n, 16 if block_n == 32 <= block_m else 32, warps, 3)
    # The tiles of three stages fit in 64 KiB. With 128 features 32x32 spills on sm_100 and 64x16 on sm_120, with 64
    # features 64x64 on sm_120.
    block_k = 128 if block_m * block_n <= 512 else 64 if block_m * block_n <= 2048 else 32
    return ProductConfig(block_m, block_n, block_k, warps, 3)


def product_parts(tiles: int, steps: int) -> int:
    """Into how many parts to split a sum of `steps`; 8 steps take about as long as the launch that adds the parts."""
    return splits(tiles, max(1, steps // 8), _PRODUCT_GRID)


def one_pass_config(tokens: int, rank: int, wide_a: bool) -> OnePassConfig:
    """`wide_a`: A is float32."""
    block_m, block_r = _rank_block(tokens, 64), _rank_block(rank, 64)
    # Every program reads x and A from the L2 cache: with 32 rows of W more than twice W's bytes, if both are large.
    # At 32 tokens and rank 64, 64 rows spill on sm_90.
    block_n = 32 if block_m + block_r <= 64 or block_m == 32 else 64
    # Tiles of three stages, or 128 features, spill with a float32 A on sm_120 or sm_90 if loads are not aligned.
    block_k, stages = (64, 2) if wide_a else (128 if block_m + block_r <= 48 else 64, 3)
    return OnePassConfig(block_m, block_n, block_k, block_r, block_n // 8, stages)


def one_pass_parts(programs: int, steps: int) -> int:
    """Into how many parts to split the sweep over W."""
    return splits(programs, steps, _ONE_PASS_GRID)


def scale_reduce_config(few: bool, rank: int, products: int) -> ScaleReduceConfig:
    """`few`: at most 64 tokens, or 64 for each group. `rank`: of the product in the same pass, 0 without."""
    if not rank:
        return ScaleReduceConfig(4 if few else 16, 128, 16, 4, 2)
    # With products in pieces 32 rows spill at rank 64 on sm_80, sm_90 and sm_120, with one product 16 rows on sm_100.
    # 128 columns take 162 registers on sm_90 where 64 take 100, and 8 strips instead of 16 halve the partial sums.
    return ScaleReduceConfig(32 if products == 1 else 16, 64, _rank_block(rank, 64), 4, 2)


def reduce_strips(programs: int, steps: int, rows: int, rank: int) -> int:
    """Into how many strips `scale_reduce` cuts a group's rows.

    With a product the partial sums, which are written and read, have their price: half the programs, four for each
    multiprocessor, move a quarter of grad's bytes at 8192 tokens, 4096 features and rank 64. Few tokens are cut so that
    it is at most twice of grad's.
    """
    if not rank:
        return splits(programs, steps, _FULL_GRID)
    return splits(programs, min(steps, max(1, rows // (2 * rank))), _FULL_GRID // 2)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`. `triton.cdiv` would cost the host as much as a small torch operation."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`; 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def group_tiles(rows: int, groups: int, block: int) -> int:
    """The most blocks that cover `rows` in that many groups, wherever the groups end, if no block has rows of two."""
    filled = min(rows, groups)
    return filled + (rows - filled) // block


def full_grid() -> int:
    """How many programs fill a GPU."""
    return _FULL_GRID


def splits(programs: int, steps: int, wanted: int) -> int:
    """How many parts to split a loop of `steps` into, so that `programs` become about `wanted` programs."""
    return max(1, min(steps, wanted // max(programs, 1)))


def _rank_block(rank: int, largest: int) -> int:
    """The smallest power of two that holds the rank, but from 16 (the minimum of a matrix instruction) to `largest`."""
    return min(max(16, 1 << (rank - 1).bit_length()), largest)
