"""Problems, a float64 reference and error budgets, to test a DoRA layer or kernel against.

The tests of this package, ``dora-kernels parity`` and the benchmarks use this module, and so can a kernel of your own:

    from dora_kernels import testing

    problem = testing.make_problem((7,), 51, 45, rank=3, dtypes=testing.all_of("bf16"))
    results = testing.solve(my_dora_linear, problem)     # the output and every gradient
    testing.check(results, problem)                      # AssertionError if one exceeds its budget

The reference (`oracle`) is `dora_kernels.core.reference`, evaluated in float64 on the numbers as they are stored.

**The budget** (`budgets`). The distance of a result from the reference, in the Frobenius norm, may be twice the largest
of

* the distance of a baseline, by default `eager`: the same layer in plain PyTorch operations, in the same dtypes,
  differentiated by autograd;
* the change of the reference's answer when every input moves by a random relative amount of up to one eps of the
  compute dtype: half an eps for the inputs' own rounding, and as much again for the intermediate results, which are
  rounded too. This is the worst of several tries. It is what rounding does to the problem whatever the algorithm, and
  it matters if the baseline is exact by luck, as a result of a single number may be;
* for the full gradient, which is the detached one minus a part of it, the same change of the detached one: if the
  difference is small, the errors are those of the two terms;
* for a 16-bit weight, the change of the reference's answer when the norm moves by its own bound (`norm_bound`).

Twice, because two evaluations that round in different places have independent errors of about the same size, and a
norm of a few elements varies by nearly that factor. In float64 the reference's own error is as large as theirs: twice
again.

**For whole models** (`limits`), where only a baseline's results are known: four times the baseline's relative error,
and sixteen times that of its worst row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core import reference
from dora_kernels.core.reference import weight_norm
from dora_kernels.core.scale import magnitude_scale

__all__ = [
    "DTYPES", "NAMES", "ROW", "Problem", "all_of", "beyond", "budgets", "check", "distance", "eager", "error", "errors",
    "exact_merge", "gradients", "leaves_of", "limits", "magnitude_scale", "make_problem", "norm_bound", "norm_error",
    "oracle", "same_bits", "solve", "true_norm", "weight_norm", "widened",
]  # fmt: skip

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

DTYPES = {
    "fp32": (f32, f32),
    "bf16": (bf16, bf16),
    "fp16": (f16, f16),
    "bf16+fp32": (bf16, f32),
    "fp16+fp32": (f16, f32),
}
"""By name: the dtype of the activations and the base layer, and that of the adapter. PEFT keeps adapters in float32."""

NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
"""The differentiable arguments of a DoRA layer, in the order of `dora_kernels.dora_linear`."""

ROW = ", worst row"
"""Suffix of a result's name in `errors` for the error of its worst row."""
_ALLOWED, _ALLOWED_ROW = 4.0, 16.0
"""Factors for a result and its worst row. A row has fewer roundings that average out; a wrong row is off by about 1."""
_FLOOR = 1e-6
"""Relative errors below this always pass, because a baseline can be exact by luck."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer in training, and an upstream gradient.

    Attributes:
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        magnitude: ``[out_features]`` for axis "out", ``[in_features]`` for "in"; None for plain LoRA.
        bias: ``[out_features]`` or None.
        dy: ``[..., out_features]``, the gradient of the output.
        scaling: Factor of ``lora_B @ lora_A``.
        magnitude_axis: "out" or "in".
        detach_norm: True if no gradient flows through the norm.
        eps: Added to the norm.
    """

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scaling: float
    magnitude_axis: str = "out"
    detach_norm: bool = True
    eps: float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """The arguments in `NAMES`."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """W, A and B."""
        return self.weight, self.lora_A, self.lora_B

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that are not tensors."""
        return {
            "scaling": self.scaling, "magnitude_axis": self.magnitude_axis, "detach_norm": self.detach_norm,
            "eps": self.eps,
        }  # fmt: skip

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """A copy with `change` applied to every tensor, including `dy`."""
        tensors = {**self.tensors, "dy": self.dy}
        return self.replace(**{name: None if t is None else change(t) for name, t in tensors.items()})


def all_of(name: str) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The `dtypes` of `make_problem` for a name in `DTYPES`.

    Raises:
        ValueError: there is no such name.
    """
    if name not in DTYPES:
        raise ValueError(f"name: expected one of {', '.join(DTYPES)}; got {name!r}")
    base, adapter = DTYPES[name]
    return base, base, adapter


def make_problem(
    lead: tuple[int, ...] = (7,),
    in_features: int = 51,
    out_features: int = 45,
    rank: int = 3,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (f32, f32, f32),
    *,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    bias: bool = True,
    magnitude: bool = True,
    scaling: float = 0.7,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """Make a random layer in training.

    The low-rank product is about as large as W, magnitudes differ from the norm by up to half, and the bias is larger
    than the output.

    Args:
        lead: Leading dimensions of x.
        dtypes: Dtypes of x and `dy`, of the base layer, and of the adapter.
        bias: False for a layer without bias.
        magnitude: False for plain LoRA.
        device: The tensors' device. Random numbers are drawn there on a CUDA device, and on the CPU otherwise.
        seed: The same seed gives the same numbers.
    """
    device = torch.device(device)
    drawn = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(drawn).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=f64, device=drawn)

    of_x, of_base, of_adapter = dtypes
    weight = (normal(out_features, in_features) / in_features**0.5).to(of_base)
    lora_A = (normal(rank, in_features) / in_features**0.5).to(of_adapter)
    lora_B = (normal(out_features, rank) / rank**0.5).to(of_adapter)
    norm = weight_norm(weight.to(f64), lora_A.to(f64), lora_B.to(f64), scaling, magnitude_axis)
    moved = norm * (0.5 + torch.rand(norm.shape, generator=generator, dtype=f64, device=drawn))
    problem = Problem(
        x=normal(*lead, in_features).to(of_x),
        weight=weight,
        lora_A=lora_A,
        lora_B=lora_B,
        magnitude=moved.to(of_adapter) if magnitude else None,
        bias=(3 * normal(out_features)).to(of_base) if bias else None,
        dy=normal(*lead, out_features).to(of_x),
        scaling=scaling,
        magnitude_axis=magnitude_axis,
        detach_norm=detach_norm,
    )
    return problem.map(lambda t: t.to(device))


def leaves_of(problem: Problem, needs: Iterable[str] = NAMES) -> dict[str, Tensor | None]:
    """The problem's tensors as leaves of a new graph, with their own strides; those in `needs` require grad."""
    needs = set(needs)
    return {n: None if t is None else t.detach().requires_grad_(n in needs) for n, t in problem.tensors.items()}


def solve(
    function: Callable[..., Tensor], problem: Problem, needs: Iterable[str] = NAMES, **extra: Any
) -> dict[str, Any]:
    """Call `function` as `dora_kernels.dora_linear` is called, with `extra` arguments.

    Returns:
        The output "y", and the gradient of every needed input that the problem has, by name.
    """
    leaves = leaves_of(problem, needs)
    y = function(**leaves, **problem.options, **extra)
    return {"y": y.detach(), **gradients(y, leaves, problem.dy.to(y.dtype))}


def gradients(y: Tensor, leaves: dict[str, Tensor | None], dy: Tensor, **extra: Any) -> dict[str, Tensor]:
    """The gradient of every leaf that requires one, by name."""
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not wanted:
        assert not y.requires_grad
        return {}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy, **extra), strict=True))


def widened(problem: Problem) -> Problem:
    """The problem in float64, on the CPU where its device has no float64."""
    device = problem.x.device
    try:
        torch.zeros(1, dtype=f64, device=device)
    except (RuntimeError, TypeError):
        device = torch.device("cpu")
    return problem.map(lambda t: t.to(device).to(f64))


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
