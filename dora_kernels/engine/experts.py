"""A stack of experts with its adapters, for one call: each row of x goes through the expert that it belongs to.

    y = g_e ⊙ (x W_eᵀ + s (x A_eᵀ) B_eᵀ)         for the rows x of expert e

An expert is a linear layer, so the formula computes it (`engine.formula`), one expert after another. Nothing of the
stack's size is made: the tensors of the adapter are taken apart once per call, so that autograd puts their gradients
together once, with zeros for experts without rows. On two cores this takes 1.03 to 1.07 times as long as a hand-written
forward and backward around all experts, and 1.3 to 1.8 times as long as the frozen products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core.precision import cast, compute_dtype, low_rank_dtype
from dora_kernels.core.problem import Weights
from dora_kernels.engine import formula


class Stack(Protocol):
    """The base weights of all experts: a tensor ``[E, N, K]``, or what makes one expert's matrix when it is asked."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getitem__(self, expert: int) -> Tensor:
        """The matrix ``[N, K]``."""


class Adapter(NamedTuple):
    """One adapter of all experts."""

    lora_A: Tensor
    """``[E, r, K]``."""
    lora_B: Tensor
    """``[E, N, r]``, of any strides."""
    g: Tensor | None
    """The magnitude over the norm, ``[E, N]``; None for plain LoRA."""
    scaling: float
    strength: float = 1.0
    """k of ``base + k * (adapted - base)``."""


class Experts:
    """The experts of one call.

    Several adapters apply one after another, as in PEFT's layers: each to the result of those before it.

    Args:
        weight: the base weights, frozen unless they are a tensor that requires grad.
        adapters: at least one.
    """

    def __init__(self, weight: Stack, adapters: Sequence[Adapter]) -> None:
        self.weight = weight
        self.adapters = tuple(adapters)
        self._parts: list[_Parts] | None = None

    def turned(self) -> Experts:
        """The experts with W transposed, if no adapter has a magnitude: that belongs to the outputs."""
        turned = [
            each._replace(lora_A=each.lora_B.transpose(1, 2), lora_B=each.lora_A.transpose(1, 2))
            for each in self.adapters
        ]
        weight = self.weight
        return Experts(weight.transpose(1, 2) if isinstance(weight, Tensor) else _Turned(weight), turned)

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """One expert's ``[..., K]`` to ``[..., N]``, in the compute dtype: x's, or autocast's."""
        return self._linear(cast(x, compute_dtype(x)), expert)

    def grouped(self, x: Tensor, ends: Tensor | Sequence[int]) -> Tensor:
        """The rows of all experts, ``[S, K]`` to ``[S, N]``, in the compute dtype.

        Args:
            x: sorted by expert.
            ends: ``[E]``; expert e has the rows ``ends[e - 1]`` to ``ends[e]``, which may be none. Rows after the last
                belong to no expert: their results are 0.
        """
        x = cast(x, compute_dtype(x))
        bounds = [0, *(ends.tolist() if isinstance(ends, Tensor) else ends), len(x)]
        sizes = [end - start for start, end in zip(bounds, bounds[1:])]
        parts = [(e, rows) for e, rows in enumerate(x.split(sizes)) if sizes[e]]
        if sizes[-1]:
            parts.pop()
        # Without any rows the first expert gets none of them, so that every parameter has a gradient.
        done = [self._linear(rows, e) for e, rows in parts or [(0, x[:0])]]
        if sizes[-1]:
            done.append(done[0].new_zeros(sizes[-1], self.weight.shape[1]))
        return torch.cat(done) if len(done) > 1 else done[0]

    def selected(self, x: Tensor, experts: Tensor) -> Tensor:
        """Row i of x through ``experts[i]``: ``[S, K]`` to ``[S, N]``."""
        ordered, order = experts.sort(stable=True)
        counts = torch.bincount(ordered, minlength=self.weight.shape[0])
        y = self.grouped(x[order], counts.cumsum(0))
        return torch.empty_like(y).index_copy(0, order, y)

    def formed(self) -> Tensor:
        """The adapted weights of all experts ``[E, N, K]``, in W's dtype, differentiable."""
        return torch.stack([self.formed_one(e) for e in range(self.weight.shape[0])])

    def formed_one(self, expert: int) -> Tensor:
        """The adapted weight of one expert ``[N, K]``."""
        base: Any = self.weight[expert]
        for each, parts in zip(self.adapters, self._taken_apart()):
            lora_A, lora_B, g = parts[expert]
            before = base
            base = base + (each.scaling * (lora_B @ lora_A)).to(torch.promote_types(base.dtype, lora_A.dtype))
            if g is not None:
                base = base * g.unsqueeze(1)
            if each.strength != 1.0:
                base = torch.lerp(before.to(base.dtype), base, each.strength)
        return cast(base, self.weight.dtype)

    def _taken_apart(self) -> list[_Parts]:
        if self._parts is None:
            self._parts = [_Parts(each) for each in self.adapters]
        return self._parts

    def _linear(self, x: Tensor, expert: int) -> Tensor:
        first, *others = zip(self.adapters, self._taken_apart())
        adapter, parts = first
        lora_A, lora_B, g = parts[expert]
        readable = isinstance(self.weight, Tensor) and (self.weight.dtype == x.dtype or self.weight.requires_grad)
        base = None
        if readable and adapter.strength == 1.0:
            y = formula.linear(x, Weights(self.weight[expert], lora_A, lora_B), g, adapter.scaling)
        else:
            base = F.linear(x, self.weight[expert]) if readable else _Base.apply(x, self.weight, expert)
            y = _composed(base, x, adapter, lora_A, lora_B, g)
        for adapter, parts in others:
            y = _composed(y, x, adapter, *parts[expert])
        return y


class _Parts:
    """An adapter's tensors by expert. With gradients they are taken apart all at once, else one by one."""

    def __init__(self, adapter: Adapter) -> None:
        tensors = adapter.lora_A, adapter.lora_B, adapter.g
        grad = torch.is_grad_enabled()
        if grad:  # PEFT's B is strided by expert: one copy of all costs less than one by one
            tensors = adapter.lora_A, adapter.lora_B.contiguous(), adapter.g
        self._tensors = [None if t is None else t.unbind(0) if grad and t.requires_grad else t for t in tensors]

    def __getitem__(self, expert: int) -> tuple[Any, Any, Any]:
        lora_A, lora_B, g = (None if t is None else t[expert] for t in self._tensors)
        return lora_A, lora_B, g


def _composed(
    result: Tensor, x: Tensor, adapter: Adapter, lora_A: Tensor, lora_B: Tensor, g: Tensor | None
) -> Tensor:
    """``g * (result + s (x Aᵀ) Bᵀ)`` at the adapter's strength, in result's dtype."""
    low = low_rank_dtype(x, lora_A)
    h = F.linear(cast(x, low), cast(lora_A, low))
    if g is None:
        y = result + cast(F.linear(h * adapter.scaling, cast(lora_B, low)), result.dtype)
    else:
        y = formula.compose(result, h, Weights(lora_B, lora_B, lora_B), g, adapter.scaling)
    return y if adapter.strength == 1.0 else torch.lerp(result, y, adapter.strength)


class _Base(torch.autograd.Function):
    """``x Wᵀ`` with a frozen W that is made from something else, in x's dtype: again in the backward, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Stack, expert: int) -> Tensor:
        ctx.weight, ctx.expert = weight, expert
        return F.linear(x, cast(weight[expert], x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ cast(ctx.weight[ctx.expert], dy.dtype), None, None


class _Turned:
    """The transposed matrices of a stack."""

    def __init__(self, weight: Stack) -> None:
        self._weight = weight
        e, n, k = weight.shape
        self.shape, self.dtype, self.device = torch.Size((e, k, n)), weight.dtype, weight.device

    def __getitem__(self, expert: int) -> Tensor:
        return self._weight[expert].t()
