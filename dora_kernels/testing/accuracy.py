"""The exact answer to a problem, how far a result is from it, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core import reference
from dora_kernels.core.reference import weight_norm
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.testing.problems import NAMES, Problem, bf16, f16, f32, f64, solve, widened

ROW = ", worst row"
"""Suffix of a result's name in `errors` for the error of its worst row."""
_ALLOWED, _ALLOWED_ROW = 4.0, 16.0
"""Factors for a result and its worst row. A row has fewer roundings that average out; a wrong row is off by about 1."""
_FLOOR = 1e-6
"""Relative errors below this always pass, because a baseline can be exact by luck."""


def oracle(problem: Problem, needs: Iterable[str] = NAMES, **extra: Any) -> dict[str, Any]:
    """The exact output and gradients, as `solve` returns them, in float64."""
    return solve(_dense, widened(problem), needs, **extra)


def _dense(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    eps: float,
    weight_norm: Tensor | None = None,
) -> Tensor:
    return reference.dora_linear(
        x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, weight_norm, f64, eps
    )


def true_norm(problem: Problem) -> Tensor:
    """The norm that the magnitude is divided by, in float64."""
    return weight_norm(*widened(problem).factors, problem.scaling, problem.magnitude_axis)


def exact_merge(problem: Problem) -> Tensor:
    """The merged weight in float64."""
    wide = widened(problem)
    return reference.merge(*wide.factors, wide.magnitude, wide.scaling, wide.magnitude_axis)


def eager(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool = True,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """DoRA in plain PyTorch operations in the compute dtype, for either axis; the norm in float32."""
    dtype = dtype or x.dtype
    x = x.to(dtype)
    g = None
    if magnitude is not None:
        norm = weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
        g = magnitude_scale(magnitude, norm.detach() if detach_norm else norm, eps)
    if g is not None and magnitude_axis == "in":
        x = (x * g).to(dtype)
    y = F.linear(x, weight.to(dtype)) + scaling * F.linear(F.linear(x, lora_A.to(dtype)), lora_B.to(dtype))
    if g is not None and magnitude_axis == "out":
        y = (y * g).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def norm_bound(*tensors: Tensor | torch.dtype) -> float:
    """The relative error that the package allows itself for a norm that does not suffer from cancellation.

    For float64 it is in proportion to that for float32, where 1e-6 is 17 eps. A 16-bit weight has fewer digits to lose,
    and with float32 adapters the kernels multiply in 16-bit pieces: two of them, 2**-16 per product.

    Args:
        tensors: W, A and B, or their dtypes.
    """
    weight, *adapter = (t if isinstance(t, torch.dtype) else t.dtype for t in tensors)
    if f64 in (weight, *adapter):
        return 17 * torch.finfo(f64).eps
    if weight == f32:
        return 1e-6
    return 1e-5 if f32 in adapter else 2e-6


def distance(result: Tensor, wanted: Tensor) -> float:
    """The Frobenius norm of the difference, in float64."""
    assert result.shape == wanted.shape, f"shape {list(result.shape)} where {list(wanted.shape)} is wanted"
    return (result.to(wanted.device).to(f64) - wanted.to(f64)).norm().item()


def error(result: Tensor, wanted: Tensor) -> float:
    """The distance relative to the norm of `wanted`; NaN if the result has one."""
    return distance(result, wanted) / wanted.to(f64).norm().item()


def norm_error(norm: Tensor, exact: Tensor) -> float:
    """The largest relative error of an element, because one bad row is one bad output feature."""
    return ((norm.to(exact.device).to(f64) - exact) / exact).abs().max().item()


def budgets(
    problem: Problem,
    needs: Iterable[str] = NAMES,
    dtype: torch.dtype | None = None,
    *,
    baseline: dict[str, Tensor] | None = None,
    tries: int = 8,
    seed: int = 1,
) -> dict[str, float]:
    """The distance from the reference allowed for "y" and each gradient; see the module's docstring.

    Args:
        needs: The inputs whose gradients are wanted.
        dtype: The compute dtype, by default x's.
        baseline: Results of another implementation, by default those of `eager`. Results that are not finite allow
            nothing.
        tries: How often the inputs are moved by random amounts.
        seed: Seed of these amounts.
    """
    dtype = dtype or problem.x.dtype
    wide, wanted = widened(problem), oracle(problem, needs)
    plain = solve(eager, problem, needs, dtype=dtype) if baseline is None else baseline
    generator = torch.Generator().manual_seed(seed)
    eps = torch.finfo(dtype).eps

    def moved(t: Tensor, size: float = eps) -> Tensor:
        step = 2 * torch.rand(t.shape, generator=generator, dtype=f64).to(t.device) - 1
        return t * (1 + size * step)

    def worst(results: Iterable[dict[str, Tensor]], wanted: dict[str, Tensor]) -> dict[str, float]:
        found = dict.fromkeys(wanted, 0.0)
        for one in results:
            for name, exact in wanted.items():
                found[name] = max(found[name], distance(one[name].to(plain[name].dtype), exact))
        return found

    own = {name: distance(plain[name], exact) for name, exact in wanted.items()}
    allowed = [{name: off if math.isfinite(off) else 0.0 for name, off in own.items()}]
    allowed.append(worst((oracle(wide.map(moved), needs) for _ in range(tries)), wanted))
    if not problem.detach_norm:
        detached = wide.replace(detach_norm=True)
        allowed.append(worst((oracle(detached.map(moved), needs) for _ in range(tries)), oracle(detached, needs)))
    if problem.magnitude is not None and problem.weight.dtype in (bf16, f16):
        norm, bound = true_norm(problem), norm_bound(*problem.factors)
        allowed.append(
            worst((oracle(problem, needs, weight_norm=moved(norm, bound)) for _ in range(tries)), wanted)
        )  # fmt: skip
    factor = 4 if dtype == f64 else 2
    return {name: factor * max(each[name] for each in allowed) for name in wanted}


def check(
    results: dict[str, Tensor], problem: Problem, needs: Iterable[str] = NAMES, dtype: torch.dtype | None = None
) -> None:
    """Assert that every result is within its budget of the reference, and in the right dtype.

    Raises:
        AssertionError: a result exceeds its budget, is missing or has another dtype. The message says which, and by how
            much.
    """
    wanted, allowed = oracle(problem, needs), budgets(problem, needs, dtype)
    assert set(results) == set(wanted), f"results {sorted(results)}, expected {sorted(wanted)}"
    failures = []
    for name, result in results.items():
        expected = (dtype or problem.x.dtype) if name == "y" else getattr(problem, name).dtype
        assert result.dtype == expected, f"{name} is {result.dtype}, not {expected}"
        off = distance(result, wanted[name])
        if not off <= allowed[name]:
            size = wanted[name].norm().item()
            failures.append(f"{name} of norm {size:.2e} is off by {off:.2e}, allowed {allowed[name]:.2e}")
    assert not failures, "; ".join(failures)


def errors(results: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The relative error of each result, and that of its worst row under ``name + ROW``.

    For a list of results, the largest. The worst row's error is relative to the root mean square of the rows, so that a
    fault in one place shows.
    """
    found = {}
    for name, right in wanted.items():
        ones, others = (t if isinstance(t, list) else [t] for t in (results[name], right))
        pairs = [(one.view_as(other), other) for one, other in zip(ones, others, strict=True)]
        for suffix, measure in (("", error), (ROW, _row_error)):
            found[name + suffix] = max((measure(*pair) for pair in pairs), key=lambda off: (math.isnan(off), off))
    return found


def _row_error(result: Tensor, wanted: Tensor) -> float:
    shape = (-1, wanted.shape[-1] if wanted.dim() > 1 else 1)
    off, rows = (t.to(f64).reshape(shape) for t in (result.to(f64) - wanted.to(f64), wanted))
    return float(off.norm(dim=1).max() / rows.norm() * rows.shape[0] ** 0.5)


def limits(baseline: dict[str, Any], wanted: dict[str, Any]) -> dict[str, float]:
    """The limits of `errors`, given a baseline's results; infinite if these are not finite."""
    found = errors(baseline, wanted)
    allowed = {name: _ALLOWED_ROW if name.endswith(ROW) else _ALLOWED for name in found}
    return {name: max(_FLOOR, allowed[name] * off) for name, off in found.items() if math.isfinite(off)}


def beyond(found: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """Describe each error that exceeds its limit. NaN exceeds any limit."""
    wrong = [name for name in found if name in allowed and not found[name] <= allowed[name]]
    return [f"{name} off by {found[name]:.1e}, allowed {allowed[name]:.1e}" for name in wrong]


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """True if both have the same names, and equal values in every tensor."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
