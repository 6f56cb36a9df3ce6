"""The dtypes of the computation: PEFT's rules for mixed dtypes and autocast."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of `tensors` is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, but faster if there is nothing to convert, which takes `to` a microsecond."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a layer's output: x's, or under autocast that of autocast, which does not change float64."""
    dtype, kind = x.dtype, x.device.type
    if dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def low_rank_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    """The dtype of the low-rank branch for an x in the compute dtype: the factor's dtype if that is wider, else x's.

    PEFT's layer casts x to the factor's dtype in the same way. Under autocast all products are in the compute dtype.
    """
    if factor.dtype == x.dtype:
        return x.dtype
    wider = torch.finfo(factor.dtype).bits > torch.finfo(x.dtype).bits
    return factor.dtype if wider and not autocast_enabled(x.device) else x.dtype


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU multiplies matrices of `dtype`: float32 for 16 bits where oneDNN has no such products.

    PyTorch's own loops then take 2 to 6 times as long for ``x Wᵀ`` and 20 to 30 times for ``dY W`` as float32 products
    with a copy of W in float32 (128 rows, 1024x256 and 256x512 in bfloat16, AVX2).
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    supported = None if name is None else getattr(torch.ops.mkldnn, name, None)
    return torch.float32 if supported is not None and not supported() else dtype


def autocast_enabled(device: torch.device) -> bool:
    """True if autocast is on for `device`; PyTorch raises when asked about the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class no_autocast:
    """Context manager that turns autocast off. It costs nothing if autocast is already off."""

    __slots__ = ("_context",)

    def __init__(self, device: torch.device) -> None:
        self._context = torch.autocast(device.type, enabled=False) if autocast_enabled(device) else None

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*exc)


_exact_inside: dict[str, tuple[int, Any]] = {}
"""By kind of device: how many blocks of `full_precision` are running, and the setting before the first."""

_setting = threading.Lock()


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 products in float32, whatever the user's setting (TF32 on CUDA, bfloat16 on the CPU).

    The setting is the process's: the first thread that enters changes it, and the last that leaves changes it back.
    """
    kind = device.type
    matmul: Any = torch.backends.cuda.matmul if kind == "cuda" else None
    if kind == "cpu" and not torch.compiler.is_compiling():
        matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since torch 2.9
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = exact if matmul is None else getattr(matmul, name)
    if kind not in _exact_inside and (before == exact or (before == "none" and kind == "cpu")):
        yield
        return
    with _setting:
        inside, before = _exact_inside.get(kind, (0, getattr(matmul, name)))
        _exact_inside[kind] = inside + 1, before
        setattr(matmul, name, exact)
    try:
        yield
    finally:
        with _setting:
            inside, before = _exact_inside.pop(kind)
            if inside > 1:
                _exact_inside[kind] = inside - 1, before
            else:
                setattr(matmul, name, before)
