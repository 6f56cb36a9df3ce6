"""Stochastic rounding to bfloat16 and float16: up or down, with probabilities that keep the mean.

A value between two neighbouring numbers of the dtype is rounded away from zero with a probability equal to its fraction
of the step, so that the expected result is the value itself. Element i, by its row-major index in the logical
``[out, in]`` weight, uses word ``i % 4`` of Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", SC 2011) with the seed as key and ``i // 4`` as counter. Strides, blocks, device and backend make no difference.
`dora_kernels.kernels.rounding` does the same for tiles. Where nobody compares bits, PyTorch's generator is faster.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# Elements that the CPU rounds at once, so that their random words stay in the cache.
_CHUNK = 1 << 17

_LARGEST = torch.finfo(torch.bfloat16).max


def is_coarse(dtype: torch.dtype) -> bool:
    """True if stochastic rounding to `dtype` differs from rounding to nearest. Merging computes in float32 or wider."""
    return dtype in (torch.bfloat16, torch.float16)


def seed_for(seed: int, name: str) -> int:
    """Return the seed for one of several weights, by its name.

    With one seed for all weights, elements at equal indices would use the same random bits.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stochastic(x: Tensor, dtype: torch.dtype, seed: int | torch.Generator, start: int = 0) -> Tensor:
    """Return x rounded to `dtype`, for which `is_coarse` is True.

    Args:
        x: one or more whole rows of a weight.
        seed: of the words by index, or a generator on x's device that draws them.
        start: the index of x's first element in the weight.
    """
    values = x.reshape(-1)
    chunked = x.device.type == "cpu" and not torch.compiler.is_compiling()
    step = min(_CHUNK, values.numel()) if chunked else values.numel()
    result = torch.empty_like(values, dtype=dtype)
    for first in range(0, values.numel(), step):
        part = values[first : first + step]
        if isinstance(seed, int):
            rounded = round_by_words(part, dtype, words(seed, start + first, part.numel(), x.device))
        elif dtype == torch.bfloat16 and _within(part):
            rounded = _cut_off(part, seed)
        else:
            drawn = torch.empty(part.numel(), dtype=torch.int64, device=x.device).random_(generator=seed)
            rounded = round_by_words(part, dtype, drawn >> 31)
        result[first : first + step] = rounded
    return result.view(x.shape)


def _within(x: Tensor) -> bool:
    """True for float32 numbers up to the largest of bfloat16."""
    if x.dtype != torch.float32 or not x.numel():
        return False
    least, most = x.aminmax()
    return float(least) >= -_LARGEST and float(most) <= _LARGEST  # not with a NaN


def _cut_off(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, which has the upper half of its bits: add random ones to the lower half, and cut it off."""
    drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    sixteen = drawn.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: x.numel()]
    bits = torch.add(x.view(torch.int32), sixteen).add_(1 << 15)
    return bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def round_by_words(x: Tensor, dtype: torch.dtype, drawn: Tensor) -> Tensor:
    """Round x away from zero if its 32-bit word is below 2**32 times its fraction of the step, else towards zero.

    The probability is the fraction itself if that has at most 32 bits, as for every float32 in bfloat16, and in float16
    for those from 2**-33; otherwise it is at most 2**-32 above the fraction. Numbers that `dtype` has stay unchanged,
    including signed zeros, infinities and NaN. Beyond its largest number the result is infinity exactly where rounding
    to nearest gives infinity.
    """
    nearest, size = x.to(dtype), x.abs()
    beyond = (nearest.abs().to(x.dtype) > size) & nearest.isfinite()
    towards_zero = nearest.view(torch.int16) - beyond.to(torch.int16)
    away = towards_zero + 1
    low, high = (bits.view(dtype).to(x.dtype).abs_() for bits in (towards_zero, away))
    # Exact: low is within a step of x, and the step is a power of two. Infinity and NaN give NaN, or 0 below them.
    fraction = size.sub_(low).div_(high.sub_(low))
    return torch.where(drawn < fraction.to(torch.float64).mul_(2.0**32), away, towards_zero).view(dtype)


def words(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """The random words of elements ``[start, start + count)``: 32 bits each, as int64."""
    first = start // 4
    counters = torch.arange(first, (start + count + 3) // 4, device=device)
    zero = torch.zeros_like(counters)
    drawn = torch.stack(philox(counters & _MASK, counters >> 32, zero, zero, seed), 1)
    return drawn.view(-1)[start - 4 * first :][:count]


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four 32-bit words for each counter of four words, all as int64. The key is the seed's 64 bits."""
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(_ROUNDS):
        # int64 products wrap around, which keeps their bits. c1 and c3 keep high bits that are never read.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)
