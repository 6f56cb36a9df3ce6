"""The tables of compose, alone and with the base product, and scale_reduce: what each must move, and who is timed.

Bytes count every input and output once; inputs are rotated among copies that exceed the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from bench.layer.problem import ALLOWED, FLOOR, Case, Problem, error, make_problem
from bench.static.recording import NAMES
from bench.timing import cache_bytes, copies_beyond
from dora_kernels import linear, torch_backend


@dataclass
class KernelRow:
    """One kernel at one shape: its floor, and the calls to time by provider, one for each copy of the inputs."""

    kernel: str
    rank: int | None
    tokens: int | None
    dtypes: str
    bytes: int
    flops: int
    calls: dict[str, list[Callable[[], Any]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Providers that could not be built, and why."""
    shape: str | None = None
    """Of W, for the norm."""

    @property
    def label(self) -> str:
        """For people."""
        words = [] if self.shape is None else [self.shape]
        words += [] if self.rank is None else [f"rank {self.rank}"]
        words += [] if self.tokens is None else [f"{self.tokens} tokens"]
        return f"{self.kernel}, {', '.join(words)}, {self.dtypes}"

    def add(self, provider: str, calls: list[Callable[[], Any]], error: float, limit: float) -> None:
        """A provider with its error on the first copy."""
        self.calls[provider], self.errors[provider], self.limits[provider] = calls, error, limit


def problems(case: Case, bytes_each: int) -> list[Problem]:
    """Enough copies of a problem that none is found in the cache."""
    return [make_problem(case, seed) for seed in range(copies_beyond(cache_bytes(case.device), bytes_each))]


def compose_row(case: Case, backend: str) -> KernelRow:
    """The base result read and the output written, h and B read; two operations for each output and rank."""
    size, rank, tokens = case.hidden, case.rank, case.tokens
    wide, adapter = (torch.finfo(dtype).bits // 8 for dtype in (case.base, case.adapters))
    row = KernelRow(
        "compose", rank, tokens, case.dtypes,
        wide * (2 * tokens * size + rank * tokens + size) + adapter * rank * size + 4 * size, 2 * tokens * size * rank,
    )  # fmt: skip
    inputs = []
    for p in problems(case, row.bytes):
        h = F.linear(p.x, p.lora_A.to(p.x.dtype))
        g = 0.5 + torch.rand(size, device=case.device)
        inputs.append((p.dy, h, p.lora_B, g, p.magnitude.to(p.x.dtype), p.scaling))
    base, h, b, g, bias, scaling = inputs[0]
    wanted = g.double() * (base.double() + scaling * h.double() @ b.double().t()) + bias.double()
    plain = (g * (base + scaling * F.linear(h, b.to(h.dtype)))).to(base.dtype) + bias
    limit = max(FLOOR, ALLOWED * error(plain, wanted))
    for name, module in modules(backend):
        calls = [lambda i=i, module=module: module.compose(*i, True) for i in inputs]
        row.add(name, calls, error(calls[0](), wanted), limit)
    return row


def product_row(case: Case, backend: str) -> KernelRow:
    """The base product and compose: the vendor's BLAS and our kernel, and the two in one launch (`bench.layer.fused`).

    Up to 64 tokens as in inference, where nobody keeps the base product.
    """
    size, rank, tokens = case.hidden, case.rank, case.tokens
    wide, adapter = (torch.finfo(dtype).bits // 8 for dtype in (case.base, case.adapters))
    keep = tokens > 64
    activations = (3 if keep else 2) * tokens * size + rank * tokens
    row = KernelRow(
        "product and compose", rank, tokens, case.dtypes,
        wide * (activations + size * size + size) + adapter * rank * size + 4 * size, 2 * tokens * size * (size + rank),
    )  # fmt: skip
    inputs = []
    for p in problems(case, row.bytes):
        h = F.linear(p.x, p.lora_A.to(p.x.dtype))
        g = 0.5 + torch.rand(size, device=case.device)
        inputs.append((p.x, p.weight, h, p.lora_B, g, p.magnitude.to(p.x.dtype), p.scaling))
    x, weight, h, b, g, bias, scaling = inputs[0]
    wanted = g.double() * (x.double() @ weight.double().t() + scaling * h.double() @ b.double().t()) + bias.double()
    plain = (g * (F.linear(x, weight) + scaling * F.linear(h, b.to(h.dtype)))).to(x.dtype) + bias
    limit = max(FLOOR, ALLOWED * error(plain, wanted))
    compose = linear.primitives(backend).compose
    calls = [lambda i=i: compose(F.linear(*i[:2]), *i[2:], keep) for i in inputs]
    row.add("ours", calls, error(calls[0](), wanted), limit)
    if backend == "triton" and case.base != torch.float32:
        from bench.layer.fused import fused

        calls = [lambda i=i: fused(*i, keep)[0] for i in inputs]
        row.add("fused", calls, error(calls[0](), wanted), limit)
    return row


def scale_reduce_row(case: Case, backend: str) -> KernelRow:
    """Two inputs read, the scaled gradient written, two sums."""
    size, tokens = case.hidden, case.tokens
    wide = torch.finfo(case.base).bits // 8
    least = 3 * wide * tokens * size + 12 * size
    row = KernelRow("scale_reduce", None, tokens, NAMES[case.base], least, 4 * tokens * size)
    inputs = [(p.dy, p.x, 0.5 + torch.rand(size, device=case.device)) for p in problems(case, row.bytes)]
    grad, other, g = inputs[0]
    wanted = [grad.double() * g.double(), (grad.double() * other.double()).sum(0), grad.double().sum(0)]
    plain = [(grad * g).to(grad.dtype), (grad.float() * other.float()).sum(0), grad.float().sum(0)]
    allowed = [max(FLOOR, ALLOWED * error(result, exact)) for result, exact in zip(plain, wanted)]
    for name, module in modules(backend):
        calls = [lambda i=i, module=module: module.scale_reduce(*i, True, True) for i in inputs]
        # The worst of the three, as a fraction of what is allowed it.
        worst = max(error(one, exact) / limit for one, exact, limit in zip(calls[0](), wanted, allowed))
        row.add(name, calls, worst, 1.0)
    return row


def modules(backend: str) -> Iterator[tuple[str, ModuleType]]:
    """Ours, and PyTorch operations where ours is another."""
    yield "ours", linear.primitives(backend)
    if backend != "torch":
        yield "torch", torch_backend
