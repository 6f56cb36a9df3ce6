"""compose, alone and with the base product, and scale_reduce: what each must move, and who is timed.

Bytes count every input and output once; inputs are rotated among copies that exceed the last-level cache. PEFT's row is
its layer's expression for the same result from the same inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problem import LayerShape, ShapeCase, make_problem
from bench.providers import Missing, Subject, Work
from bench.timing import cache_bytes, copies_beyond
from dora_kernels import linear
from dora_kernels.backends import resolve, triton_problem
from dora_kernels.testing import errors, limits

if TYPE_CHECKING:
    from bench.run import Run

Tensors = dict[str, Tensor]
FEW_TOKENS = 64
"""Up to here nobody keeps the base product: that is inference."""


def cases(run: Run, suite: str) -> Iterator[KernelCase]:
    """The three kernels at every combination of dtypes, hidden size, tokens and rank."""
    cuda, ranks = run.device.type == "cuda", run.given.ranks or [16]
    for shape in run.shapes([4096] if cuda else [2048], [1, 256, 8192] if cuda else [256], ranks):
        yield Compose(shape)
        yield Product(shape)
        if shape.rank == ranks[0] and shape.base == shape.adapters:
            yield ScaleReduce(shape)


@dataclass
class KernelCase(ShapeCase):
    """A kernel at a shape."""

    shape: LayerShape
    suite: str = "compose"
    kernel: str = ""
    providers: Sequence[str] = ("ours", "ours_triton", "ours_torch")

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Tokens, features, rank; bytes of an element of the layer and of the adapter."""
        return self.shape.tokens, self.shape.hidden, self.shape.rank, *self.shape.widths

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        raise NotImplementedError

    @functools.cached_property
    def inputs(self) -> list[tuple[Any, ...]]:
        """A kernel's arguments, so often that none is found in the cache."""
        count = copies_beyond(cache_bytes(self.shape.device), self.least[0])
        return [self.arguments(seed) for seed in range(count)]

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """Of one call."""
        raise NotImplementedError

    def backend(self, provider: str) -> Any:
        """The module of the provider's primitives."""
        name = provider.removeprefix("ours_")
        if provider == "ours":
            name = resolve("auto", self.inputs[0][:1])
        elif name == "triton" and (reason := triton_problem(self.shape.device)):
            raise Missing(reason)
        return linear.primitives(name)

    def made_subject(
        self, provider: str, calls: list[Work], results: Tensors, plain: Tensors, wanted: Tensors
    ) -> Subject:
        """Of the calls on every copy, and of the first one's results, by plain operations, and in float64."""
        name, in_place = self.kernel, self.kernel == "compose" and provider.startswith("ours")
        return Subject(
            provider, {name: calls}, errors(results, wanted), limits(plain, wanted), {name: self.least},
            frozenset({name}), in_place,
        )  # fmt: skip


def _peft_expression(base: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """What PEFT's layer does with the base layer's result, bias included, and the low-rank one."""
    rescale = g.to(base.dtype).view(1, -1)
    low = F.linear(h, b.to(h.dtype))
    return base + ((rescale - 1) * (base - bias) + rescale * low * scaling)


class Compose(KernelCase):
    """The base result read and the output written, h and B read; two operations for each output and rank."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape, kernel="compose")
        self.providers = ("peft_dora", "peft_dora_compiled", *KernelCase.providers)

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        m, n, r, wide, adapter = self.sizes
        return wide * (2 * m * n + r * m + n) + adapter * r * n + 4 * n, 2 * m * n * r

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """base, h, B, g, bias, scaling."""
        p = make_problem(self.shape, seed)
        h = F.linear(p.x, p.lora_A.to(p.x.dtype))
        g = 0.5 + torch.rand(self.shape.hidden, device=self.shape.device)
        return p.dy, h, p.lora_B, g, p.magnitude.to(p.x.dtype), p.scaling

    def subject(self, provider: str) -> Subject:
        """The provider's kernel or expression."""
        base, h, b, g, bias, scaling = self.inputs[0]
        wanted = g.double() * (base.double() + scaling * h.double() @ b.double().t()) + bias.double()
        plain = (g * (base + scaling * F.linear(h, b.to(h.dtype)))).to(base.dtype) + bias
        calls: list[Work]
        if provider.startswith("peft"):
            function = torch.compile(_peft_expression) if provider.endswith("compiled") else _peft_expression
            # PEFT starts from the base layer's own result, which has the bias in it.
            given = [(i[0] + i[4], *i[1:]) for i in self.inputs]
            calls = [functools.partial(function, *i) for i in given]
        else:
            backend = self.backend(provider)
            calls = [functools.partial(backend.compose, *i, True) for i in self.inputs]
        return self.made_subject(provider, calls, {"y": calls[0]()}, {"y": plain}, {"y": wanted})


class Product(KernelCase):
    """The base product and compose: the vendor's BLAS and our kernel."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape, kernel="product and compose")

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        m, n, r, wide, adapter = self.sizes
        activations = (3 if m > FEW_TOKENS else 2) * m * n + r * m
        return wide * (activations + n * n + n) + adapter * r * n + 4 * n, 2 * m * n * (n + r)

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """x, W, h, B, g, bias, scaling."""
        p = make_problem(self.shape, seed)
        h = F.linear(p.x, p.lora_A.to(p.x.dtype))
        g = 0.5 + torch.rand(self.shape.hidden, device=self.shape.device)
        return p.x, p.weight, h, p.lora_B, g, p.magnitude.to(p.x.dtype), p.scaling

    def subject(self, provider: str) -> Subject:
        """The provider's kernels."""
        x, weight, h, b, g, bias, scaling = self.inputs[0]
        keep = self.shape.tokens > FEW_TOKENS
        wanted = g.double() * (x.double() @ weight.double().t() + scaling * h.double() @ b.double().t())
        wanted += bias.double()
        plain = (g * (F.linear(x, weight) + scaling * F.linear(h, b.to(h.dtype)))).to(x.dtype) + bias
        compose = self.backend(provider).compose
        calls: list[Work] = [lambda i=i: compose(F.linear(*i[:2]), *i[2:], keep) for i in self.inputs]
        return self.made_subject(provider, calls, {"y": calls[0]()}, {"y": plain}, {"y": wanted})


class ScaleReduce(KernelCase):
    """Two inputs read, the scaled gradient written, two sums."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(replace(shape, rank=1), kernel="scale_reduce")

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people; the rank does not matter."""
        return super().label.replace("rank 1, ", "")

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {**super().facts, "rank": None}

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        m, n, _, wide, _ = self.sizes
        return 3 * wide * m * n + 12 * n, 4 * m * n

    def arguments(self, seed: int) -> tuple[Any, ...]:
        """dY, the base product, g."""
        p = make_problem(self.shape, seed)
        return p.dy, p.x, 0.5 + torch.rand(self.shape.hidden, device=self.shape.device)

    def subject(self, provider: str) -> Subject:
        """The provider's kernel."""
        grad, other, g = self.inputs[0]
        names = "scaled", "sum of products", "sum"
        wide = grad.double(), other.double()
        wanted = dict(zip(names, (wide[0] * g.double(), (wide[0] * wide[1]).sum(0), wide[0].sum(0))))
        plain = (grad * g).to(grad.dtype), (grad.float() * other.float()).sum(0), grad.float().sum(0)
        scale_reduce = self.backend(provider).scale_reduce
        calls: list[Work] = [functools.partial(scale_reduce, *i, True, True) for i in self.inputs]
        return self.made_subject(provider, calls, dict(zip(names, calls[0]())), dict(zip(names, plain)), wanted)
