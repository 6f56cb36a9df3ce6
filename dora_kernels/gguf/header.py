"""Check that the header of a GGUF file is complete, in bounded time.

The package `gguf` trusts the counts in a file, and on a damaged file it keeps reading beyond the end. So the header is
first walked through here, by its lengths alone. Layout: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from dora_kernels.core.shown import LONGEST

# Bytes of a value by GGUF's type number. Strings and arrays have lengths instead.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

MOST = 100_000
"""Limit for values, elements of arrays and tensors, each. An adapter has one element and three tensors per layer."""

_DIMENSIONS = 4


def check_header(file: Path) -> None:
    """Raise ValueError, naming the file, if its header is incomplete or larger than an adapter's."""
    with file.open("rb") as opened:
        if file.stat().st_size < 24:
            raise ValueError(f"{file}: truncated, or not a GGUF file: it has {file.stat().st_size} bytes")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                _Walk(content).header()
            except (ValueError, struct.error) as error:
                raise ValueError(f"{file}: truncated, or not a GGUF adapter: {error}") from error


class _Walk:
    """A position in the header that only moves forward."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._elements = content, 4, 0
        if content[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self._order = "<" if int.from_bytes(content[4:8], "little") < 1 << 16 else ">"

    def header(self) -> None:
        self._number("I")  # the version
        tensors, values = self._count("tensors"), self._count("values")
        for _ in range(values):
            self._string(LONGEST)
            self._value(self._number("I"))
        for _ in range(tensors):
            self._string(LONGEST)
            dimensions = self._number("I")
            if dimensions > _DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            sizes = [self._number("Q") for _ in range(dimensions)]
            if math.prod(max(1, size) for size in sizes) > 8 * len(self._content):
                raise ValueError(f"a tensor of shape {sizes[::-1]}, which is larger than the file")
            self._skip(4 + 8)  # type and offset

    def _value(self, kind: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _STRING:
            self._string(len(self._content))
        elif kind == _ARRAY:
            inner, count = self._number("I"), self._count("elements")
            self._elements += count
            if self._elements > MOST:
                raise ValueError(f"arrays of more than {MOST} elements")
            if inner in _SIZES:
                self._skip(count * _SIZES[inner])
            elif inner == _STRING:
                for _ in range(count):
                    self._string(len(self._content))
            else:
                raise ValueError(f"an array of values of type {inner}")
        else:
            raise ValueError(f"a value of type {kind}")

    def _string(self, longest: int) -> None:
        length = self._number("Q")
        if length > longest:
            raise ValueError(f"a text of {length} bytes")
        self._skip(length)

    def _count(self, what: str) -> int:
        count = self._number("Q")
        if count > MOST:
            raise ValueError(f"{count} {what}")
        return count

    def _number(self, kind: str) -> int:
        (number,) = struct.unpack_from(self._order + kind, self._content, self._at)
        self._skip(struct.calcsize(kind))
        return int(number)

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._content):
            raise ValueError("it ends inside its header")
