"""Reusing a layer's weight norm while nothing it depends on has changed. docs/design.md, "Reusing the norm".

Tensor versions alone are no safe key: fused and 8-bit optimizers, EMA swaps and writes through ``.data`` do not move
them. A kept norm is used only if the tensors, their addresses and versions, the scaling and the training flag are
those it was computed for, and either

* *comparison* (torch backend on the CPU, W frozen): lora_A, lora_B and a sample of W equal, bit for bit, the copies
  taken then; or
* *proof* (elsewhere): the layer is training, no optimizer has stepped since, and no gradient of lora_A, lora_B or W has
  been produced since, or all that train are known to belong to a live optimizer whose steps are seen.

Where neither knows, the triton backend asks the device (`kernels.KeptNorm`), which compares fingerprints and computes
the norm only if they differ. Everything else is a recomputation, in the factored form from a |W|² per row that is kept
by the same means. A norm handed out is never written again, so a backward's saved norm is a snapshot.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dora_kernels import linear, ops, torch_backend
from dora_kernels.reference import accumulation_dtype

# Whoever writes more than 1/256 of W in one piece is seen. An element of each row of a 1536x576 weight instead, each
# from another page of memory, made a generated token 2 to 4 % dearer.
_SAMPLES = 256

_steps = 0
# Live optimizers that were seen to step, each with the ids of its parameters, which it keeps alive, and whether a step
# was captured in a graph, whose replays run nothing in Python.
_stepped: dict[int, tuple[weakref.ref[torch.optim.Optimizer], frozenset[int], bool]] = {}
_hooked = False
_enabled = True


def norm_reuse() -> bool:
    """Whether weight norms are reused in this process."""
    return _enabled


def set_norm_reuse(enabled: bool) -> None:
    """Turn the reuse of weight norms on (the default) or off in this process."""
    global _enabled
    _enabled = bool(enabled)


def invalidate(module: nn.Module) -> None:
    """Forget every kept norm in `module` and its children: for whoever writes weights in a way nothing can see.

    Raises:
        TypeError: `module` is no `torch.nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    for cache in _caches(module):
        cache.invalidate()


def _caches(module: nn.Module) -> Iterator[NormCache]:
    for child in module.modules():
        for value in vars(child).values():
            for cache in value.values() if isinstance(value, dict) else (value,):
                if isinstance(cache, NormCache):
                    yield cache


def _before_step(*_: Any) -> None:
    """A step that is interrupted half-way has written too."""
    global _steps
    _steps += 1


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    global _steps
    _steps += 1
    key = id(optimizer)
    known = _stepped.get(key)
    captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if known is not None and known[0]() is optimizer:
        captured = captured or known[2]
    ids = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    _stepped[key] = (weakref.ref(optimizer, functools.partial(_forget, key)), ids, captured)


def _forget(key: int, _: Any) -> None:
    _stepped.pop(key, None)


def _watch_optimizers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)


def _owned(parameter: Tensor) -> bool:
    key = id(parameter)
    captured = [captured for _, ids, captured in list(_stepped.values()) if key in ids]
    return bool(captured) and not any(captured)


def _sample(weight: Tensor) -> Tensor:
    """At least `_SAMPLES` elements of W, or all, evenly spread over memory and over both dimensions: a view."""
    rows = weight if weight.is_contiguous() else weight.t()
    if not rows.is_contiguous():
        return weight.diagonal()
    stride = max(1, rows.numel() // _SAMPLES)
    while math.gcd(stride, rows.shape[1]) > 1:
        stride -= 1
    return rows.view(-1)[::stride]


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that stays: a transposed weight is a new view at every call."""
    return tensor if tensor._base is None else tensor._base


def safe_divisor(norm: Tensor) -> Tensor:
    """The norm with infinity where it is 0, so that dividing by it gives 0 there."""
    return torch.threshold(norm, 0.0, torch.inf)  # keeps NaN


class NormEntry:
    """One computed norm, and what it was computed from.

    It keeps these tensors alive, until the layer's next call: `torch.utils.swap_tensors` refuses one with a weak
    reference.
    """

    __slots__ = ("backward_seen", "copies", "divisor", "key", "steps", "tensors")

    divisor: Tensor

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], key: tuple[Any, ...]) -> None:
        self.tensors = tuple(_owner(t) for t in tensors)
        self.key = key
        self.steps = _steps
        self.backward_seen = False
        self.copies: tuple[Tensor, ...] | None = None

    def is_of(self, tensors: tuple[Tensor, Tensor, Tensor], key: tuple[Any, ...]) -> bool:
        weight, lora_A, lora_B = self.tensors
        return (
            self.key == key
            and weight is _owner(tensors[0])
            and lora_A is _owner(tensors[1])
            and lora_B is _owner(tensors[2])
        )

    def is_fresh(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, training: bool) -> bool:
        if self.copies is not None:
            a, b, sample = self.copies
            if not (torch.equal(lora_A, a) and torch.equal(lora_B, b) and torch.equal(_sample(weight), sample)):
                return False
            if not weight.requires_grad:
                return True
        return training and self.steps == _steps and self._unseen_writer_excluded(weight, lora_A, lora_B)

    def _unseen_writer_excluded(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
        if lora_A.device.type != "cpu" and torch.distributed.is_available() and torch.distributed.is_initialized():
            return False  # a sharded parameter may be gathered anew at the same address
        return not self.backward_seen or all(_owned(t) for t in (weight, lora_A, lora_B) if t.requires_grad)


class NormCache:
    """The kept norm of one layer and adapter, at most one entry per device. Copied and pickled empty."""

    def __init__(self) -> None:
        self._entries: dict[torch.device, NormEntry] = {}
        self._weight_square: tuple[Tensor, tuple[Any, ...], Tensor, Tensor] | None = None
        self._on_device: dict[tuple[torch.device, int], tuple[Tensor, tuple[Any, ...], Any]] = {}
        self.computed = 0
        self.reused = 0
        self.asked = 0
        """Calls in which the device decides; only it knows which way."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[Callable[[], NormCache], tuple[()]]:
        return NormCache, ()

    def invalidate(self) -> None:
        self._entries = {}
        self._weight_square = None
        self._on_device = {}

    def divisor(
        self,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        magnitude_axis: str,
        training: bool,
        backend: str,
    ) -> tuple[Tensor, NormEntry | None]:
        """``safe_divisor`` of the layer's norm, and the entry that wants to hear of a backward."""
        tensors = (weight, lora_A, lora_B)
        if not _enabled or _reuse_impossible(weight, lora_A, lora_B):
            self.computed += 1
            return compute_divisor(*tensors, scaling, magnitude_axis, backend), None
        device = weight.device
        key = (
            weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(), weight._version, lora_A._version, lora_B._version,
            weight.shape, weight.stride(), scaling, magnitude_axis, training, backend, _stream(device),
        )  # fmt: skip
        previous = self._entries.get(device)
        if previous is not None and previous.is_of(tensors, key) and previous.is_fresh(*tensors, training):
            self.reused += 1
            return previous.divisor, previous
        _watch_optimizers()
        entry = NormEntry(tensors, key)
        # A step is the end of what was kept: there is nothing to ask.
        stepped = training and (previous is None or previous.steps != _steps)
        with torch.inference_mode(False), torch.no_grad():
            if backend == "triton" and not stepped and linear.primitives(backend).is_worth_keeping(weight):
                self.asked += 1
                entry.divisor = safe_divisor(self._ask_device(weight, lora_A, lora_B, scaling, magnitude_axis))
            else:
                self.computed += 1
                square = None
                sample = _sample(weight)
                if backend == "torch" and device.type == "cpu":
                    sample = sample.clone()
                    entry.copies = (lora_A.clone(), lora_B.clone(), sample)
                if not weight.requires_grad:
                    square = self._row_square(*tensors, magnitude_axis, backend, sample)
                entry.divisor = compute_divisor(*tensors, scaling, magnitude_axis, backend, square)
        self._entries = {**self._entries, device: entry}
        return entry.divisor, entry

    def _row_square(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude_axis: str, backend: str, sample: Tensor
    ) -> Tensor | None:
        """|W|² per row or column where the norm is factored, kept while W is the same and its sample equal."""
        if not linear.primitives(backend).is_factored(*ops.axis_first(weight, lora_A, lora_B, magnitude_axis)):
            return None
        if backend == "triton":
            nothing = lora_A[:0].to(weight.dtype), lora_B[:, :0].to(weight.dtype)
            return self._ask_device(weight, *nothing, 0.0, magnitude_axis).square_()
        if weight.device.type != "cpu":
            return None
        dtype = accumulation_dtype(weight, lora_A, lora_B)
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), magnitude_axis, dtype)
        kept = self._weight_square
        if kept is None or kept[0] is not _owner(weight) or kept[1] != key or not torch.equal(kept[2], sample):
            rows = weight if magnitude_axis == "out" else weight.t()
            square = torch_backend.row_square(rows, dtype)
            kept = self._weight_square = (_owner(weight), key, sample, square)
        return kept[3]

    def _ask_device(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str
    ) -> Tensor:
        """The norm, computed again if the device finds A, B or W's sample changed since this was last asked."""
        rows = ops.axis_first(weight, lora_A, lora_B, magnitude_axis)
        device, rank = weight.device, lora_A.shape[0]
        # Of A and B the device sees every bit, of W only the sample.
        key = (
            weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype,
            lora_A.dtype, lora_B.dtype, scaling, magnitude_axis, _stream(device),
        )  # fmt: skip
        known = self._on_device.get((device, rank))
        if known is None or known[0] is not _owner(weight) or known[1] != key:
            known = _owner(weight), key, linear.primitives("triton").KeptNorm(rows[0].shape[0], scaling, device)
            self._on_device = {**self._on_device, (device, rank): known}
        norm: Tensor = known[2].norm(rows[0], _sample(weight), *rows[1:])
        return norm


def compute_divisor(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    weight_square: Tensor | None = None,
) -> Tensor:
    """`safe_divisor` of a norm computed now."""
    with torch.no_grad():
        return safe_divisor(ops.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis, backend, weight_square))


def _stream(device: torch.device) -> int:
    """A norm computed on one stream is not there yet for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _reuse_impossible(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    if weight.is_inference() or lora_A.is_inference() or lora_B.is_inference():
        return True
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace
        return True
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
