"""Lanes, problems, the float64 oracle, and the error that a result may have.

**The budget.** The distance of a result from the oracle, in the Frobenius norm, may be twice the largest of

* that of `eager`: the same layer in plain PyTorch operations, in the same dtypes, differentiated by autograd;
* the change of the oracle's answer when every input moves by a random relative amount of up to one eps of the compute
  dtype: the inputs' own rounding (half an eps) and as much again for the intermediate results, which are rounded
  too. The worst of eight tries. This is what rounding does to the problem whatever the algorithm; it counts where
  `eager` is exact by luck, as a result of a single number may be;
* for the full gradient, which is the detached one less a part of it, the same change of the detached one: where
  little is left of the difference, the errors are those of what was subtracted;
* for a 16-bit weight, the change of the oracle's answer when the norm moves by its own bound (`norm_bound`).

Twice, because two evaluations that round in different places have independent errors of about the same size, and a
norm of a few elements scatters by nearly that factor. In float64 the oracle errs as much as either: twice again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import dora_linear, dora_weight_norm
from dora_kernels.core import reference
from dora_kernels.core.precision import compute_dtype
from dora_kernels.core.scale import safe_divisor

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")


class Lane(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.backend == "triton" and self.device == "cpu"


LANES = [
    pytest.param(Lane("torch", "cpu"), id="torch"),
    pytest.param(Lane("triton", "cpu"), id="triton"),
    pytest.param(Lane("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(Lane("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


def usable(lane: Lane) -> Lane:
    """The lane, or a skip where this machine lacks it. A GPU that triton refuses is not skipped: that is a failure."""
    if lane.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if lane.backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if lane.interpreted and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter is off: the compiled kernels are tested on the GPU")
    return lane


def adamw_8bit(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """bitsandbytes' optimizer, its state in 8 bits for tensors of any size."""
    optim = pytest.importorskip("bitsandbytes", reason="bitsandbytes, whose 8-bit optimizer this is, is missing").optim
    return optim.AdamW8bit(parameters, lr=lr, min_8bit_size=1)


class Forced(NamedTuple):
    """A lane on which thresholds are 0, so that small problems take the path of large ones."""

    lane: Lane
    thresholds: tuple[str, ...]


def _forced(name: str, lane: Lane, *constants: str) -> Any:
    """With these constants, which are thresholds, at 0."""
    marks = pytest.mark.gpu if lane.device == "cuda" else ()
    return pytest.param(Forced(lane, tuple(f"dora_kernels.{one}" for one in constants)), id=name, marks=marks)


# The other form of the norm, which the CPU takes for large weights only, and the kernels at high ranks.
_LARGE = ("engine.blocked._FACTORED_ELEMENTS", "engine.blocked._FACTORED_FEATURES")
FACTORED = [
    _forced("torch-factored", Lane("torch", "cpu"), *_LARGE),
    _forced("triton-factored", Lane("triton", "cpu"), "kernels.config._DIRECT_RANK"),
    _forced("triton-cuda-factored", Lane("triton", "cuda"), "kernels.config._DIRECT_RANK"),
]
# The norm kept on the device, which is worth it for large weights only.
KEPT = [
    _forced("triton-kept", Lane("triton", "cpu"), "kernels.config._KEPT_BYTES"),
    _forced("triton-cuda-kept", Lane("triton", "cuda"), "kernels.config._KEPT_BYTES"),
]


@contextlib.contextmanager
def norm_lane(given: Lane | Forced) -> Iterator[Lane]:
    """`usable`, with the thresholds of a `Forced` lane at 0 inside."""
    lane, thresholds = given if isinstance(given, Forced) else (given, ())
    usable(lane)
    with pytest.MonkeyPatch.context() as patch:
        for name in thresholds:
            patch.setattr(name, 0)
        yield lane


@dataclasses.dataclass(frozen=True)
class Problem:
    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scaling: float
    magnitude_axis: str
    detach_norm: bool
    eps: float = 0.0

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in NAMES}

    @property
    def options(self) -> dict[str, Any]:
        return {
            "scaling": self.scaling, "magnitude_axis": self.magnitude_axis, "detach_norm": self.detach_norm,
            "eps": self.eps,
        }  # fmt: skip

    def replace(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Every tensor changed, the upstream gradient too."""
        tensors = {**self.tensors, "dy": self.dy}
        return self.replace(**{name: None if t is None else change(t) for name, t in tensors.items()})


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
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """A layer in training: the low-rank product about as large as W, magnitudes moved, a bias larger than the output.

    `dtypes` are those of x, of the base layer and of the adapter.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=f64)

    of_x, of_base, of_adapter = dtypes
    weight = (normal(out_features, in_features) / in_features**0.5).to(of_base)
    lora_A = (normal(rank, in_features) / in_features**0.5).to(of_adapter)
    lora_B = (normal(out_features, rank) / rank**0.5).to(of_adapter)
    norm = reference.weight_norm(weight.to(f64), lora_A.to(f64), lora_B.to(f64), scaling, magnitude_axis)
    moved = norm * (0.5 + torch.rand(norm.shape, generator=generator, dtype=f64))
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
    """The output "y" and the gradient of every needed input, by name."""
    leaves = leaves_of(problem, needs)
    y = function(**leaves, **problem.options, **extra)
    return {"y": y.detach(), **gradients(y, leaves, problem.dy.to(y.dtype))}


def gradients(y: Tensor, leaves: dict[str, Tensor | None], dy: Tensor, **extra: Any) -> dict[str, Tensor]:
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    if not wanted:
        assert not y.requires_grad
        return {}
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy, **extra), strict=True))


def ours(problem: Problem, backend: str, needs: Iterable[str] = NAMES, **extra: Any) -> dict[str, Any]:
    return solve(dora_linear, problem, needs, backend=backend, **extra)


def reference_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    weight_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`dora_linear` by the dense oracle, with V formed whole."""
    return reference.dora_linear(
        x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, weight_norm,
        compute_dtype(x), eps,
    )  # fmt: skip


def divisor_of(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, backend: str = "auto") -> Tensor:
    """What a magnitude along "out" is divided by."""
    return safe_divisor(dora_weight_norm(weight, lora_A, lora_B, scaling=scaling, backend=backend))


def oracle(problem: Problem, needs: Iterable[str] = NAMES, **extra: Any) -> dict[str, Any]:
    return solve(reference_linear, problem.map(lambda t: t.to(f64)), needs, **extra)


def saved_by(function: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """`function()`, and every tensor that its graph keeps for the backward."""
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return function(), saved


def true_norm(problem: Problem) -> Tensor:
    """In float64, of the weights as stored."""
    weight, lora_A, lora_B = (t.to(f64) for t in (problem.weight, problem.lora_A, problem.lora_B))
    return reference.weight_norm(weight, lora_A, lora_B, problem.scaling, problem.magnitude_axis)


def norm_bound(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> float:
    """The relative error that the package allows itself for a norm that does not suffer from cancellation.

    float64 is of the same kind as float32, 1e-6 being 17 eps. A 16-bit weight has less to lose, and with float32
    adapters the kernels multiply in pieces of 16 bits each: two of them, 2**-16 per product.
    """
    dtypes = {weight.dtype, lora_A.dtype, lora_B.dtype}
    if f64 in dtypes:
        return 17 * torch.finfo(f64).eps
    if weight.dtype == f32:
        return 1e-6
    return 1e-5 if f32 in dtypes else 2e-6


def eager(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """PEFT's computation in plain PyTorch operations in the compute dtype, for either axis; its norm in float32."""
    dtype = dtype or x.dtype
    x = x.to(dtype)
    g = None
    if magnitude is not None:
        norm = reference.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
        g = reference.magnitude_scale(magnitude, norm.detach() if detach_norm else norm, eps)
    if g is not None and magnitude_axis == "in":
        x = (x * g).to(dtype)
    y = F.linear(x, weight.to(dtype)) + scaling * F.linear(F.linear(x, lora_A.to(dtype)), lora_B.to(dtype))
    if g is not None and magnitude_axis == "out":
        y = (y * g).to(dtype)
    return y if bias is None else y + bias.to(dtype)


def distance(result: Tensor, wanted: Tensor) -> float:
    assert result.shape == wanted.shape, f"shape {list(result.shape)} where {list(wanted.shape)} is wanted"
    return (result.to(f64) - wanted.to(f64)).norm().item()


def error(result: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted."""
    return distance(result, wanted) / wanted.to(f64).norm().item()


def budgets(problem: Problem, needs: Iterable[str] = NAMES, dtype: torch.dtype | None = None) -> dict[str, float]:
    """The distance from the oracle allowed to "y" and each gradient; see the module's docstring."""
    dtype = dtype or problem.x.dtype
    wanted = oracle(problem, needs)
    plain = solve(eager, problem, needs, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    eps = torch.finfo(dtype).eps

    def moved(t: Tensor, size: float = eps) -> Tensor:
        step = 2 * torch.rand(t.shape, generator=generator, dtype=f64).to(t.device) - 1
        return t.to(f64) * (1 + size * step)

    def worst(tries: list[dict[str, Tensor]], wanted: dict[str, Tensor]) -> dict[str, float]:
        return {n: max(distance(one[n].to(plain[n].dtype), wanted[n]) for one in tries) for n in wanted}

    allowed = [worst([plain], wanted), worst([oracle(problem.map(moved), needs) for _ in range(8)], wanted)]
    if not problem.detach_norm:
        detached = problem.replace(detach_norm=True)
        tries = [oracle(detached.map(moved), needs) for _ in range(8)]
        allowed.append(worst(tries, oracle(detached, needs)))
    if problem.magnitude is not None and problem.weight.dtype in (bf16, f16):
        norm, bound = true_norm(problem), norm_bound(problem.weight, problem.lora_A, problem.lora_B)
        allowed.append(worst([oracle(problem, needs, weight_norm=moved(norm, bound)) for _ in range(4)], wanted))
    factor = 4 if dtype == f64 else 2
    return {name: factor * max(each[name] for each in allowed) for name in wanted}


def check(
    results: dict[str, Tensor], problem: Problem, needs: Iterable[str] = NAMES, dtype: torch.dtype | None = None
) -> None:
    """Every result within its budget of the oracle, in the right dtype."""
    wanted, allowed = oracle(problem, needs), budgets(problem, needs, dtype)
    assert set(results) == set(wanted)
    failures = []
    for name, result in results.items():
        expected = (dtype or problem.x.dtype) if name == "y" else problem.tensors[name].dtype
        assert result.dtype == expected, f"{name} is {result.dtype}, not {expected}"
        off = distance(result, wanted[name])
        if not off <= allowed[name]:
            size = wanted[name].norm().item()
            failures.append(f"{name} of norm {size:.2e} is off by {off:.2e}, allowed {allowed[name]:.2e}")
    assert not failures, "; ".join(failures)


def exact_merge(problem: Problem) -> Tensor:
    """The merged weight in float64."""
    weight, lora_A, lora_B = (t.to(f64) for t in (problem.weight, problem.lora_A, problem.lora_B))
    direction = weight + problem.scaling * lora_B @ lora_A
    if problem.magnitude is None:
        return direction
    g = reference.magnitude_scale(problem.magnitude.to(f64), true_norm(problem))
    return direction * (g.unsqueeze(1) if problem.magnitude_axis == "out" else g)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
