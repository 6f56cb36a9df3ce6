"""Reuse a layer's weight norm while nothing it depends on has changed. See docs/design.md, "Reusing the norm".

Tensor versions alone are not a safe key: fused and 8-bit optimizers, EMA swaps and writes through ``.data`` do not
change them. A kept norm is used only if its key (addresses, versions, strides, the layer's form) is unchanged and one
of these holds:

* *comparison* (torch backend on the CPU, W frozen): lora_A, lora_B and a sample of W hold the same values as then
  (`fingerprints`);
* *proof* (elsewhere): the layer is training; no optimizer has stepped since; no captured step may be replayed unseen;
  and either no layer has produced a gradient of lora_A, lora_B or W since, or all that train are known to belong to a
  live optimizer whose steps are seen (`writes`).

Without a proof, the triton backend asks the device (`kernels.KeptNorm`), which compares fingerprints and computes the
norm only if they differ. In all other cases the norm is recomputed, in factored form if possible, from a |W|² per row
that is kept by the same rules. A norm handed out for a backward is a snapshot: it is never written again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights, row_problem
from dora_kernels.engine import blocked, collectives, dispatch, ops, writes
from dora_kernels.engine.fingerprints import Held, Sample, sample
from dora_kernels.engine.norm import Norm, compute_norm

_enabled = True


def norm_reuse() -> bool:
    """True if weight norms are reused in this process."""
    return _enabled


def set_norm_reuse(enabled: bool) -> None:
    """Turn the reuse of weight norms on (the default) or off in this process.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    global _enabled
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected a bool, got {type(enabled).__name__}")
    _enabled = enabled


class _Answers(threading.local):
    """The model forward that this thread runs, and the norms found valid at its start (`model_forward`)."""

    asking: Any = None
    norms: dict[NormCache, Norm] | None = None


answers = _Answers()


_by_slot: weakref.WeakValueDictionary[int, NormCache] = weakref.WeakValueDictionary()


def cache_of(slot: Tensor) -> NormCache | None:
    """The cache with this slot, if it is of this process and alive."""
    return _by_slot.get(slot.data_ptr())


class NormCache:
    """The kept norm of one layer and adapter, at most one per device. A copy or pickle of it is empty.

    Args:
        form: the layer's options; the scaling is passed to each call instead.
        backend: as in `dora_linear`.
        merges: True if the layer runs merged (`engine.merged`).
    """

    def __init__(self, form: Form = Form(), backend: str = "auto", merges: bool = False) -> None:  # noqa: B008 (immutable)
        self.form, self.backend, self.merges = form, backend, merges
        self.merged: Any = None
        """The merged weight of the last call, and what it was made from."""
        self.refreshes = 0
        """How often a merged weight was made."""
        self._norms: dict[torch.device, Norm] = {}
        self._last: Norm | None = None
        self._weight_square: tuple[tuple[Any, ...], Sample, Tensor] | None = None
        self._on_device: dict[tuple[torch.device, int], tuple[Tensor, tuple[Any, ...], Any]] = {}
        self._captured: list[Any] = []
        self.frozen: tuple[Norm, Tensor] | None = None
        """The norm and g, if `frozen_norms` has frozen them."""
        self.unnoticed_backward = False
        """True if autograd may run a backward through this norm without `note_backward`."""
        self.b_was_nonzero = False
        """True if B was seen to be nonzero, on a device that is not checked twice."""
        self.generation = 0
        """How often the cache was emptied: what others keep for it is of one generation."""
        self.computed = 0
        self.reused = 0
        self.asked = 0
        """Calls in which the device decided whether to compute the norm; the host does not learn the answer."""
        self.slot = torch.empty(0)
        """A tensor whose address identifies this cache to compiled graphs.

        It holds eps, and is two-dimensional along "in".
        """
        self.move(torch.device("cpu"))

    def __deepcopy__(self, memo: dict[int, Any]) -> NormCache:
        copied = type(self)(self.form, self.backend, self.merges)
        copied.move(self.slot.device)
        return copied

    def __reduce__(self) -> tuple[Callable[..., NormCache], tuple[Any, ...]]:
        return type(self), (self.form, self.backend, self.merges)

    def move(self, device: torch.device) -> None:
        """Move `slot` to the layer's device, because a CUDA graph takes no input from the CPU."""
        if (self.slot.device != device or not self.slot.numel()) and device.type != "meta":
            eps = torch.tensor([self.form.eps], dtype=torch.float64, device=device)
            self.slot = eps if self.form.magnitude_axis == "out" else eps.view(1, 1)
            _by_slot[self.slot.data_ptr()] = self

    def invalidate(self) -> None:
        """Forget everything, except what a CUDA graph was captured with: its replays write there."""
        self._norms = {}
        self._last = None
        self._weight_square = None
        self._on_device = {}
        self.merged = None
        self.generation += 1
        self.b_was_nonzero = False

    def norm(
        self,
        weights: Weights,
        form: Form,
        training: bool,
        backend: str,
        compute: Callable[[], Tensor] | None = None,
    ) -> Norm:
        """Return the layer's norm; compute it only if the kept one may be stale.

        Args:
            compute: computes the norm if it is not that of a dense matrix ``W + s B A``. `weights` are then the tensors
                it depends on, of any shapes, and the host compares them on a GPU too.
        """
        answered = None if answers.norms is None else answers.norms.get(self)
        if form.group is not None:
            if answered is not None:  # for all processes alike, whatever has happened to this one's tensors
                return answered
            norm = self.known(weights, form, training)
            (fresh,) = collectives.all_true(form.group, [norm is not None], weights.weight.device)
            return norm if fresh and norm is not None else self.renewed(weights, form, training, backend, compute)
        norm = self.known(weights, form, training)
        if norm is not None:
            return norm
        if not training and answered is not None and all(map(_same_memory, weights[:3], answered.tensors)):
            self.reused += 1
            return answered
        return self.renewed(weights, form, training, backend, compute)

    def renewed(
        self,
        weights: Weights,
        form: Form,
        training: bool,
        backend: str,
        compute: Callable[[], Tensor] | None = None,
    ) -> Norm:
        """Compute the layer's norm, or have the device ask whether the kept one holds. Arguments as in `norm`."""
        device = weights.weight.device
        try:
            key = _key(*weights[:3], form)
        except RuntimeError:  # inference tensors have no version
            self.computed += 1
            return compute_norm(weights, form, backend, compute=compute)
        return self._kept(self._norms.get(device), key, weights, form, training, backend, compute)

    def known(self, weights: Weights, form: Form, training: bool) -> Norm | None:
        """Return the kept norm if it is known to be still valid, else None."""
        norm = self._last
        if norm is None or not _enabled:
            return None
        weight, lora_A, lora_B, _, _ = weights
        try:
            key = _key(weight, lora_A, lora_B, form)
        except RuntimeError:  # no address under torch.func, no version in inference mode
            return None
        if norm.key != key:
            norm = self._norms.get(weight.device)  # replicas on several devices share a cache
            if norm is None or norm.key != key:
                return None
        if norm.held is not None and not weight.requires_grad:
            fresh = norm.held.is_held_by(lora_A, lora_B)
        else:
            fresh = norm.is_fresh(weights, training, self.unnoticed_backward)
        self.reused += fresh
        return norm if fresh else None

    def contiguous_b(self, lora_B: Tensor) -> Tensor:
        """B of the norm that was just handed out, contiguous: copied once for all calls in which that norm stays valid.

        Of other norms, where values are not compared, and in a compiled graph, B is returned as it is.
        """
        if torch.compiler.is_compiling():
            return lora_B
        norm = self._last
        if norm is None or self.frozen is not None or lora_B.is_contiguous() or not _enabled:
            return lora_B
        if norm.held is None or not _same_memory(norm.tensors[2], lora_B):
            return lora_B
        if norm.contiguous_b is None:
            norm.contiguous_b = lora_B.detach().contiguous()
        return norm.contiguous_b

    def still_holds(self, norm: Norm, weight: Tensor) -> bool:
        """True if `norm` is the last one and still valid, for the same tensors that it was computed for.

        Works only where tensors are compared; elsewhere it returns False, and `known` decides.
        """
        held = (
            norm is self._last
            and _enabled
            and norm.held is not None
            and not weight.requires_grad
            and norm.version == weight._version
            and norm.held.is_held_by(*norm.tensors[1:])
        )
        self.reused += held
        return held

    def _kept(
        self,
        known: Norm | None,
        key: tuple[Any, ...],
        weights: Weights,
        form: Form,
        training: bool,
        backend: str,
        compute: Callable[[], Tensor] | None,
    ) -> Norm:
        weight, lora_A, lora_B, _, _ = weights
        device = weight.device
        on_device = compute is None and form.group is None and device_answers(weight, backend)
        # A CUDA graph asks the device at every replay; in training A and B change between replays.
        if not _enabled or (_capturing(device) and (training or not on_device)):
            self.computed += 1
            return compute_norm(weights, form, backend, compute=compute)
        for_backward = training or torch.is_grad_enabled()
        writes.watch_optimizers()
        with torch.inference_mode(False), torch.no_grad():
            if on_device and not self._provable(known, weights, training):
                self.asked += 1
                if not training:  # the proof for training does not cover its writes
                    self._norms = {one: kept for one, kept in self._norms.items() if one != device}
                    self._last = None
                divisor = self._ask_device(weights, form)
                return Norm(divisor.clone() if for_backward else divisor)
            self.computed += 1
            held = square = None
            if (backend == "torch" and device.type == "cpu") or (compute is not None and not training):
                held = Held(weight, lora_A, lora_B)
            if compute is None and not weight.requires_grad:
                square = self._row_square(weights, form, backend, held)
            norm = compute_norm(weights, form, backend, square, compute, self._should_check_b(device))
            self.b_was_nonzero = self.b_was_nonzero or not norm.b_is_zero
            norm.remember(weights, key, training, held)
        self._norms = {**self._norms, device: norm}
        self._last = norm
        return norm

    def _provable(self, known: Norm | None, weights: Weights, training: bool) -> bool:
        """True if the next call can prove that a norm computed now is still valid."""
        owned = training and writes.owned(*weights[:3])
        return bool(owned) or (owned is None and (known is None or known.backwards == writes.backwards))

    def _should_check_b(self, device: torch.device) -> bool:
        """True if B should be checked for 0: always on the CPU; on a GPU, where the host waits, until it is nonzero."""
        return device.type == "cpu" or not (self.b_was_nonzero or _capturing(device))

    def _row_square(self, weights: Weights, form: Form, backend: str, held: Held | None) -> Tensor | None:
        """Return |W|² per row or column if the norm is factored, kept while W's key and sample are unchanged."""
        weight, lora_A, lora_B, _, _ = weights
        axis = form.magnitude_axis
        if not ops.norm_module(backend).is_factored(*row_problem(weight, lora_A, lora_B, axis)):
            return None
        if device_answers(weight, backend):
            nothing = weights._replace(lora_A=lora_A[:0].to(weight.dtype), lora_B=lora_B[:, :0].to(weight.dtype))
            divisor = self._ask_device(nothing, Form(0.0, axis))
            return torch.where(divisor == torch.inf, 0.0, divisor.square())
        if held is None:
            return None
        dtype = accumulation_dtype(weight, lora_A, lora_B)
        key = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), axis, dtype)
        kept = self._weight_square
        if kept is None or kept[0] != key or not kept[1].is_held_by(weight):
            rows = weight if axis == "out" else weight.t()
            square = blocked.row_square(rows, dtype)
            kept = self._weight_square = (key, Sample(weight), square)  # its view keeps W's address from being reused
        return kept[2]

    def _ask_device(self, weights: Weights, form: Form) -> Tensor:
        """Return the divisor; the device computes it again if it finds that A, B or W's sample have changed."""
        weight, lora_A, lora_B, _, _ = weights
        rows = row_problem(weight, lora_A, lora_B, form.magnitude_axis)
        device, rank = weight.device, lora_A.shape[-2]
        # The device compares every bit of A and B, but only a sample of W.
        key = (
            weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype,
            lora_A.dtype, lora_B.dtype, form, _stream(device),
        )  # fmt: skip
        known = self._on_device.get((device, rank))
        captured = _capturing(device)
        if captured or known is None or known[1] != key:
            known = weight, key, dispatch.kernels().KeptNorm(rows[0].shape[:-1], form.scaling, device)
            if captured:
                self._captured.append(known[2])
            else:
                self._on_device = {**self._on_device, (device, rank): known}
        divisor: Tensor = known[2].divisor(rows[0], sample(weight), *rows[1:])
        if form.eps:  # the kernel returns infinity for 0
            divisor = torch.nan_to_num(divisor, nan=torch.nan, posinf=0.0) + form.eps
        return divisor


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """True for a tensor and itself, or another view of it, as each call on GPT-2's layer makes one."""
    return one is other or (
        one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    )


def _key(weight: Tensor, lora_A: Tensor, lora_B: Tensor, form: Form) -> tuple[Any, ...]:
    return (
        weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(), weight._version, lora_A._version, lora_B._version,
        weight.shape, lora_A.shape, lora_B.shape, weight.stride(), lora_A.stride(), lora_B.stride(), form,
        _stream(weight.device) if weight.is_cuda else 0,
    )  # fmt: skip


def _stream(device: torch.device) -> int:
    """Return the current CUDA stream. A norm computed on one stream may not be ready on another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_answers(weight: Tensor, backend: str) -> bool:
    """True if the device can check whether a norm has changed, and if that is cheaper than computing it."""
    return backend == "triton" and dispatch.kernels().is_worth_keeping(weight)
