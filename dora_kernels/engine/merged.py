"""The merged forward: ``V' = g ⊙ (W + s B A)`` is written once per optimizer step, and a call is one product with it.

    Y  = X V'ᵀ + b       H  = X Aᵀ                D  = dY (s g ⊙ B)                             (axis "out")
    dX = dY V'           dB = s g ⊙ (dYᵀ H)        dA = Dᵀ X          dm = Σ_t dY ⊙ (X V'ᵀ) / m

It multiplies less than LoRA from about K/2 tokens per optimizer step on, and holds another copy of W. What the backward
reads of the output is a lazy clone, which costs no memory where the consumer keeps its input, and is right where the
consumer writes to it. A row with m = 0 gets its gradient from a product of its own. In 16 bits V' is rounded
stochastically; of a quantised layer it takes the place of the dequantised W. docs/merged.md says when to use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, low_rank_dtype, no_autocast
from dora_kernels.core.problem import Form, Weights, row_problem
from dora_kernels.core.scale import norm_of, quotient
from dora_kernels.engine import autograd, blocked, dispatch, fused, ops, writes
from dora_kernels.engine.fingerprints import Record, sample
from dora_kernels.engine.formula import transformed
from dora_kernels.engine.fused import Needs, Scale
from dora_kernels.engine.norm import Norm
from dora_kernels.engine.norm_cache import NormCache, norm_reuse
from dora_kernels.engine.products import mm
from dora_kernels.engine.rescale import dot_over_rows, lazy_clone
from dora_kernels.rounding import is_coarse, seed_for, stochastic

DTYPES = (torch.float32, torch.float64)
"""Dtypes in which layers run merged. In 16 bits the forward is right, but does not train as well as it should: of three
trainings in bfloat16 one ended 0.025 above stock's loss, whose seeds differ by 0.007 (bench/results, `merged`)."""

# With a smaller |g| a row's gradient is not recovered from its output; see `rescale`. float16 has a smaller range.
_SMALLEST = 2.0**-20
_SMALLEST_FLOAT16 = 2.0**-6


FORWARDS = ("composed", "merged")


def check_forward(forward: Any) -> None:
    """Check the option that chooses between the two forwards."""
    if forward not in FORWARDS:
        raise ValueError(f"forward: expected 'composed' or 'merged', got {forward!r}")


def check_merged_dtype(dtype: torch.dtype | None, what: str) -> None:
    """Check that a layer may run merged, by the dtype of what it multiplies by, if that is known."""
    if dtype is not None and dtype not in DTYPES:
        offered = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(
            f"forward: 'merged' is offered in {offered}, and {what} is {dtype}; use 'composed' (in bfloat16 a training "
            "ended 0.025 above PEFT's loss, whose seeds differ by 0.007)"
        )


class Dequantized(NamedTuple):
    """A quantised W, as its layer's library dequantises it. It is held by the tensor in `Weights.weight`."""

    blocks: Callable[[], Iterable[tuple[slice, Tensor]]]
    """Yields ``rows, W[rows]`` for all of W."""
    norm: Callable[[], Tensor]
    """Computes the norm of the rows."""
    dtype: torch.dtype
    """Of V', of x and of the product."""

    def whole(self) -> Tensor:
        """All of W."""
        return joined(self.blocks()).to(self.dtype)


def joined(blocks: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """All of W from its blocks ``rows, W[rows]``, in any order."""
    return torch.cat([block for _, block in sorted(blocks, key=lambda part: part[0].start)])


class MergedWeight(NamedTuple):
    """A layer's V' and what it was made from."""

    weight: Tensor
    """V' ``[N, K]``, in W's dtype, or that in which a quantised layer multiplies."""
    g: Tensor
    norm: Norm
    lost: Tensor | None
    """Indices of the magnitudes that are 0, or so small that the output does not give their gradient."""
    magnitude: Record
    of_magnitude: tuple[int, int, int]
    """Address and version of the magnitude, and the optimizer steps seen."""

    def holds(self, norm: Norm, magnitude: Tensor) -> bool:
        """True if W, A and B, whose norm is `norm`, and the magnitude hold what V' was made from."""
        if norm is not self.norm:
            return False
        if magnitude.is_cpu:
            return self.magnitude.is_held_by(magnitude)
        trusted = not magnitude.requires_grad or bool(writes.owned(magnitude))
        return trusted and self.of_magnitude == (magnitude.data_ptr(), magnitude._version, writes.steps)


def runs_merged(
    x: Tensor, weights: Weights, cache: NormCache, training: bool, source: Dequantized | None = None
) -> bool:
    """True if this call runs merged: plain tensors of one dtype, W frozen, outside of compilers and transforms.

    On a GPU in evaluation, where the host cannot tell whether V' still holds, only under `frozen_norms`.
    """
    weight, magnitude = weights.weight, weights.magnitude
    if torch.compiler.is_compiling() or transformed() or not norm_reuse():
        return False
    dtype = weight.dtype if source is None else source.dtype
    if magnitude is None or dtype not in DTYPES or dtype != x.dtype or weight.requires_grad:
        return False
    plain = (x, *(weights if source is None else weights[1:]))
    if not all(type(tensor) in dispatch.PLAIN for tensor in plain) or x.is_meta:
        return False
    if any(tensor.is_inference() for tensor in weights[:4]):
        return False
    return weight.is_cpu or training or cache.frozen is not None


def run_merged(
    x: Tensor,
    weights: Weights,
    form: Form,
    cache: NormCache,
    training: bool,
    backend: str = "auto",
    source: Dequantized | None = None,
) -> Tensor:
    """The layer on ``x [..., K]``, for which `runs_merged` is True. Returns ``[..., N]``."""
    merged = _current(weights, form, cache, training, backend, source)
    if source is not None:
        weights = weights._replace(weight=merged.weight)  # a tensor that autograd can keep; `source` has W
    if not torch.is_grad_enabled():
        return F.linear(x, merged.weight, weights.bias if weights.bias is None else cast(weights.bias, x.dtype))
    y: Tensor = _MergedLinear.apply(x, *weights, merged, form, source)[0]
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _current(
    weights: Weights, form: Form, cache: NormCache, training: bool, backend: str, source: Dequantized | None
) -> MergedWeight:
    """The layer's V', made again if anything that it depends on has changed."""
    chosen = dispatch.norm_backend(backend, weights.weight if source is None else weights.lora_B)
    kept: MergedWeight | None = cache.merged
    if kept is not None and source is not None and kept.weight.dtype != source.dtype:
        kept = None
    if cache.frozen is not None:
        norm = cache.frozen[0]
        if kept is not None and kept.norm is norm:
            return kept
    else:
        compute = None if source is None else source.norm
        norm = cache.norm(weights, form._replace(detach_norm=True), training, chosen, compute)
        if kept is not None and kept.holds(norm, weights.magnitude):
            return kept
    cache.merged = kept = None  # frees the old one, unless a graph still reads it
    with torch.no_grad(), no_autocast(weights.weight.device):
        cache.refreshes += 1
        merged = _make(weights, form, norm, chosen, source)
    cache.merged = merged
    return merged


def _make(
    weights: Weights, form: Form, norm: Norm, backend: str, source: Dequantized | None = None
) -> MergedWeight:
    weight, lora_A, lora_B, magnitude = (t.detach() for t in weights[:4])
    dtype = weight.dtype if source is None else source.dtype
    seed: Any = _seed(weight) if is_coarse(dtype) else None
    number = seed
    if number is not None and backend == "torch" and weight.is_cpu:
        seed = torch.Generator().manual_seed(number)
    if source is None:
        merged = _merge(weight, lora_A, lora_B, magnitude, form, norm.divisor, backend, seed)
    else:
        merged = torch.empty(lora_B.shape[0], lora_A.shape[1], dtype=dtype, device=weight.device)
        for rows, block in source.blocks():
            wide = block if block.dtype == dtype else block.to(accumulation_dtype(block, lora_A))
            part = lora_A, lora_B[rows], magnitude[rows], form, norm.divisor[rows], backend
            own = number ^ rows.start if number is not None and seed is number else seed
            v = _merge(wide, *part, seed=own if wide is block else None)
            merged[rows] = stochastic(v, dtype, own) if v.dtype != dtype and own is not None else v
    g = quotient(magnitude, norm.divisor, merged)
    smallest = _SMALLEST_FLOAT16 if dtype == torch.float16 else _SMALLEST
    lost = (g.abs() < smallest).nonzero().squeeze(1)
    of_magnitude = weights.magnitude.data_ptr(), weights.magnitude._version, writes.steps
    return MergedWeight(merged, g, norm, lost if len(lost) else None, Record(weights.magnitude), of_magnitude)


def _merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    form: Form,
    divisor: Tensor,
    backend: str,
    seed: Any,
) -> Tensor:
    """V' in weight's dtype, rounded stochastically if there is a seed."""
    axis = form.magnitude_axis
    if backend == "torch":
        rows = row_problem(weight, lora_A, lora_B, axis)
        merged = blocked.merge(*rows, magnitude, form.scaling, seed, axis == "in", divisor)
        return merged if axis == "out" else merged.t()
    if form.eps:
        magnitude = magnitude * (norm_of(divisor, form.eps) / divisor)
    return ops.merge(weight, lora_A, lora_B, magnitude, form.scaling, axis, backend, seed)


def _seed(weight: Tensor) -> int:
    """The seed of stochastic rounding, which 16 bits need: to nearest, small updates are lost.

    It is the layer's, whatever the step: equal weights have equal V', in every process and after a reload.
    """
    return seed_for(0, repr(sample(weight).tolist()))


class _MergedLinear(torch.autograd.Function):
    """The kept output is an output too, which nobody gets: autograd then lets a consumer overwrite the other one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        merged: MergedWeight,
        form: Form,
        source: Dequantized | None,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        needs = Needs(*ctx.needs_input_grad[:6])
        ctx.form, ctx.lost, ctx.norm, ctx.source = form, merged.lost, merged.norm.divisor, source
        ctx.low_dtype = low_rank_dtype(x, lora_A)  # which asks for autocast
        ctx.whole = needs.lora_A and needs.lora_B and _forms_gradient(rows, lora_A, lora_B)
        keeps = fused.keeps_base(form, True, needs) and not ctx.whole
        with no_autocast(x.device):
            kept = None
            if bias is None or not keeps:
                y = F.linear(rows, merged.weight, None if bias is None else cast(bias, x.dtype))
                if keeps:
                    kept = y.clone() if lazy_clone is None else lazy_clone(y)
            else:  # a large bias would leave few digits of the product
                kept = F.linear(rows, merged.weight)
                y = kept + cast(bias, x.dtype)
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, bias, merged.weight, merged.g, kept)
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
        nothing = None, None, None
        if dy is None:
            return (None,) * 6 + nothing
        needs, form = Needs(*ctx.needs_input_grad[:6]), ctx.form
        x, *tensors, merged, g, kept = ctx.saved_tensors
        weights = Weights(*tensors)
        writes.note_backward(needs.norm)
        if ctx.source is not None and (ctx.lost is not None or torch.is_grad_enabled()):
            with torch.no_grad():
                weights = weights._replace(weight=ctx.source.whole())
        if torch.is_grad_enabled():
            wide = dy.view(*x.shape[:-1], dy.shape[1])
            needed = ctx.needs_input_grad
            return *autograd.differentiable(x, weights, cast(ctx.norm, g.dtype), form, needed, wide), *nothing
        with no_autocast(dy.device):
            rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            scale = Scale(g, cast(ctx.norm, g.dtype))
            low_dtype = None if ctx.whole else ctx.low_dtype
            grads = _backward(dy, rows, weights, merged, scale, kept, ctx.lost, low_dtype, form, needs)
        return None if grads[0] is None else grads[0].view(x.shape), *grads[1:], *nothing


def _backward(
    dy: Tensor,
    x: Tensor,
    weights: Weights,
    merged: Tensor,
    scale: Scale,
    kept: Tensor | None,
    lost: Tensor | None,
    low_dtype: torch.dtype | None,
    form: Form,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients in the order of `Weights` after x's; W's is None, since W is frozen.

    Args:
        low_dtype: of the low-rank branch; None if the gradients are those of ``dYᵀ X`` (`_forms_gradient`).
    """
    weight, lora_A, lora_B, magnitude, bias = weights
    g: Any = scale.g
    divisor: Any = scale.divisor
    along_in, scaling, accumulate = form.magnitude_axis == "in", form.scaling, accumulation_dtype(dy, lora_A)
    need_dm = needs.magnitude or (not form.detach_norm and needs.norm)
    dx = torch.mm(dy, merged) if needs.x or (along_in and need_dm and low_dtype) else None
    d_a = d_b = dm = None
    if low_dtype is None:
        p = torch.mm(dy.t(), x)
        dm = (p * merged).sum(0 if along_in else 1) / (g * divisor)
        p = p.mul_(g if along_in else g.unsqueeze(1))
        d_a = torch.mm(cast(lora_B, p.dtype).t(), p).mul_(scaling)
        d_b = torch.mm(p, cast(lora_A, p.dtype).t()).mul_(scaling)
    elif needs.lora_A:
        d_low = fused.low_rank_gradient(dy, lora_B, scaling if along_in else g * scaling, low_dtype)
        d_a = mm(d_low.t(), x, accumulate)
        d_a = d_a.mul_(g) if along_in else d_a
    if needs.lora_B and low_dtype is not None:
        h = mm(x, cast(lora_A * g if along_in else lora_A, low_dtype).t(), low_dtype)
        d_b = mm(dy.t(), h, accumulate).mul_(scaling if along_in else (g * scaling).unsqueeze(1))
    if need_dm and dm is None:
        first, second = (x, dx) if along_in else (dy, kept)
        dm = dot_over_rows(first, second) / (g * divisor)  # type: ignore[arg-type]
    if dm is not None and need_dm and lost is not None:
        dm[lost] = _of_lost(dy, x, weights, lost, form) / divisor[lost]
    if not form.detach_norm and needs.norm:
        assert dm is not None
        _, of_a, of_b = fused.norm_gradient(weights, -dm * g / norm_of(divisor, form.eps), form, needs)
        d_a, d_b = fused.add(d_a, of_a), fused.add(d_b, of_b)
    return (
        dx if needs.x else None,
        None,
        fused.as_parameter(d_a, lora_A),
        fused.as_parameter(d_b, lora_B),
        cast(dm, magnitude.dtype) if needs.magnitude and dm is not None else None,
        cast(dy.sum(0, dtype=accumulate), bias.dtype) if needs.bias and bias is not None else None,
    )


def _forms_gradient(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True if ``P = dYᵀ X``, which gives dA, dB and dm, multiplies less than the products of rank r.

    That is so for many tokens from a rank of about a quarter of the features on, and keeps no y. Not in 16 bits, where
    sums over tokens are products of another kind.
    """
    (tokens, columns), rank, rows = x.shape, lora_A.shape[0], lora_B.shape[0]
    whole = rows * columns * (tokens + 2 * rank)
    return x.dtype == accumulation_dtype(x, lora_A) and whole < 2 * tokens * rank * (rows + columns)


def _of_lost(dy: Tensor, x: Tensor, weights: Weights, lost: Tensor, form: Form) -> Tensor:
    """``Σ_t dY ⊙ X Vᵀ`` of some rows of V, or of some columns ``Σ_t X ⊙ dY V``."""
    weight, lora_A, lora_B, _, _ = weights
    dtype = accumulation_dtype(dy)
    if form.magnitude_axis == "out":
        v = torch.addmm(weight[lost].to(dtype), lora_B[lost].to(dtype), lora_A.to(dtype), alpha=form.scaling)
        return (dy[:, lost].to(dtype) * (x.to(dtype) @ v.t())).sum(0)
    v = torch.addmm(weight[:, lost].to(dtype), lora_B.to(dtype), lora_A[:, lost].to(dtype), alpha=form.scaling)
    return (x[:, lost].to(dtype) * (dy.to(dtype) @ v)).sum(0)
