"""Whether a weight still holds what it held: what the norm cache compares, since versions do not tell.

Of lora_A and lora_B everything is compared, of W a sample.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor

# Whoever writes more than 1/64 of W in one piece is seen. 256 took 16 to 22 us where a product had emptied the caches,
# 3 to 5 % of a token's whole call at 2048x2048 in bf16 (1.21 of LoRA's, 1.15 with 64), for a weight that is frozen.
_SAMPLES = 64


def sample(weight: Tensor) -> Tensor:
    """About `_SAMPLES` elements of W, or all, evenly spread over memory and over both dimensions: a strided vector."""
    if weight.dim() != 2:  # a convolution's, or something packed: as it lies in memory
        weight = weight.as_strided((weight.numel(), 1), (1, 1))
    rows, columns = weight.shape
    if weight.stride() not in ((columns, 1), (1, rows)):
        return weight[:: max(1, rows // _SAMPLES), :: max(1, columns // _SAMPLES)].diagonal()
    size, stride = _sample_layout(weight.numel(), columns if weight.stride(1) == 1 else rows)
    return weight.as_strided(size, stride, weight.storage_offset())


@functools.cache
def _sample_layout(elements: int, width: int) -> tuple[tuple[int], tuple[int]]:
    stride = max(1, elements // _SAMPLES)
    while math.gcd(stride, width) > 1:
        stride -= 1
    return (-(-elements // stride),), (stride,)


class Sample:
    """A copy of W's `sample`."""

    __slots__ = ("_kept", "_layout")

    def __init__(self, weight: Tensor) -> None:
        elements = sample(weight)
        # To find it anew takes 15 of a token's 400 us where the layer's products have emptied the caches.
        self._layout = elements.size(), elements.stride()
        self._kept = elements.detach().clone()

    def is_held_by(self, weight: Tensor) -> bool:
        """Whether a tensor of the same shape and strides holds the same there."""
        return torch.equal(weight.as_strided(*self._layout, weight.storage_offset()), self._kept)


def _memcmp() -> Any:
    """The C library's, which reads two tensors several times as fast as `torch.equal` where they are large."""
    try:
        function = ctypes.CDLL(None).memcmp
    except (AttributeError, OSError, TypeError):  # Windows names its C library
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return function


_MEMCMP = _memcmp()


# Larger tensors are compared by sums, half the reading: lora_A and lora_B at rank 384 (2048x2048, float32, two cores,
# caches emptied by a product) 193 us for 327, a token's whole call 1.32 of LoRA's for 1.38, at 4096x4096 in bf16 1.12
# for 1.29. At rank 64 they are 48 us for 59.
_COPIED_BYTES = 1 << 20
_WORDS = 32


class Record:
    """What a tensor held: a copy, or of a large one the sum of each line of 64-bit words.

    A sum does not see words that change places within their line, 256 bytes, nor an even number of flips of their
    highest bits.
    """

    __slots__ = ("_address", "_kept", "_kept_nbytes", "_summed")

    def __init__(self, tensor: Tensor) -> None:
        words = _words(tensor)
        self._summed = words is not None
        self._kept = tensor.detach().clone() if words is None else words.sum(1)
        self._kept_nbytes = self._kept.nbytes
        readable = _MEMCMP is not None and tensor.device.type == "cpu" and self._kept.is_contiguous()
        self._address = self._kept.data_ptr() if readable else 0

    def is_held_by(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same dtype holds the same."""
        if self._summed:
            words = _words(tensor)
            if words is None:
                return False
            tensor = words.sum(1)
        if self._address and tensor.nbytes == self._kept_nbytes and tensor.is_contiguous():
            return not _MEMCMP(tensor.data_ptr(), self._address, self._kept_nbytes)
        return torch.equal(tensor, self._kept)


def _words(tensor: Tensor) -> Tensor | None:
    """The lines of a large tensor; None where it is to be copied, as those of float64, whose signs are highest bits."""
    size = tensor.nbytes
    if size <= _COPIED_BYTES or size % (8 * _WORDS) or not tensor.is_contiguous() or tensor.element_size() > 4:
        return None
    if tensor.storage_offset() * tensor.element_size() % 8:
        return None
    return tensor.detach().view(-1).view(torch.int64).view(-1, _WORDS)


def digest(tensor: Tensor) -> Tensor:
    """64 bits of every million elements, each mixed with its place: for whoever keeps no copy to compare with."""
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
