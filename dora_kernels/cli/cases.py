"""The errors of one case of `dora-kernels parity`: ours and those of PEFT's formula, with what ours may be."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels import testing
from dora_kernels.cli.peft_formula import peft_formula, peft_norm
from dora_kernels.engine.dispatch import first_line
from dora_kernels.functional import dora_linear, dora_weight_norm

# Dtypes of x and the base layer, and of the adapter. PEFT turns a bfloat16 model into "mixed" by default.
DTYPES = {
    name: testing.DTYPES[short]
    for name, short in (("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16"), ("mixed", "bf16+fp32"))
}

# A case is small if its products have fewer multiply-adds than this. With several threads the default cases, all small,
# took 27 s on two busy cores, with one thread 2.6 s: the threads wait for one another.
_SMALL = 10**8

_GRADIENTS = {"x": "dX", "lora_A": "dA", "lora_B": "dB", "magnitude": "dm", "bias": "db", "weight": "dW"}


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
    """One measured error. If the call itself failed there is one cell, "call", with the message as its note."""

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


class Yardstick(NamedTuple):
    """A case's problem, its exact results, the errors of PEFT's formula, and the errors allowed to ours."""

    case: Case
    problem: testing.Problem
    gradients: tuple[str, ...]
    exact: dict[str, Tensor]
    peft: dict[str, float]
    budget: dict[str, float]


def quantities(weight_gradient: bool) -> tuple[str, ...]:
    """The results that are compared, as the table names them."""
    return "y", *(_GRADIENTS[name] for name in _wanted(weight_gradient)), "norm"


@contextlib.contextmanager
def threads_for(case: Case) -> Iterator[None]:
    """Use one thread for a small case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if _is_small(case) else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(case: Case, device: torch.device, seed: int = 0, weight_gradient: bool = False) -> Yardstick:
    """Compute the exact results of a case, the errors of PEFT's formula and the budgets."""
    tokens, out_features, in_features = case.shape
    base, adapter = DTYPES[case.dtype]
    problem = testing.make_problem(
        (tokens,), in_features, out_features, case.rank, (base, base, adapter), magnitude_axis=case.axis, device=device,
        seed=seed,
    )  # fmt: skip
    wanted = _wanted(weight_gradient)
    exact = testing.oracle(problem, wanted)
    plain = testing.solve(peft_formula, problem, wanted)
    # Results of a few numbers, e.g. with one token and rank 1, vary widely: in 19 200 results of small layers four
    # tries gave ten false alarms, sixteen gave one.
    tries = 16 if _is_small(case) else 4
    allowed = testing.budgets(problem, wanted, baseline=plain, tries=tries, seed=seed + 1)
    peft = {_short(name): testing.error(result, exact[name]) for name, result in plain.items()}
    budget = {_short(name): allowed[name] / exact[name].norm().item() for name in exact}
    exact = {_short(name): result for name, result in exact.items()}
    exact["norm"] = testing.true_norm(problem)
    peft["norm"] = testing.norm_error(peft_norm(*problem.factors, problem.scaling, case.axis), exact["norm"])
    fair = adapter == torch.float32
    budget["norm"] = max(testing.norm_bound(base, adapter), 2 * peft["norm"] if fair else 0.0)
    return Yardstick(case, problem, wanted, exact, peft, budget)


def measure(yardstick: Yardstick, backend: str) -> list[Cell]:
    """Return our errors. A call that raises gives one cell of its own."""
    case, problem, exact = yardstick.case, yardstick.problem, yardstick.exact
    try:
        results = testing.solve(dora_linear, problem, yardstick.gradients, backend=backend)
        norm = dora_weight_norm(
            *problem.factors, scaling=problem.scaling, magnitude_axis=case.axis, backend=backend
        )  # fmt: skip
        errors = {_short(name): testing.error(result, exact[_short(name)]) for name, result in results.items()}
        errors["norm"] = testing.norm_error(norm, exact["norm"])
    except Exception as error:  # a compiler's, a driver's or our own: the table goes on and reports it
        return [Cell(case, backend, "call", math.inf, note=f"{type(error).__name__}: {first_line(error)}")]
    peft, budget = yardstick.peft, yardstick.budget
    return [Cell(case, backend, name, off, peft[name], budget[name]) for name, off in errors.items()]


def _short(name: str) -> str:
    """A result's name in the table."""
    return _GRADIENTS.get(name, name)


def _is_small(case: Case) -> bool:
    return math.prod(case.shape) < _SMALL


def _wanted(weight_gradient: bool) -> tuple[str, ...]:
    return tuple(name for name in _GRADIENTS if weight_gradient or name != "weight")
