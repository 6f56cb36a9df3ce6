"""What is measured for a layer: the forms of the norm and the ways to run the layer, each checked before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dora_kernels import testing
from dora_kernels.core.precision import accumulation_dtype, cast, full_precision
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import blocked, merged
from dora_kernels.engine.dispatch import ONE_PASS_RANK, norm_backend, one_pass, triton_problem
from dora_kernels.engine.layer import run_layer
from dora_kernels.engine.norm import Norm
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.tuning.shapes import Shape

CHECKED_TOKENS = 9
Call = Callable[[], object]


class Layer:
    """One shape's tensors, and the candidates on them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.out_features, self.in_features, self.rank = shape
        self.dtype, self.device = dtype, device
        self.problem = self._problem(CHECKED_TOKENS)
        self.form = Form(self.problem.scaling)

    def _problem(self, tokens: int) -> testing.Problem:
        sizes = (tokens,), self.in_features, self.out_features, self.rank
        return testing.make_problem(*sizes, (self.dtype,) * 3, bias=False, device=self.device)

    def norms(self) -> dict[str, Call]:
        """The forms of the norm, with |W|² kept as a frozen layer keeps it."""
        weight, a, b, scaling = (getattr(self.problem, name) for name in ("weight", "lora_A", "lora_B", "scaling"))
        if self.device.type == "cpu":
            dtype = accumulation_dtype(weight)
            a, b, square = cast(a, dtype), cast(b, dtype), blocked.row_square(weight, dtype)
            return {
                "direct": lambda: blocked.direct_norm(weight, a, b, scaling),
                "factored": lambda: blocked.factored_norm(weight, a, b, scaling, square),
            }
        return {} if triton_problem(self.device) else self.kernel_norms()

    def kernel_norms(self) -> dict[str, Call]:
        """The kernels' forms; one alone where the other cannot be had."""
        from dora_kernels.kernels import factored, norm

        given = self.problem.weight, self.problem.lora_A, self.problem.lora_B
        calls: dict[str, Call] = {"direct": lambda: norm.direct_norm(*given, self.problem.scaling)}
        if factored.can_be_factored(*given):
            square = norm.row_square(given[0])
            calls["factored"] = lambda: norm.factored_norm(*given, self.problem.scaling, square)
        return calls

    def wrong_norm(self, call: Call) -> str | None:
        """Return what is wrong with a norm's result, or None."""
        with full_precision(self.device):
            found: Any = call()
        off, allowed = testing.norm_error(found, testing.true_norm(self.problem)), testing.norm_bound(
            self.problem.weight, self.problem.lora_A, self.problem.lora_B
        )
        return None if off <= allowed else f"its error is {off:.1e}, more than {allowed:.1e}"

    def ways(self) -> Iterator[str]:
        """The ways to run the layer here; "one pass" is the fused path's for few tokens."""
        yield "formula"
        if self.device.type == "cuda" and triton_problem(self.device) is None:
            yield "fused"
            if self.dtype.itemsize == 2 and self.rank <= ONE_PASS_RANK:
                yield "one pass"
        if self.dtype in merged.DTYPES:
            yield "merged"

    def wrong(self, way: str) -> str | None:
        """Return what is wrong with the output or a gradient, or None."""
        try:
            leaves, call = self._bound(way, self.problem)
            y = call()
            names = [name for name in testing.NAMES if leaves[name] is not None and name != "weight"]
            grads = testing.gradients(y, {name: leaves[name] for name in names}, self.problem.dy)
            testing.check({"y": y.detach(), **grads}, self.problem, names)
        except AssertionError as error:
            return " ".join(str(error).split())[:200]
        except Exception as error:  # a compiler's, or out of memory: the other ways are measured
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return None

    def calls(self, ways: list[str], tokens: int, gradients: bool) -> dict[str, Call]:
        """A forward and backward, or a forward in evaluation, of each way, with its norm at hand."""
        x, dy = self._drawn(tokens, self.in_features), self._drawn(tokens, self.out_features)
        problem = self.problem.replace(x=x, dy=dy)
        return {way: self._timed(way, problem, gradients) for way in ways}

    def _drawn(self, tokens: int, features: int) -> Tensor:
        return torch.randn(tokens, features, device=self.device).to(self.dtype)

    def _timed(self, way: str, problem: testing.Problem, gradients: bool) -> Call:
        leaves, call = self._bound(way, problem)
        wanted = [leaf for name, leaf in leaves.items() if leaf is not None and name != "weight"]

        def both() -> object:
            return torch.autograd.grad(call(), wanted, problem.dy)

        @torch.no_grad()
        def forward() -> object:
            return call()

        return both if gradients else forward

    def _bound(self, way: str, problem: testing.Problem) -> tuple[dict[str, Any], Callable[[], Tensor]]:
        leaves = testing.leaves_of(problem, [name for name in testing.NAMES if name != "weight"])
        weights = Weights(*(leaves[name] for name in testing.NAMES[1:]))  # type: ignore[arg-type]
        backend = {"fused": "triton", "one pass": "triton", "merged": "auto"}.get(way, "torch")
        cache = NormCache(self.form, backend, way == "merged")

        def call() -> Tensor:
            with one_pass(way == "one pass"):
                return run_layer(leaves["x"], weights, self.form, cache, True, backend)  # type: ignore[arg-type]

        return leaves, call

    def refreshes(self, ways: list[str]) -> dict[str, Call]:
        """What a step does once: the norm, and for the merged way the weight too."""
        weights = Weights(*(self.problem.tensors[name] for name in testing.NAMES[1:]))  # type: ignore[arg-type]

        def norm(backend: str) -> Norm:
            return NormCache(self.form, backend).norm(weights, self.form, True, backend)

        calls: dict[str, Call] = {
            way: functools.partial(norm, "triton" if way == "fused" else "torch")
            for way in ways
            if way in ("formula", "fused")
        }
        if "merged" in ways:
            backend = norm_backend("auto", weights.weight)
            calls["merged"] = lambda: merged._make(weights, self.form, norm(backend), backend)
        return calls
