"""Reusing a layer's weight norm while nothing it depends on has changed. docs/design.md, "Reusing the norm".

Tensor versions alone are no safe key: fused and 8-bit optimizers, EMA swaps and writes through ``.data`` do not move
them. A kept norm is used only if the tensors, their addresses and versions, the scaling and the training flag are
those it was computed for, and either

* *comparison* (torch backend on the CPU, W frozen): lora_A, lora_B and a sample of W hold what they held then
  (`content`); or
* *proof* (elsewhere): the layer is training, no optimizer has stepped since, no captured step may be replayed unseen,
  and no layer has produced a gradient of lora_A, lora_B or W since, or all that train are known to belong to a live
  optimizer whose steps are seen.

Where no proof is to be had, the triton backend asks the device (`kernels.KeptNorm`), which compares fingerprints and
computes the norm only if they differ. Everything else is a recomputation, in the factored form from a |W|² per row that
is kept by the same means. A norm handed out for a backward is never written again: it is a snapshot.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dora_kernels import linear, ops, torch_backend
from dora_kernels.content import Record, Sample, sample
from dora_kernels.reference import accumulation_dtype, full_precision, no_autocast

_steps = 0
_hooked = False
_enabled = True


def norm_reuse() -> bool:
    """Whether weight norms are reused in this process."""
    return _enabled


def set_norm_reuse(enabled: bool) -> None:
    """Turn the reuse of weight norms on (the default) or off in this process.

    Raises:
        TypeError: `enabled` is no bool.
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__}")
    _enabled = enabled


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
    if known is not None and known.optimizer() is optimizer:
        captured = captured or known.captured
    _stepped[key] = _Stepped(weakref.ref(optimizer, functools.partial(_forget, key)), captured)


def _forget(key: int, _: Any) -> None:
    _stepped.pop(key, None)


class _Stepped:
    """A live optimizer that was seen to step, and whether in a graph's capture: a replay runs nothing in Python."""

    def __init__(self, optimizer: weakref.ref[torch.optim.Optimizer], captured: bool) -> None:
        self.optimizer, self.captured = optimizer, captured
        self._lists: list[tuple[list[Tensor], int]] = []
        self._ids: frozenset[int] = frozenset()

    def owns(self, parameter: Tensor) -> bool:
        """Whether the parameter is among the optimizer's, as they are now."""
        optimizer = self.optimizer()
        if optimizer is None:
            return False
        lists = [group["params"] for group in optimizer.param_groups]
        if len(lists) != len(self._lists) or any(
            one is not known or len(one) != length for one, (known, length) in zip(lists, self._lists)
        ):
            self._lists = [(one, len(one)) for one in lists]
            self._ids = frozenset(id(parameter) for one in lists for parameter in one)
        return id(parameter) in self._ids


_stepped: dict[int, _Stepped] = {}


def _watch_optimizers() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)


def _owned(*tensors: Tensor) -> bool | None:
    """Whether every write to those that train is an optimizer's step that is seen; None: some have no optimizer yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # a sharded parameter may be gathered anew at the same address
    owners = [[one for one in list(_stepped.values()) if one.owns(t)] for t in tensors if t.requires_grad]
    if any(owner.captured for each in owners for owner in each):
        return False
    return True if all(owners) else None


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that stays: a transposed weight is a new view at every call."""
    return tensor if tensor._base is None else tensor._base


def safe_divisor(norm: Tensor) -> Tensor:
    """The norm with infinity where it is 0, so that dividing by it gives 0 there."""
    return torch.threshold(norm, 0.0, torch.inf)  # keeps NaN


def with_eps(divisor: Tensor, eps: float) -> Tensor:
    """``norm + eps`` from the norm's `safe_divisor`; finite where the norm is 0."""
    return torch.nan_to_num(divisor, nan=torch.nan, posinf=0.0) + eps


class NormEntry:
    """One computed norm, and what it was computed from.

    It keeps these tensors alive, until the layer's next call: `torch.utils.swap_tensors` refuses one with a weak
    reference.
    """

    __slots__ = ("backwards", "content", "divisor", "key", "steps", "sum", "tensors")

    divisor: Tensor
    sum: tuple[float, Tensor] | None
    """eps and the divisor with it added."""

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor], key: tuple[Any, ...]) -> None:
        self.tensors = tuple(_owner(t) for t in tensors)
        self.key = key
        self.steps = _steps
        self.backwards = linear.backwards
        self.content: tuple[Sample, Record, Record] | None = None
        self.sum = None

    def is_of(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
        w, a, b = self.tensors
        return (
            (w is weight or w is weight._base)
            and (a is lora_A or a is lora_A._base)
            and (b is lora_B or b is lora_B._base)
        )

    def is_fresh(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, training: bool, unheard: bool) -> bool:
        if self.content is not None:
            w, a, b = self.content
            if not (w.is_held_by(weight) and a.is_held_by(lora_A) and b.is_held_by(lora_B)):
                return False
            if not weight.requires_grad:
                return True
        if not training or self.steps != _steps:
            return False
        owned = _owned(weight, lora_A, lora_B)
        return owned or (owned is None and self.backwards == linear.backwards and not unheard)


class NormCache:
    """The kept norm of one layer and adapter, at most one entry per device. Copied and pickled empty."""

    def __init__(self) -> None:
        self._entries: dict[torch.device, NormEntry] = {}
        self._weight_square: tuple[Tensor, tuple[Any, ...], Sample, Tensor] | None = None
        self._on_device: dict[tuple[torch.device, int], tuple[Tensor, tuple[Any, ...], Any]] = {}
        self._captured: list[Any] = []
        self.unheard = False
        """Whether a backward runs through this norm that will not say so."""
        self.computed = 0
        self.reused = 0
        self.asked = 0
        """Calls in which the device decides; only it knows which way."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NormCache:
        return type(self)()

    def __reduce__(self) -> tuple[Callable[[], NormCache], tuple[()]]:
        return type(self), ()

    def invalidate(self) -> None:
        """Forget everything. What a graph was captured with stays: its replays write there."""
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
        norm: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """``safe_divisor`` of the layer's norm; for a backward a snapshot, else to be used at once.

        `norm` computes it where it is not the norm of a dense matrix ``W + s B A``; the tensors are then those that it
        depends on, of any shapes, and what is compared is compared on a GPU too, by the host.
        """
        tensors = (weight, lora_A, lora_B)
        device = weight.device
        entry = self._entries.get(device)
        known = entry is not None and entry.is_of(*tensors)
        on_gpu = device.type == "cuda"
        if (
            not _enabled
            or torch._C._get_tracing_state() is not None  # torch.jit.trace
            or (not known and any(t.is_inference() for t in tensors))
            # A graph asks at every replay; in training A and B change from one to the next.
            or (on_gpu and _capturing(device) and (training or norm or not _device_answers(weight, backend)))
        ):
            self.computed += 1
            return compute_divisor(*tensors, scaling, magnitude_axis, backend, norm=norm)
        key = (
            weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(), weight._version, lora_A._version, lora_B._version,
            weight.shape, weight.stride(), scaling, magnitude_axis, training, backend,
            _stream(device) if on_gpu else 0,
        )  # fmt: skip
        if entry is not None and known and entry.key == key and entry.is_fresh(*tensors, training, self.unheard):
            self.reused += 1
            return entry.divisor
        for_backward = training or torch.is_grad_enabled()
        _watch_optimizers()
        with torch.inference_mode(False), torch.no_grad():
            owned = training and _owned(*tensors)
            provable = owned or (owned is None and (entry is None or entry.backwards == linear.backwards))
            if not provable and norm is None and _device_answers(weight, backend):
                self.asked += 1
                if not training:  # whose writes no proof for training speaks of
                    self._entries = {one: kept for one, kept in self._entries.items() if one != device}
                divisor = self._ask_device(weight, lora_A, lora_B, scaling, magnitude_axis)
                return divisor.clone() if for_backward else divisor
            self.computed += 1
            entry = NormEntry(tensors, key)
            square = of_weight = None
            if (backend == "torch" and device.type == "cpu") or (norm is not None and not training):
                of_weight = Sample(weight)
                entry.content = of_weight, Record(lora_A), Record(lora_B)
            if norm is None and not weight.requires_grad:
                square = self._row_square(*tensors, magnitude_axis, backend, of_weight)
            entry.divisor = compute_divisor(*tensors, scaling, magnitude_axis, backend, square, norm)
        self._entries = {**self._entries, device: entry}
        return entry.divisor

    def with_eps(self, divisor: Tensor, eps: float) -> Tensor:
        """`with_eps` of what `divisor` has just returned, kept as long as that is."""
        entry = self._entries.get(divisor.device)
        if entry is None or entry.divisor is not divisor:  # the device's own may be written again
            return with_eps(divisor, eps)
        kept = entry.sum
        if kept is None or kept[0] != eps:
            with torch.inference_mode(False), torch.no_grad():
                kept = entry.sum = eps, with_eps(divisor, eps)
        return kept[1]

    def _row_square(
        self,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude_axis: str,
        backend: str,
        of_weight: Sample | None,
    ) -> Tensor | None:
        """|W|² per row or column where the norm is factored, kept while W is the same and its sample equal."""
        if not linear.primitives(backend).is_factored(*ops.axis_first(weight, lora_A, lora_B, magnitude_axis)):
            return None
        if _device_answers(weight, backend):
            nothing = lora_A[:0].to(weight.dtype), lora_B[:, :0].to(weight.dtype)
            divisor = self._ask_device(weight, *nothing, 0.0, magnitude_axis)
            return torch.where(divisor == torch.inf, 0.0, divisor.square())
        if of_weight is None:
            return None
        dtype = accumulation_dtype(weight, lora_A, lora_B)
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), magnitude_axis, dtype)
        kept = self._weight_square
        if kept is None or kept[0] is not _owner(weight) or kept[1] != key or not kept[2].is_held_by(weight):
            rows = weight if magnitude_axis == "out" else weight.t()
            square = torch_backend.row_square(rows, dtype)
            kept = self._weight_square = (_owner(weight), key, of_weight, square)
        return kept[3]

    def _ask_device(
        self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str
    ) -> Tensor:
        """`safe_divisor` of the norm, computed again if the device finds that A, B or W's sample have changed."""
        rows = ops.axis_first(weight, lora_A, lora_B, magnitude_axis)
        device, rank = weight.device, lora_A.shape[0]
        # Of A and B the device sees every bit, of W only the sample.
        key = (
            weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype,
            lora_A.dtype, lora_B.dtype, scaling, magnitude_axis, _stream(device),
        )  # fmt: skip
        known = self._on_device.get((device, rank))
        captured = _capturing(device)
        if captured or known is None or known[0] is not _owner(weight) or known[1] != key:
            known = _owner(weight), key, linear.primitives("triton").KeptNorm(rows[0].shape[0], scaling, device)
            if captured:
                self._captured.append(known[2])
            else:
                self._on_device = {**self._on_device, (device, rank): known}
        divisor: Tensor = known[2].divisor(rows[0], sample(weight), *rows[1:])
        return divisor


def compute_divisor(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    weight_square: Tensor | None = None,
    norm: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`safe_divisor` of a norm computed now; `norm` as in `NormCache.divisor`."""
    with torch.no_grad():
        if norm is not None:
            with no_autocast(weight.device), full_precision(weight.device):
                return safe_divisor(norm())
        return safe_divisor(ops.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis, backend, weight_square))


def _stream(device: torch.device) -> int:
    """A norm computed on one stream is not there yet for another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _device_answers(weight: Tensor, backend: str) -> bool:
    """Whether to ask the device if a norm has changed is possible, and cheaper than to compute it."""
    return backend == "triton" and linear.primitives(backend).is_worth_keeping(weight)

