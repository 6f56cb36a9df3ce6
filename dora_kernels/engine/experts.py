"""A stack of experts with its adapters, for one call: each row of x goes through the expert that it belongs to.

    y = g_e ⊙ (x W_eᵀ + s (x A_eᵀ) B_eᵀ)         for the rows x of expert e

Nothing of the stack's size is made. On a GPU the kernels compute it (`engine.fused_experts`), on a CPU a loop over the
experts (`engine.expert_loop`). What neither takes (several adapters, a strength, quantised or training weights,
transforms) is the formula's, one expert after another, since an expert is a linear layer: the tensors of the adapter
are taken apart once per call, so that autograd puts their gradients together once, with zeros for experts without rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core.precision import (
    accumulation_dtype,
    cast,
    compute_dtype,
    low_rank_dtype,
    no_autocast,
    product_dtype,
)
from dora_kernels.core.problem import Weights
from dora_kernels.engine import expert_loop, formula, fused_experts
from dora_kernels.engine.dispatch import PLAIN, UnsupportedError, resolve


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
        backend: as in `dora_linear`; the kernels run `grouped` with one adapter at full strength.
    """

    def __init__(self, weight: Stack, adapters: Sequence[Adapter], backend: str = "auto") -> None:
        self.weight = weight
        self.adapters = tuple(adapters)
        self.backend = backend
        self._parts: list[_Parts] | None = None

    def turned(self) -> Experts:
        """The experts with W transposed, if no adapter has a magnitude: that belongs to the outputs."""
        turned = [
            each._replace(lora_A=each.lora_B.transpose(1, 2), lora_B=each.lora_A.transpose(1, 2))
            for each in self.adapters
        ]
        weight = self.weight
        return Experts(weight.transpose(1, 2) if isinstance(weight, Tensor) else _Turned(weight), turned, self.backend)

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
        if torch.compiler.is_compiling() and isinstance(ends, Tensor):
            return self._op(x, ends)
        if self._fused(x):
            (adapter,) = self.adapters
            if not isinstance(ends, Tensor):
                ends = torch.tensor(list(ends), dtype=torch.int32, device=x.device)
            return fused_experts.grouped(x, ends, self.weight, *adapter[:4])  # type: ignore[arg-type]
        bounds = [0, *(ends.tolist() if isinstance(ends, Tensor) else ends), len(x)]
        if self._loops(x):
            (adapter,) = self.adapters
            pairs = enumerate(zip(bounds, bounds[1:-1]))
            found = [expert_loop.Rows(e, start, end) for e, (start, end) in pairs if start < end]
            return expert_loop.run(x, found, self.weight, *adapter[:4])  # type: ignore[arg-type]
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
        last = torch.arange(self.weight.shape[0], device=experts.device)
        y = self.grouped(x[order], torch.searchsorted(ordered, last.to(ordered.dtype), right=True))
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

    def _op(self, x: Tensor, ends: Tensor) -> Tensor:
        """`grouped` as one op of a compiled graph, since the loop depends on the data."""
        if not isinstance(self.weight, Tensor):
            raise UnsupportedError("torch.compile: quantised experts with an adapter cannot be compiled")
        if self.weight.requires_grad:
            raise UnsupportedError("torch.compile: experts with an adapter whose base weights train cannot be compiled")
        scales = [each.lora_A.new_empty(0) if each.g is None else each.g for each in self.adapters]
        y: Tensor = experts_linear(
            x, ends, self.weight, [each.lora_A for each in self.adapters], [each.lora_B for each in self.adapters],
            scales, [each.scaling for each in self.adapters], [each.strength for each in self.adapters],
        )  # fmt: skip
        return y

    def _fused(self, x: Tensor) -> bool:
        """True if the Triton kernels run this call."""
        if self.backend == "torch" or (self.backend == "auto" and not x.is_cuda):
            return False
        (adapter, *others), weight = self.adapters, self.weight
        plain = isinstance(weight, Tensor) and not weight.requires_grad
        if others or adapter.strength != 1.0 or not plain:
            if self.backend == "triton":
                raise UnsupportedError(
                    "backend='triton' runs experts with one adapter, at strength 1, on frozen weights"
                )
            return False
        g = None if adapter.g is None else adapter.g[0]
        one = Weights(weight[0], adapter.lora_A[0], adapter.lora_B[0], g)
        return resolve(self.backend, x, one) == "triton"

    def _loops(self, x: Tensor) -> bool:
        """True if `engine.expert_loop` runs this call: plain tensors on a CPU, one adapter, W frozen in x's dtype."""
        (adapter, *others), weight = self.adapters, self.weight
        plain = not others and adapter.strength == 1.0 and isinstance(weight, Tensor) and not weight.requires_grad
        tensors = x, weight, *adapter[:3]
        return (
            plain and x.is_cpu and weight.dtype == x.dtype and all(type(t) in PLAIN for t in tensors)
            and not torch.compiler.is_compiling() and not formula.transformed()
        )  # fmt: skip

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
        if x.dim() == 2 and self._loops(x) and {low_rank_dtype(x, lora_A), product_dtype(x.dtype)} != {x.dtype}:
            # The formula would keep float32 copies of x and of the sum, and multiply in x's dtype.
            weight = self.weight[expert].unsqueeze(0)
            one_g = None if g is None else g.unsqueeze(0)
            rows = [expert_loop.Rows(0, 0, len(x))] if len(x) else []
            one_a, one_b = lora_A.unsqueeze(0), lora_B.unsqueeze(0)
            return expert_loop.run(x, rows, weight, one_a, one_b, one_g, adapter.scaling)
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
        with no_autocast(dy.device):
            return dy @ cast(ctx.weight[ctx.expert], dy.dtype), None, None


class _Turned:
    """The transposed matrices of a stack."""

    def __init__(self, weight: Stack) -> None:
        self._weight = weight
        e, n, k = weight.shape
        self.shape, self.dtype, self.device = torch.Size((e, k, n)), weight.dtype, weight.device

    def __getitem__(self, expert: int) -> Tensor:
        return self._weight[expert].t()


# The op of compiled graphs. Its backward runs the forward again: what that keeps depends on the data.


@torch.library.custom_op("dora_kernels::experts_linear", mutates_args=())
def experts_linear(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    g: list[Tensor],
    scaling: list[float],
    strength: list[float],
) -> Tensor:
    """`Experts.grouped`; an empty g stands for None."""
    return _experts(weight, lora_A, lora_B, g, scaling, strength).grouped(x, ends)


@torch.library.custom_op("dora_kernels::experts_linear_backward", mutates_args=())
def experts_linear_backward(
    dy: Tensor,
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    g: list[Tensor],
    scaling: list[float],
    strength: list[float],
) -> list[Tensor]:
    """The gradients of x and of all adapters' A, B and g. Autograd cannot run inside an op, so they are written out."""
    wide, adapters = accumulation_dtype(x), list(zip(lora_A, lora_B, g, scaling, strength))
    grads = [torch.zeros_like(t) for t in (x, *lora_A, *lora_B, *g)]
    dx, *rest = grads
    of_a, of_b, of_g = (rest[i * len(adapters) : (i + 1) * len(adapters)] for i in range(3))
    start = 0
    for e, end in enumerate(ends.tolist()):
        if start == end:
            continue
        rows, dz, w = x[start:end], dy[start:end].to(wide), weight[e].to(x.dtype)
        read, steps = rows.to(wide), []
        z = (rows @ w.t()).to(wide)
        for a, b, scale, s, k in adapters:
            h = read @ a[e].to(wide).t()
            inner = z + s * (h @ b[e].to(wide).t())
            steps.append((h, inner))
            z = (1.0 - k) * z + k * (inner * scale[e] if scale.numel() else inner)
        d_read: Any = 0.0
        for i in reversed(range(len(adapters))):
            (a, b, scale, s, k), (h, inner) = adapters[i], steps[i]
            d_inner = k * dz
            if scale.numel():
                of_g[i][e] = (d_inner * inner).sum(0)
                d_inner = d_inner * scale[e]
            d_low = s * (d_inner @ b[e].to(wide))
            of_b[i][e] = s * (d_inner.t() @ h)
            of_a[i][e] = d_low.t() @ read
            d_read = d_read + d_low @ a[e].to(wide)
            dz = (1.0 - k) * dz + d_inner
        dx[start:end] = d_read + dz.to(x.dtype) @ w
        start = end
    return grads


def _experts(
    weight: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    g: Sequence[Tensor],
    scaling: Sequence[float],
    strength: Sequence[float],
) -> Experts:
    scales = [each if each.numel() else None for each in g]
    return Experts(weight, [Adapter(*each) for each in zip(lora_A, lora_B, scales, scaling, strength)])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ends, weight, lora_A, lora_B, g, ctx.scaling, ctx.strength = inputs
    ctx.save_for_backward(x, ends, weight, *lora_A, *lora_B, *g)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, ends, weight, *tensors = ctx.saved_tensors
    count = len(ctx.scaling)
    groups = [tensors[i * count : (i + 1) * count] for i in range(3)]
    dx, *rest = experts_linear_backward(dy, x, ends, weight, *groups, ctx.scaling, ctx.strength)
    grads = [rest[i * count : (i + 1) * count] for i in range(3)]
    return dx, None, None, *grads, None, None


experts_linear.register_autograd(_backward, setup_context=_keep)


@experts_linear.register_fake
def _(
    x: Tensor, ends: Tensor, weight: Tensor, lora_A: Any, lora_B: Any, g: Any, scaling: Any, strength: Any
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@experts_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, ends: Tensor, weight: Tensor, lora_A: Any, lora_B: Any, g: Any, scaling: Any, strength: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *lora_A, *lora_B, *g)]
