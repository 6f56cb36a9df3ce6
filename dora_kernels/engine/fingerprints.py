"""Detect whether tensors have changed, for the norm cache. Tensor versions do not show every write.

lora_A and lora_B are compared in full, W by a sample.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

# A contiguous write to more than 1/64 of W is always detected. 256 samples took 16 to 22 us when a product had emptied
# the caches, 3 to 5 % of a one-token call at 2048x2048 in bf16 (1.21 of LoRA's time; 1.15 with 64), for a frozen
# weight.
_SAMPLES = 64


def sample(weight: Tensor) -> Tensor:
    """Return about `_SAMPLES` elements of W (all if it has fewer) as a strided vector.

    They are evenly spread over memory and over all dimensions.
    """
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    if rows and weight.stride() not in ((columns, 1), (1, rows)):
        return weight[:: max(1, rows // _SAMPLES), :: max(1, columns // _SAMPLES)].diagonal()
    in_memory = sorted(zip(weight.stride(), weight.shape), reverse=True)
    size, stride = _sample_layout(weight.numel(), tuple(size for _, size in in_memory[1:]))
    return weight.as_strided(size, stride, weight.storage_offset())


@functools.cache
def _sample_layout(elements: int, inner: tuple[int, ...]) -> tuple[tuple[int], tuple[int]]:
    """The size and the stride of a sample of a tensor with these inner dimensions, in the order of memory.

    A step goes on by a golden section of each inner dimension that it passes, which spreads the samples over it. (With
    steps of just less than a row, 64 samples of 2048 columns would all lie in 64 neighbouring columns.)
    """
    units = [math.prod(inner[at:]) for at in range(len(inner) + 1)]
    stride = max(1, elements // _SAMPLES)
    at = next(i for i, unit in enumerate(units) if unit <= stride)
    sections = sum(int(0.618 * size) * unit for size, unit in zip(inner[at:], units[at + 1 :]))
    stride = max(1, (stride - sections) // units[at] * units[at] + sections)
    while math.gcd(stride, units[0]) > 1:
        stride -= 1
    return (-(-elements // stride),), (stride,)


class Sample:
    """A weight's `sample` at one point in time: a view of the elements, and a copy of them."""

    __slots__ = ("kept", "view")

    def __init__(self, weight: Tensor) -> None:
        self.view = sample(weight.detach())
        self.kept = self.view.clone()

    def is_held_by(self, weight: Tensor) -> bool:
        """True if a tensor of the same shape and strides holds the same values at the sampled places."""
        view = self.view
        if weight.data_ptr() != view.data_ptr():
            view = weight.as_strided(view.size(), view.stride(), weight.storage_offset())
        return torch.equal(view, self.kept)


def _memory(tensor: Tensor) -> Any:
    """Return the memory of a contiguous CPU tensor as ctypes bytes: reads show its current content.

    This does not keep the tensor alive.
    """
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


# Tensors from this size on are compared by sums, which read half as much, and leave more of W in the caches. lora_A and
# lora_B at rank 384 (2048x2048, float32, two cores, caches emptied by a product) take 193 us instead of 327; a
# one-token call takes 1.32 of LoRA's time instead of 1.38, and at 4096x4096 in bf16 1.12 instead of 1.29. At rank 64
# comparing takes 48 us instead of 59. At 1 MB sums take 24 us instead of 28, and the products after them 0.6 of the
# time (32 experts, 1024x512, one token).
_COPIED_BYTES = 1 << 20
_WORDS = 32


class Record:
    """The content of a tensor at one point in time: a copy or, if it is large, the sum of each line of 64-bit words.

    A sum does not change if words swap places within their line of 256 bytes, or if an even number of them flip their
    highest bit. On the CPU a copy is kept as bytes: the C library compares these several times as fast as `torch.equal`
    compares large tensors.
    """

    __slots__ = ("_kept", "_tensor", "kept_bytes", "memory")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor = _as_stored(tensor.detach())
        words = _words(tensor)
        self.memory = self.kept_bytes = None
        self._kept: Any = None
        if words is not None:
            self._kept = words.sum(1)
        elif tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.data_ptr():
            self.memory = _memory(tensor)
            self.kept_bytes = bytearray(self.memory)
        else:
            self._kept = tensor.clone()

    def is_held_by(self, tensor: Tensor) -> bool:
        """True if a tensor of the same dtype, shape and strides holds the same values."""
        tensor = _as_stored(tensor)
        if self.kept_bytes is not None:
            if tensor.data_ptr() == self._tensor.data_ptr() and tensor.is_contiguous():
                return self.kept_bytes == self.memory
            return tensor.is_contiguous() and self.kept_bytes == _memory(tensor)
        if self._kept.dtype == torch.int64 and tensor.dtype != torch.int64:
            words = _words(tensor)
            return words is not None and torch.equal(words.sum(1), self._kept)
        return torch.equal(tensor, self._kept)


def _as_stored(tensor: Tensor) -> Tensor:
    """A view with the dimensions in the order in which they lie in memory: of PEFT's B of experts, a contiguous one."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _words(tensor: Tensor) -> Tensor | None:
    """Return a large tensor as lines of 64-bit words, or None if it should be copied instead.

    float64 tensors are copied, because their signs are the highest bits of the words.
    """
    size = tensor.nbytes
    if size < _COPIED_BYTES or size % (8 * _WORDS) or not tensor.is_contiguous() or tensor.element_size() > 4:
        return None
    if tensor.storage_offset() * tensor.element_size() % 8:
        return None
    return tensor.detach().view(-1).view(torch.int64).view(-1, _WORDS)


class Held:
    """The content of W (a sample), A and B at one point in time."""

    __slots__ = ("_bytes", "_factors", "_kept", "_view")

    def __init__(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
        of_weight = Sample(weight)
        self._view, self._kept = of_weight.view, of_weight.kept
        self._factors = of_a, of_b = Record(lora_A), Record(lora_B)
        whole = of_a.kept_bytes is not None and of_b.kept_bytes is not None
        self._bytes = (of_a.kept_bytes, of_a.memory, of_b.kept_bytes, of_b.memory) if whole else None

    def is_held_by(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """True if these tensors, at unchanged addresses and strides, and W's sample still hold the same values."""
        if self._bytes is not None:
            of_a, a, of_b, b = self._bytes
            if of_a != a or of_b != b:
                return False
        elif not (self._factors[0].is_held_by(lora_A) and self._factors[1].is_held_by(lora_B)):
            return False
        return torch.equal(self._view, self._kept)


def digest(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of every 2**20 elements, for callers that keep no copy to compare with.

    Each element is mixed with its position.
    """
    flat = tensor.detach().reshape(-1)
    if flat.dtype not in (torch.int64, torch.float64):
        flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[flat.element_size()])
    else:
        flat = flat.view(torch.int64)
    sums = []
    for part in flat.split(1 << 20):
        mixed = torch.arange(part.numel(), device=flat.device).mul_(-7046029254386353131).add_(part.to(torch.int64))
        mixed.mul_(-4417276706812531889).bitwise_xor_(mixed >> 32).mul_(-8663945395140668459)
        sums.append(mixed.bitwise_xor_(mixed >> 29).sum())
    return torch.stack(sums)
