"""The kernels beside the products: compose, alone and with the base product, and scale_reduce.

Bytes count every input and output once; inputs are rotated among copies that exceed the last-level cache. PEFT's row is
its layer's expression for the same result from the same inputs. The oracle is the same formula in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import LayerShape, ShapeCase, make_problem
from bench.providers import Missing, Subject, Work
from bench.timing import cache_bytes, copies_beyond
from dora_kernels.engine.dispatch import kernels, triton_problem
from dora_kernels.testing import errors, limits

if TYPE_CHECKING:
    from bench.run import Run

FEW_TOKENS = 64
"""Up to here nobody keeps the base product: that is inference."""
OURS = ("ours", "ours_triton", "ours_torch")
RESULTS = {"scale_reduce": ("scaled", "sum of products", "sum")}
"""The results' names, where they are not "y" alone."""


def cases(run: Run, suite: str) -> Iterator[KernelCase]:
    """The three kernels at every combination of dtypes, hidden size, tokens and rank."""
    cuda, ranks = run.device.type == "cuda", run.given.ranks or [16]
    for shape in run.shapes([4096] if cuda else [2048], [1, 256, 8192] if cuda else [256], ranks):
        yield KernelCase(shape, "compose", ("peft_dora", "peft_dora_compiled", *OURS))
        yield KernelCase(shape, "product and compose", OURS)
        if shape.rank == ranks[0] and shape.base == shape.adapters:
            yield KernelCase(shape, "scale_reduce", OURS)


@dataclass
class KernelCase(ShapeCase):
    """A kernel at a shape."""

    shape: LayerShape
    kernel: str
    providers: Sequence[str]
    suite: str = "compose"

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people; scale_reduce has no rank."""
        label = super().label
        return label.replace(f"rank {self.shape.rank}, ", "") if self.kernel == "scale_reduce" else label

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {**super().facts, "rank": None if self.kernel == "scale_reduce" else self.shape.rank}

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        m, n, r = self.shape.tokens, self.shape.hidden, self.shape.rank
        wide, adapter = self.shape.widths
        if self.kernel == "scale_reduce":
            return 3 * wide * m * n + 12 * n, 4 * m * n
        vectors = adapter * r * n + 4 * n
        if self.kernel == "compose":
            return wide * (2 * m * n + r * m + n) + vectors, 2 * m * n * r
        activations = (3 if m > FEW_TOKENS else 2) * m * n + r * m
        return wide * (activations + n * n + n) + vectors, 2 * m * n * (n + r)

    @functools.cached_property
    def inputs(self) -> list[tuple[Any, ...]]:
        """A kernel's arguments, so often that none is found in the cache."""
        count = copies_beyond(cache_bytes(self.shape.device), self.least[0])
        return [self._arguments(seed) for seed in range(count)]

    def _arguments(self, seed: int) -> tuple[Any, ...]:
        """Of `_FORMULAS[kernel]`."""
        p = make_problem(self.shape, seed)
        g = 0.5 + torch.rand(self.shape.hidden, device=self.shape.device)
        if self.kernel == "scale_reduce":
            return p.dy, p.x, g
        assert p.magnitude is not None
        rest = F.linear(p.x, p.lora_A.to(p.x.dtype)), p.lora_B, g, p.magnitude.to(p.x.dtype), p.scaling
        return (p.dy, *rest) if self.kernel == "compose" else (p.x, p.weight, *rest)

    def subject(self, provider: str) -> Subject:
        """The provider's kernel or expression."""
        formula, names, first = _FORMULAS[self.kernel], RESULTS.get(self.kernel, ("y",)), self.inputs[0]

        def named(results: Any) -> dict[str, Tensor]:
            return dict(zip(names, results if isinstance(results, tuple) else (results,)))

        wanted = named(formula(*(t.double() if isinstance(t, Tensor) else t for t in first)))
        allowed = limits(named(formula(*first)), wanted)
        given = self.inputs
        if provider.startswith("peft"):
            function = torch.compile(_peft_expression) if provider.endswith("compiled") else _peft_expression
            # PEFT starts from the base layer's own result, which has the bias in it.
            given = [(i[0] + i[4], *i[1:]) for i in given]
        else:
            function = self._ours(provider)
        calls: list[Work] = [functools.partial(function, *i) for i in given]
        in_place = self.kernel == "compose" and provider.startswith("ours")
        parts, name = {self.kernel: calls}, self.kernel
        found = errors(named(calls[0]()), wanted)
        return Subject(provider, parts, found, allowed, {name: self.least}, frozenset({name}), in_place)

    def _ours(self, provider: str) -> Callable[..., Any]:
        """The provider's primitive as a function of the inputs."""
        if provider == "ours_torch":
            raise Missing("the formula has no kernels of its own")
        if reason := triton_problem(self.shape.device):
            raise Missing(reason)
        backend, keep = kernels(), self.shape.tokens > FEW_TOKENS
        if self.kernel == "scale_reduce":
            return lambda *given: backend.scale_reduce(*given, True, True)
        if self.kernel == "compose":
            return lambda *given: backend.compose(*given, True)
        return lambda x, weight, *given: backend.compose(F.linear(x, weight), *given, keep)


def _compose(base: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor, scaling: float) -> Tensor:
    return (g * (base + scaling * F.linear(h, b.to(h.dtype)))).to(base.dtype) + bias


def _scale_reduce(grad: Tensor, other: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad * g).to(grad.dtype), (grad.to(wide) * other.to(wide)).sum(0), grad.to(wide).sum(0)


def _peft_expression(base: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """What PEFT's layer does with the base layer's result, bias included, and the low-rank one."""
    rescale = g.to(base.dtype).view(1, -1)
    low = F.linear(h, b.to(h.dtype))
    return base + ((rescale - 1) * (base - bias) + rescale * low * scaling)


_FORMULAS: dict[str, Callable[..., Any]] = {
    "compose": _compose,
    "product and compose": lambda x, weight, *rest: _compose(F.linear(x, weight), *rest),
    "scale_reduce": _scale_reduce,
}
