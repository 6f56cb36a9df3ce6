"""Read a quantised base layer's weight, one block of rows at a time: bitsandbytes, HQQ and torchao.

None of these libraries is imported. Other layers show their weight only through their forward: `through_forward`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core.products import BLOCK_ELEMENTS
from dora_kernels.engine.merged import joined

Blocks = Iterator[tuple[slice, Tensor]]


def row_blocks(base: nn.Module) -> Callable[[], Blocks] | None:
    """Return a function that yields ``rows, W[rows]`` for all of W at each call; None for an unknown format."""
    weight: Any = base._parameters.get("weight")
    kind = type(weight)
    if kind.__module__.startswith("bitsandbytes."):
        if kind.__name__ == "Params4bit" and getattr(weight, "quant_state", None) is not None:
            packed = getattr(weight.quant_state, "packing_format_for_cpu", False)
            return lambda: (_cpu_4bit if packed else _bnb_4bit)(weight, weight.quant_state)
        if kind.__name__ == "Int8Params":
            return lambda: _bnb_8bit(weight, base)
    if kind.__module__.startswith("torchao."):
        return lambda: _torchao(weight)
    if hasattr(base, "W_q") and isinstance(getattr(base, "meta", None), dict):
        return lambda: _hqq(base)
    return None


def carrier(base: nn.Module) -> Tensor | None:
    """The tensor that changes if the base weight does: the packed weight, or else the layer's largest tensor."""
    weight = base._parameters.get("weight")
    if weight is None and isinstance(getattr(base, "W_q", None), Tensor):
        return base.W_q  # type: ignore[return-value]
    while weight is not None and hasattr(weight, "__tensor_flatten__"):
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    if weight is not None:
        return weight
    tensors = [*base.parameters(), *base.buffers()]
    return max(tensors, key=lambda t: t.numel()) if tensors else None


def dequantized(base: nn.Module) -> Tensor | None:
    """All of W, dequantised, for merging."""
    blocks = row_blocks(base)
    return None if blocks is None else joined(blocks())


def _steps(rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    step = max(multiple, BLOCK_ELEMENTS // max(columns, 1) // multiple * multiple)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _bnb_4bit(weight: Any, state: Any) -> Blocks:
    """4-bit blocks: two elements per byte in the order of W, with one scale for each `blocksize` elements."""
    rows, columns = state.shape
    read = bnb_4bit_elements(weight, state)
    multiple = next(n for n in range(1, 2 * state.blocksize + 1) if n * columns % (2 * state.blocksize) == 0)
    for part in _steps(rows, columns, multiple):
        yield part, read(part.start * columns, part.stop * columns).view(-1, columns)


def bnb_4bit_elements(weight: Tensor, state: Any) -> Callable[[int, int], Tensor]:
    """Return a function that dequantises the elements from one index to another, in the order of W."""
    from bitsandbytes import functional

    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    absmax, packed = absmax.float(), weight.data.view(torch.uint8).view(-1)
    total = math.prod(state.shape)

    def read(start: int, stop: int) -> Tensor:
        step = 2 * state.blocksize
        first, last = start // step * step, min(-(-stop // step) * step, total)
        of_part = copy.copy(state)
        of_part.absmax = absmax[first // state.blocksize : -(-last // state.blocksize)]
        of_part.nested, of_part.state2, of_part.offset = False, None, None
        of_part.shape = torch.Size((last - first,))
        whole = functional.dequantize_4bit(packed[first // 2 : -(-last // 2)].view(-1, 1), of_part)
        return whole.view(-1)[start - first : stop - first]

    return read


def _cpu_4bit(weight: Any, state: Any) -> Blocks:
    """4-bit blocks as AVX512-BF16 CPUs repack them in evaluation: groups of 32 rows, the low half of each 64 first."""
    rows, columns = state.shape
    for part in _steps(rows, columns, 32):
        size = part.stop - part.start
        packed = weight.data[part].reshape(-1, 32)
        index = torch.cat([packed & 0xF, packed >> 4], 1).view(size // 32, columns // 2, 32, 2).transpose(1, 2)
        scale = state.absmax[:, part].t().repeat_interleave(state.blocksize, 1)
        yield part, state.code[index.reshape(size, columns).int()] * scale


def _bnb_8bit(weight: Any, base: Any) -> Blocks:
    """8-bit blocks: int8, with one scale per row."""
    scale = next(s for s in (base.state.SCB, weight.SCB, getattr(weight, "_scb", None)) if s is not None)
    for part in _steps(*weight.shape):
        yield part, weight.data[part] * (scale[part].to(weight.device).float() / 127).unsqueeze(1)


def _torchao(weight: Any) -> Blocks:
    for part in _steps(*weight.shape):
        yield part, weight[part].dequantize()


def _hqq(base: Any) -> Blocks:
    """HQQ blocks: a packed row holds several rows of the grouped weight, spaced by the number of packed rows."""
    from hqq.core.quantize import Quantizer

    packed, meta = base.W_q.data, dict(base.meta)
    rows, columns = meta["shape"]
    for name, place in (("zero", 0), ("scale", 1)):
        if "zero_scale" in meta:
            both = meta["zero_scale"].to(packed.device)
            meta[f"{name}_q" if both.dtype == torch.uint8 else name] = both[place]
        if meta.get(f"quant_{name}"):
            meta[name] = Quantizer.dequantize(meta[f"{name}_q"].to(packed.device), meta[f"meta_{name}"])
    if meta["packing"] and meta["view_as_float"]:
        packed = packed.view(meta["unpack_view_dtype"])
        meta["view_as_float"] = False
    width = packed.shape[1]  # the width of a row of the grouped weight
    segments = 1 if not meta["packing"] else Quantizer.unpack[meta["packing"]](packed[:1]).shape[0]
    multiple = next(n for n in range(1, columns + 1) if n * width % columns == 0)
    per_segment = packed.shape[0] * width
    if per_segment % columns or per_segment * segments != rows * columns:  # segments that end within a row of W
        yield slice(0, rows), Quantizer.dequantize(packed, meta)
        return
    for part in _steps(packed.shape[0], width * segments, multiple):
        size = part.stop - part.start
        of_part = {**meta, "shape": (segments * size, width)}
        if meta["axis"] == 1:
            for name in ("zero", "scale"):
                if isinstance(meta[name], Tensor) and meta[name].dim() == 2:
                    of_part[name] = meta[name].view(segments, packed.shape[0], 1)[:, part].reshape(-1, 1)
        if meta["nbits"] == 3:  # dequantize cuts a 3-bit result to group_size
            of_part["group_size"] = segments * size if meta["axis"] == 0 else width
        block = Quantizer.dequantize(packed[part], of_part).view(segments, -1, columns)
        first, length = part.start * width // columns, size * width // columns
        for segment in range(segments):
            start = segment * (per_segment // columns) + first
            yield slice(start, start + length), block[segment]


def through_forward(base: Any, like: Tensor, columns: int) -> Callable[[], Blocks]:
    """Blocks of *columns* of W, ``W[:, columns]`` transposed: the layer's outputs for rows of an identity matrix.

    Args:
        like: a tensor with the input's dtype and device.
    """

    def blocks() -> Blocks:
        bias = base.forward(like.new_zeros(1, columns))
        for part in _steps(columns, columns):
            size = part.stop - part.start
            identity = like.new_zeros(size, columns)
            identity[:, part].fill_diagonal_(1.0)
            yield part, base.forward(identity) - bias

    return blocks
