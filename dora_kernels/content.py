"""Whether a weight still holds what it held: what the norm cache compares, since versions do not tell.

Of lora_A and lora_B everything is compared, of W a sample.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import random
from typing import Any

import torch
from torch import Tensor

# Whoever writes more than 1/64 of W in one piece is seen. 256 took 16 to 22 us where a product had emptied the caches,
# 3 to 5 % of a token's whole call at 2048x2048 in bf16 (1.21 of LoRA's, 1.15 with 64), for a weight that is frozen.
_SAMPLES = 64

# Copies of larger tensors are not worth their reading, where there is a product of bytes that is quick: PyTorch's for
# x86. MEASURED
_COPIED_BYTES = 1 << 17
_LINE = 256
_PROJECTS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()

# A factor for each byte of a line, none of them 0. Those above 64 would saturate on processors without VNNI.
_FACTORS = torch.tensor(
    [sign * (37 * place % 63 + 1) for place, sign in enumerate(random.Random(0).choices((-1, 1), k=_LINE))],
    dtype=torch.int8, device="cpu",
).unsqueeze(1)  # fmt: skip


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
    """What a tensor held: a copy, or of a large one a 32-bit projection of each line of 256 bytes.

    Each byte has a factor of its own, so that a byte that changes is always seen. Several that do in one line are missed
    about once in 100 000 times (signs alone, once in 1000), and those of more lines only where each of them is.
    """

    __slots__ = ("_address", "_kept", "_kept_nbytes", "_projected")

    def __init__(self, tensor: Tensor) -> None:
        projection = _projection(tensor)
        self._projected = projection is not None
        self._kept = tensor.detach().clone() if projection is None else projection
        self._kept_nbytes = self._kept.nbytes
        readable = _MEMCMP is not None and tensor.device.type == "cpu" and self._kept.is_contiguous()
        self._address = self._kept.data_ptr() if readable else 0

    def is_held_by(self, tensor: Tensor) -> bool:
        """Whether a tensor of the same dtype holds the same."""
        if self._projected:
            projection = _projection(tensor)
            if projection is None:
                return False
            tensor = projection
        if self._address and tensor.nbytes == self._kept_nbytes and tensor.is_contiguous():
            return not _MEMCMP(tensor.data_ptr(), self._address, self._kept_nbytes)
        return torch.equal(tensor, self._kept)


def _projection(tensor: Tensor) -> Tensor | None:
    """Of every line of a large tensor; None where it is to be copied."""
    size = tensor.nbytes
    if not _PROJECTS or size <= _COPIED_BYTES or size % _LINE or tensor.device.type != "cpu":
        return None
    if not tensor.is_contiguous():
        return None
    return torch._int_mm(tensor.detach().view(-1).view(torch.int8).view(-1, _LINE), _FACTORS)


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
