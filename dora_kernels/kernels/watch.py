"""Check a whole model at once: which of many groups of tensors have changed since the last call.

A table on the device has one row for every chunk of a tensor: its address, its layout, and its group. One launch, with
a program per row, takes the chunk's fingerprint (fingerprint.py) and compares it with that of the last call. If they
differ it writes the number of the call into the group's flag. The host reads the flags once.

Bytes: every watched element, 64 of the table and 8 to 16 of the fingerprints for each chunk of at most 64 KiB, and 4
for each group, which the host reads too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import watch_config
from dora_kernels.kernels.fingerprint import bits_of, terms, total
from dora_kernels.kernels.launch import Plan, launch

# How a chunk is laid out in memory.
_HALVES, _WORDS, _ALIGNED_WORDS = range(3)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["call"])
def compare_chunks(table_ptr, seen_ptr, flags_ptr, call, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Compare a chunk's fingerprint with the last one; if they differ, write `call` into its group's flag."""
    pid = tl.program_id(0).to(tl.int64)
    row = table_ptr + pid * 8
    address = tl.load(row)
    layout = tl.load(row + 1)
    start = tl.load(row + 2)
    stop = tl.minimum(start + CHUNK, tl.load(row + 3))
    width = tl.load(row + 4)
    stride_row = tl.load(row + 5)
    stride_column = tl.load(row + 6)
    group = tl.load(row + 7)
    first = tl.zeros((BLOCK,), tl.int32)
    second = tl.zeros((BLOCK,), tl.int32)
    lanes = tl.arange(0, BLOCK)
    if layout == 2:
        # Whole blocks need no mask, which keeps loads at 16 bytes.
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + tl.multiple_of(start, 16)
        whole = (stop - start) // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            one, other = terms(tl.load(words + at + lanes), (start + at + lanes).to(tl.int32))
            first += one
            second += other
        if whole < stop - start:
            mask = lanes < stop - start - whole
            one, other = terms(tl.load(words + whole + lanes, mask=mask, other=0), (start + whole + lanes).to(tl.int32))
            first += tl.where(mask, one, 0)
            second += tl.where(mask, other, 0)
    else:
        for at in range(start, stop, BLOCK):
            position = at + lanes
            mask = position < stop
            offs = position // width * stride_row + position % width * stride_column
            if layout == 1:
                x = tl.load(address.to(tl.pointer_type(tl.int32)) + offs, mask=mask, other=0)
            else:
                x = bits_of(tl.load(address.to(tl.pointer_type(tl.int16)) + offs, mask=mask, other=0))
            one, other = terms(x, position.to(tl.int32))
            first += tl.where(mask, one, 0)
            second += tl.where(mask, other, 0)
    sum_first = total(first)
    sum_second = total(second)
    seen = seen_ptr + 2 * pid
    if (tl.load(seen) != sum_first) | (tl.load(seen + 1) != sum_second):
        tl.store(seen, sum_first)
        tl.store(seen + 1, sum_second)
        tl.store(flags_ptr + group, call.to(tl.int32))


class Watch:
    """Tells which groups of tensors have changed since the last call.

    It detects every write, by any means, unless a chunk's 64-bit fingerprint stays the same, which happens to random
    changes once in 2**64. It does not detect a change that is undone before the next call, a write that is not yet
    ordered with the current stream, or a tensor that was replaced by another one; `holds` detects the latter.

    It keeps the tensors' memory alive. But memory that their storages give up (``storage.resize_(0)``, as sharding
    libraries do) must not be read: call `holds` before `changed` if that can happen.

    Args:
        groups: For each group its tensors: float32, bfloat16 or float16, all on one device, of any strides if they have
            at most two dimensions, else dense.

    Raises:
        ValueError: a tensor has another dtype, device or layout.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        self._tensors = [[one.detach() for one in group] for group in groups]
        self._known = [_described(one) for group in groups for one in group]
        self._sizes = [len(group) for group in groups]
        self._device = next((one.device for group in groups for one in group), torch.device("cpu"))
        rows = [row for index, group in enumerate(self._tensors) for one in group for row in self._rows(one, index)]
        self._table = torch.tensor(rows, dtype=torch.int64).to(self._device)
        self._seen = torch.zeros(len(rows), 2, dtype=torch.int32, device=self._device)
        self._flags = torch.zeros(len(groups), dtype=torch.int32, device=self._device)
        self._call = 0
        self._asked = False
        self._in_order = threading.Lock()

    def changed(self) -> list[int]:
        """Return the indices of the groups that have changed since the last call; at the first call, of all groups.

        The host waits for the device.
        """
        with self._in_order:
            asked, self._asked = self._asked, False  # on a failure the fingerprints are unknown
            self._call = self._call % 0x7FFFFFFF + 1
            if len(self._table):
                tensors = self._table, self._seen, self._flags
                launch(compare_chunks, _plan(), (len(self._table),), tensors, (self._call,))
            flags = self._flags.tolist()
            self._asked = True
        if not asked:
            return list(range(len(flags)))
        return [index for index, call in enumerate(flags) if call == self._call] if self._call in flags else []

    def holds(self, groups: Sequence[Sequence[Tensor]]) -> bool:
        """True if these are the same groups: tensors with the same addresses, shapes and strides."""
        return self._sizes == [len(group) for group in groups] and self._known == [
            _described(one) for group in groups for one in group
        ]

    def _rows(self, tensor: Tensor, group: int) -> Iterator[tuple[int, ...]]:
        """Yield the table's rows for a tensor."""
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"groups[{group}]: expected float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != self._device:
            raise ValueError(f"groups[{group}]: expected all tensors on {self._device}, got one on {tensor.device}")
        address, elements, halves = tensor.data_ptr(), tensor.numel(), tensor.element_size() == 2
        if torch.ops.aten.is_non_overlapping_and_dense(tensor):
            # In the order of memory; two 16-bit elements are read as one 32-bit word.
            pairs = halves and address % 4 == 0
            if pairs and elements % 2:
                yield (address + 2 * elements - 2, _HALVES, 0, 1, 1, 0, 1, group)
            layout = _HALVES if halves and not pairs else _WORDS if address % 16 else _ALIGNED_WORDS
            size = elements // 2 if pairs else elements
            strides: tuple[int, ...] = max(size, 1), 0, 1
        elif tensor.dim() <= 2:
            matrix = tensor if tensor.dim() == 2 else tensor.unsqueeze(0)
            layout, size = _HALVES if halves else _WORDS, elements
            strides = matrix.shape[1], *matrix.stride()
        else:
            raise ValueError(
                f"groups[{group}]: expected at most two dimensions of a tensor with gaps, got shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        for start in range(0, size, watch_config().CHUNK):
            yield (address, layout, start, size, *strides, group)


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


@functools.cache
def _plan() -> Plan:
    return Plan((), (), watch_config())
