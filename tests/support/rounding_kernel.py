"""The tile functions of `dora_kernels.kernels.rounding` in kernels of their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dora_kernels.kernels.rounding import draw, round_by_words


@triton.jit(do_not_specialize=["seed"])
def _draw(index_ptr, word_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(word_ptr + offs, draw(seed, tl.load(index_ptr + offs)).to(tl.int64))


@triton.jit
def _round(x_ptr, word_ptr, y_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(word_ptr + offs).to(tl.uint32)
    tl.store(y_ptr + offs, round_by_words(tl.load(x_ptr + offs), words, DTYPE))


def drawn(seed: int, indices: torch.Tensor) -> torch.Tensor:
    """The words of a multiple of 256 indices."""
    words = torch.empty_like(indices)
    _draw[(indices.numel() // 256,)](indices, words, seed, BLOCK=256)
    return words


def round_tile(x: torch.Tensor, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A multiple of 256 float32 values in `dtype`, converted by torch: interpreted, small bfloat16 ones become zero."""
    y = torch.empty_like(x)
    _round[(x.numel() // 256,)](x, words, y, DTYPE=tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, BLOCK=256)
    rounded = y.to(dtype)
    within = y.abs() <= torch.finfo(dtype).max
    assert torch.equal(rounded.float()[within], y[within]), "not numbers of the dtype"
    return rounded
