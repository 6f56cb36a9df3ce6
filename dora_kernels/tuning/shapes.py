"""The linear layers of a model, as shapes to tune for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dora_kernels.core.validation import check_size
from dora_kernels.modules import AdaptedLayer, LoRALinear, dequantize

Shape = tuple[int, int, int]
"""out_features, in_features, rank."""


def shapes_of(model_or_shapes: Any, rank: int) -> tuple[list[Shape], torch.device | None, torch.dtype | None]:
    """Return the distinct shapes, and a model's device and dtype; None for shapes."""
    if not isinstance(model_or_shapes, nn.Module):
        return _given(model_or_shapes), None, None
    adapted, plain = [], []
    first: Any = None
    inside: set[int] = set()
    for module in model_or_shapes.modules():
        found = _adapters(module)
        if found:
            inside |= {id(child) for child in module.modules()}
            adapted += found
            first = module.base_layer if first is None else first
        elif isinstance(module, nn.Linear) and id(module) not in inside:
            plain.append((module.out_features, module.in_features, rank))
            first = module if first is None and not adapted else first
    shapes = list(dict.fromkeys(adapted or plain))
    weight = None if first is None else dequantize.carrier(first)
    if not shapes or weight is None:
        raise ValueError("model_or_shapes: the model has no linear layers")
    dtype = getattr(getattr(first, "weight", weight), "dtype", weight.dtype)
    return shapes, weight.device, dtype if dtype.is_floating_point else getattr(first, "compute_dtype", None)


def quantised_of(model_or_shapes: Any, rank: int) -> dict[Shape, nn.Module]:
    """For each shape a quantised layer of the model, of those that can be dequantised."""
    found: dict[Shape, nn.Module] = {}
    for module in model_or_shapes.modules() if isinstance(model_or_shapes, nn.Module) else ():
        shapes, base = _adapters(module), getattr(module, "base_layer", module)
        if isinstance(module, nn.Linear) and not shapes:
            shapes = [(module.out_features, module.in_features, rank)]
        if shapes and dequantize.row_blocks(base) is not None:
            found |= {shape: found.get(shape, base) for shape in shapes}
    return found


def _adapters(module: nn.Module) -> list[Shape]:
    """The shapes of this package's linear layers and of PEFT's."""
    if isinstance(module, AdaptedLayer):
        return [(module.out_features, module.in_features, module.rank)] if isinstance(module, LoRALinear) else []
    factors, base = getattr(module, "lora_A", None), getattr(module, "base_layer", None)
    weight = dequantize.carrier(base) if isinstance(base, nn.Module) else None
    if not isinstance(factors, nn.ModuleDict) or weight is None or weight.dim() != 2:
        return []
    return [
        (module.out_features, module.in_features, one.out_features)  # type: ignore[misc]
        for one in factors.values()
        if isinstance(one, nn.Linear)
    ]


def _given(shapes: Iterable[Any]) -> list[Shape]:
    if isinstance(shapes, str):
        raise TypeError(f"model_or_shapes: expected a model, or a list of shapes, got the string {shapes!r}")
    found = []
    for shape in shapes:
        if not isinstance(shape, (tuple, list)) or len(shape) != 3:
            raise ValueError(f"model_or_shapes: expected a model, or (out_features, in_features, rank), got {shape!r}")
        if any(isinstance(size, int) and size < 1 for size in shape):
            raise ValueError(f"model_or_shapes: expected out_features, in_features, rank of at least 1, got {shape!r}")
        for size in shape:
            check_size(size, "model_or_shapes", "ints: (out_features, in_features, rank)")
        found.append((int(shape[0]), int(shape[1]), int(shape[2])))
    if not found:
        raise ValueError("model_or_shapes: no shapes given")
    return list(dict.fromkeys(found))
