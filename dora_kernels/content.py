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

# Copies of larger tensors are not worth their reading. Two cores, caches emptied by a 2048x2048 product, lora_A and
# lora_B in float32: rank 16 (131 kB each) 47 us compared with copies, 25 to 35 by sums; rank 64 85 and 41; rank 384
# 401 and 122 (lines of 16 words 166, of 64 words 113).
_COPIED_BYTES = 1 << 17
_WORDS = 32


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


class Record:
    """What a tensor held: a copy, or of a large one the sum of each line of 64-bit words.

    A sum does not see words that change places within their line, 256 bytes.
    """

    __slots__ = ("_address", "_kept", "_nbytes", "_summed")

    def __init__(self, tensor: Tensor) -> None:
        words = _words(tensor)
        self._summed = words is not None
        self._kept = tensor.detach().clone() if words is None else words.sum(1)
        self._nbytes = self._kept.nbytes
        readable = _MEMCMP is not None and tensor.device.type == "cpu" and self._kept.is_contiguous()
        self._address = self._kept.data_ptr() if readable else 0

    def is_held_by(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same dtype holds the same."""
        if self._summed:
            words = _words(tensor)
            if words is None:
                return False
            tensor = words.sum(1)
        if self._address and tensor.nbytes == self._nbytes and tensor.is_contiguous():
            return not _MEMCMP(tensor.data_ptr(), self._address, self._nbytes)
        return torch.equal(tensor, self._kept)


def _words(tensor: Tensor) -> Tensor | None:
    """The lines of a large tensor."""
    size = tensor.nbytes
    if size <= _COPIED_BYTES or size % (8 * _WORDS) or not tensor.is_contiguous():
        return None
    if tensor.storage_offset() * tensor.element_size() % 8:
        return None
    return tensor.detach().view(-1).view(torch.int64).view(-1, _WORDS)
