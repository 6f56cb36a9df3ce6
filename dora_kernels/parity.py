"""What `dora-kernels parity` computes: errors of `dora_linear` against a float64 oracle, beside PEFT's formula's.

For each case (shape, rank, dtype, magnitude axis) the reference backend in float64, on the same stored numbers, gives
the exact output, norm and gradients. The error of a result a is ``||a - exact|| / ||exact||``, taken in float64; that
of the norm is the largest relative error of an element, since one bad row is one bad output feature.

**The budget**, the rule of the package's tests: an output or gradient may be off by the larger of

* twice the error of PEFT's formula (`peft_formula`) in the same dtypes, and
* twice what the exact result moves by when every input moves by a random relative amount of up to one eps of the
  compute dtype, the worst of several tries: what rounding does to the problem whatever the algorithm. This is what
  counts where PEFT computes in a wider dtype: its float32 adapters on a bfloat16 base are multiplied in float32.

Twice, because two evaluations that round in different places have independent errors of about the same size. The
norm, always in float32 accuracy, has a bound of its own (`NORM_BOUNDS`), or twice the error of PEFT's where PEFT
computes it in float32 too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core import reference
from dora_kernels.core.validation import AXES, BACKENDS
from dora_kernels.engine.dispatch import first_line, triton_problem
from dora_kernels.functional import dora_linear, dora_weight_norm

# (x and the base layer, the adapter); "mixed" is what PEFT makes of a bfloat16 model by default.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
}

# What the package allows its norm. With float32 adapters of a 16-bit weight the kernels multiply in two 16-bit pieces.
NORM_BOUNDS = {"float32": 1e-6, "bfloat16": 2e-6, "float16": 2e-6, "mixed": 1e-5}

RULE = (
    "Budget: ours may be off by twice the error of PEFT's formula in the same dtypes, or by twice what the exact "
    "result moves by when every input moves by up to one eps of the compute dtype, whichever is larger; an element of "
    "the norm by "
    + ", ".join(f"{bound:.0e} ({dtype})" for dtype, bound in NORM_BOUNDS.items())
    + ", or twice PEFT's error where its norm is in float32."
)

DEFAULT_SHAPES = ("128,512,384", "37,131,257")  # one of whole tiles, one of none
INTERPRETED_SHAPES = ("37,131,257",)  # Triton's interpreter takes half a minute for the other
DEFAULT_RANKS = (16,)

# Multiply-adds of a product below which a case is small. With several threads the default cases, all small, took 27 s
# on two busy cores, where one thread took 2.6 s: the threads wait for one another.
_SMALL = 10**8

_SCALING = 0.7
_GRADIENTS = {"x": "dX", "lora_A": "dA", "lora_B": "dB", "magnitude": "dm", "bias": "db", "weight": "dW"}


class OptionError(ValueError):
    """An option that cannot be served; the message is one line that begins with the option's name."""


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int]  # tokens, out_features, in_features
    rank: int
    dtype: str
    axis: str

    def __str__(self) -> str:
        return f"{','.join(map(str, self.shape))} rank {self.rank} {self.dtype} axis {self.axis}"


@dataclass(frozen=True)
class Cell:
    """One measured error. Where the call itself failed there is one cell, "call", with the message as its note."""

    case: Case
    backend: str
    quantity: str
    error: float
    peft: float = math.nan
    budget: float = math.nan
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        where = f"{self.quantity}, {self.case}, backend {self.backend}"
        if self.note:
            return f"{where}: {self.note}"
        return f"{where}: off by {self.error:.1e}, budget {self.budget:.1e}, PEFT's formula {self.peft:.1e}"

    def as_dict(self) -> dict[str, Any]:
        numbers = {"error": self.error, "peft_error": self.peft, "budget": self.budget}
        return {
            "shape": list(self.case.shape),
            "rank": self.case.rank,
            "dtype": self.case.dtype,
            "axis": self.case.axis,
            "backend": self.backend,
            "quantity": self.quantity,
            **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
            "ok": self.ok,
            "note": self.note,
        }


class Problem(NamedTuple):
    """A layer in training and an upstream gradient."""

    tensors: dict[str, Tensor]
    dy: Tensor
    axis: str

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        return Problem({name: change(t) for name, t in self.tensors.items()}, change(self.dy), self.axis)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["weight"], self.tensors["lora_A"], self.tensors["lora_B"]


class Yardstick(NamedTuple):
    """A case's problem, its exact results, and by how much PEFT's formula misses and ours may miss them."""

    case: Case
    problem: Problem
    gradients: tuple[str, ...]
    exact: dict[str, Tensor]
    peft: dict[str, float]
    budget: dict[str, float]


@dataclass(frozen=True)
class Settings:
    cases: tuple[Case, ...]
    backends: tuple[str, ...]
    not_run: dict[str, str]
    device: torch.device
    seed: int
    weight_gradient: bool

    @property
    def quantities(self) -> tuple[str, ...]:
        return "y", *(_GRADIENTS[name] for name in _wanted(self.weight_gradient)), "norm"


def settings(
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    axes: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    device: str | None = None,
    seed: int = 0,
    weight_gradient: bool = False,
) -> Settings:
    """The options as the command line takes them, checked; None or nothing takes the defaults.

    Raises:
        OptionError: a value that is not known or not possible here.
    """
    for rank in ranks or ():
        if rank < 1:
            raise OptionError(f"--rank: expected at least 1, got {rank}")
    names = _known("--dtype", dtypes, tuple(DTYPES)) or tuple(DTYPES)
    along = _known("--axis", axes, AXES) or AXES
    where = _find_device(device)
    run, not_run = _choose_backends(_known("--backend", backends, BACKENDS), where)
    interpreted = "triton" in run and where.type != "cuda"
    sizes = [_parse_shape(shape) for shape in shapes or (INTERPRETED_SHAPES if interpreted else DEFAULT_SHAPES)]
    cases = itertools.product(dict.fromkeys(sizes), dict.fromkeys(ranks or DEFAULT_RANKS), names, along)
    return Settings(
        tuple(Case(size, rank, dtype, axis) for size, rank, dtype, axis in cases),
        run, not_run, where, seed, weight_gradient,
    )  # fmt: skip


def run(options: Settings, advance: Callable[[Case, str], None] = lambda case, backend: None) -> list[Cell]:
    """Every cell, case by case; `advance` hears of each case and backend once it is done."""
    cells = []
    for case in options.cases:
        with threads_for(case):
            try:
                yardstick = prepare(case, options.device, options.seed, options.weight_gradient)
            except (RuntimeError, MemoryError) as error:
                raise OptionError(f"--shape: {case} failed on {options.device}: {first_line(error)}") from error
            for backend in options.backends:
                cells += measure(yardstick, backend)
                advance(case, backend)
    return cells


@contextlib.contextmanager
def threads_for(case: Case) -> Iterator[None]:
    """One thread for a small case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if _is_small(case) else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(case: Case, device: torch.device, seed: int = 0, weight_gradient: bool = False) -> Yardstick:
    """The exact results of a case, the errors of PEFT's formula and the budgets."""
    problem = make_problem(case, device, seed)
    wanted = _wanted(weight_gradient)
    wide = problem.map(_widener(device))
    exact = _oracle(wide, wanted)
    plain = _solve(peft_formula, problem, wanted, {"scaling": _SCALING, "magnitude_axis": case.axis})
    compute = problem.tensors["x"].dtype
    generator = torch.Generator().manual_seed(seed + 1)

    def move(t: Tensor) -> Tensor:
        step = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
        return t * (1 + torch.finfo(compute).eps * step.to(t.device))

    # Results of a few numbers, as those of one token and rank 1, scatter: in 19 200 results of small layers four tries
    # gave ten false alarms, sixteen gave one.
    tries = [_oracle(wide.map(move), wanted) for _ in range(16 if _is_small(case) else 4)]
    peft = {name: _error(result, exact[name]) for name, result in plain.items()}
    budget = {}
    for name, result in plain.items():
        rounding = max(_error(one[name].to(result.dtype), exact[name]) for one in tries)
        # A formula that overflows or gives NaN (every comparison with it is false) grants nothing.
        budget[name] = 2 * max(rounding, peft[name] if peft[name] < math.inf else 0.0)
    exact["norm"] = reference.weight_norm(*wide.factors, _SCALING, case.axis)
    peft["norm"] = _norm_error(peft_norm(*problem.factors, _SCALING, case.axis), exact["norm"])
    fair = DTYPES[case.dtype][1] == torch.float32
    budget["norm"] = max(NORM_BOUNDS[case.dtype], 2 * peft["norm"] if fair else 0.0)
    return Yardstick(case, problem, wanted, exact, peft, budget)


def measure(yardstick: Yardstick, backend: str) -> list[Cell]:
    """Our errors; a call that raises is a cell of its own."""
    case, problem, exact = yardstick.case, yardstick.problem, yardstick.exact
    options: dict[str, Any] = {"scaling": _SCALING, "magnitude_axis": case.axis, "backend": backend}
    try:
        results = _solve(dora_linear, problem, yardstick.gradients, options)
        norm = dora_weight_norm(*problem.factors, **options)
        errors = {name: _error(result, exact[name]) for name, result in results.items()}
        errors["norm"] = _norm_error(norm, exact["norm"])
    except Exception as error:  # a compiler's, a driver's or our own: the table goes on and says so
        return [Cell(case, backend, "call", math.inf, note=f"{type(error).__name__}: {first_line(error)}")]
    peft, budget = yardstick.peft, yardstick.budget
    return [Cell(case, backend, name, off, peft[name], budget[name]) for name, off in errors.items()]


def make_problem(case: Case, device: torch.device, seed: int) -> Problem:
    """A trained-looking layer: a low-rank product about as large as W, magnitudes moved by up to half."""
    generator = torch.Generator().manual_seed(seed)
    of_base, of_adapter = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, out_features, in_features = case.shape
    weight = (normal(out_features, in_features) / in_features**0.5).to(of_base)
    lora_A = (normal(case.rank, in_features) / in_features**0.5).to(of_adapter)
    lora_B = (normal(out_features, case.rank) / case.rank**0.5).to(of_adapter)
    norm = reference.weight_norm(weight, lora_A, lora_B, _SCALING, case.axis)
    tensors = {
        "x": normal(tokens, in_features).to(of_base),
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "magnitude": (norm * (0.5 + torch.rand(norm.shape, generator=generator))).to(of_adapter),
        "bias": normal(out_features).to(of_base),
    }
    dy = normal(tokens, out_features).to(of_base)
    return Problem(tensors, dy, case.axis).map(lambda t: t.to(device))


def peft_formula(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
) -> Tensor:
    """What PEFT's DoRA layer computes, operation by operation and dtype by dtype, without dropout.

    PEFT has no axis "in"; there this is the same formula with g on the other side of the product, so that the base
    product for ``(g - 1) * x`` is a second one.
    """
    result = F.linear(x, weight, bias)
    dtype = result.dtype
    x = x.to(lora_A.dtype)
    g = magnitude / peft_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
    if magnitude_axis == "out":
        base = result if bias is None else result - bias
        low = F.linear(F.linear(x, lora_A), lora_B)
        return (result + ((g - 1) * base + g * low * scaling)).to(dtype)
    base = F.linear((g - 1) * x, weight.to(x.dtype))
    low = F.linear(F.linear(g * x, lora_A), lora_B)
    return (result + (base + low * scaling)).to(dtype)


def peft_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str) -> Tensor:
    """PEFT's norm: of a dense sum in the adapter's dtype, returned in it."""
    with torch.no_grad():
        direction = weight.to(lora_A.dtype) + scaling * (lora_B @ lora_A)
        return torch.linalg.norm(direction, dim=1 if magnitude_axis == "out" else 0).to(direction.dtype)


def _is_small(case: Case) -> bool:
    return math.prod(case.shape) < _SMALL


def _wanted(weight_gradient: bool) -> tuple[str, ...]:
    return tuple(name for name in _GRADIENTS if weight_gradient or name != "weight")


def _solve(
    function: Callable[..., Tensor], problem: Problem, wanted: tuple[str, ...], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The output "y" and the wanted gradients."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in problem.tensors.items()}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], problem.dy)
    return {"y": y.detach(), **{_GRADIENTS[name]: grad for name, grad in zip(wanted, grads)}}


def _oracle(wide: Problem, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    options = {"scaling": _SCALING, "magnitude_axis": wide.axis, "backend": "reference"}
    return _solve(dora_linear, wide, wanted, options)


def _widener(device: torch.device) -> Callable[[Tensor], Tensor]:
    """To float64, on the CPU where the device has none."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        device = torch.device("cpu")
    return lambda t: t.to(device).to(torch.float64)


def _error(result: Tensor, exact: Tensor) -> float:
    if result.shape != exact.shape:
        raise RuntimeError(f"a result of shape {list(result.shape)} where {list(exact.shape)} is expected")
    return ((result.to(exact.device).to(exact.dtype) - exact).norm() / exact.norm()).item()


def _norm_error(norm: Tensor, exact: Tensor) -> float:
    return ((norm.to(exact.device).to(exact.dtype) - exact) / exact).abs().max().item()


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    try:
        tokens, out_features, in_features = (int(part) for part in parts)
    except ValueError:
        raise OptionError(f"--shape: expected tokens,out_features,in_features, as 128,512,384; got {text!r}") from None
    if min(tokens, out_features, in_features) < 1:
        raise OptionError(f"--shape: expected three sizes of at least 1, got {text!r}")
    return tokens, out_features, in_features


def _known(option: str, values: Sequence[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for value in values or ():
        if value not in known:
            raise OptionError(f"{option}: expected one of {', '.join(known)}; got {value!r}")
    return tuple(dict.fromkeys(values or ()))


def _find_device(name: str | None) -> torch.device:
    if name is None:
        name = "cpu"
        if torch.accelerator.is_available():
            name = str(torch.accelerator.current_accelerator())
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # also refuses "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device: {name!r} is not available: {first_line(error)}") from None
    return device


def _choose_backends(named: tuple[str, ...], device: torch.device) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those to run, and why others are not; one asked for by name has to be available."""
    chosen = named or ("torch", "triton")
    problem = triton_problem(device) if "triton" in chosen else None
    if problem is None:
        return chosen, {}
    if named:
        raise OptionError(f"--backend: triton is not available on {device}: {problem}")
    return tuple(name for name in chosen if name != "triton"), {"triton": problem}
