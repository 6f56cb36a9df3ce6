"""The kernel tables: what each primitive must move and compute, and who is timed on it.

Bytes count every input and output once; inputs are rotated among copies that exceed the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.layer.problem import ALLOWED, FLOOR, Case, Problem, error, make_problem
from bench.layer.providers import peft_layer
from bench.timing import cache_bytes, copies_beyond
from dora_kernels import linear, reference, torch_backend

NORM_LIMIT = 1e-5
"""The norm is computed in float32 accuracy from the factors as stored."""
ROUNDED_NORM_LIMIT = 2e-2
"""PEFT computes it in the adapter's dtype or, under autocast, forms the low-rank product in bfloat16."""


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

    @property
    def label(self) -> str:
        """For people."""
        words = [] if self.rank is None else [f"rank {self.rank}"]
        words += [] if self.tokens is None else [f"{self.tokens} tokens"]
        return f"{self.kernel}, {', '.join(words)}, {self.dtypes}"

    def add(self, provider: str, calls: list[Callable[[], Any]], error: float, limit: float) -> None:
        """A provider with its error on the first copy."""
        self.calls[provider], self.errors[provider], self.limits[provider] = calls, error, limit


def problems(case: Case, bytes_each: int) -> list[Problem]:
    """Enough copies of a problem that none is found in the cache."""
    return [make_problem(case, seed) for seed in range(copies_beyond(cache_bytes(case.device), bytes_each))]


def norm_row(case: Case, backend: str) -> KernelRow:
    """W once, the factors once, the norm once; two operations for each element of W and rank."""
    size, rank = case.hidden, case.rank
    adapter = torch.finfo(case.adapters).bits // 8
    row = KernelRow(
        "weight_norm", rank, None, f"bf16 W, {'fp32' if case.autocast else 'bf16'} adapters",
        2 * size * size + 2 * size * rank * adapter + 4 * size, 2 * size * size * rank,
    )  # fmt: skip
    copies = problems(case, row.bytes)
    first = copies[0]
    f64 = torch.float64
    wanted = reference.weight_norm(
        first.weight.to(f64), first.lora_A.to(f64), first.lora_B.to(f64), first.scaling, "out"
    )
    for name, module in _modules(backend):
        calls = [
            lambda p=p, module=module: module.weight_norm(p.weight, p.lora_A, p.lora_B, p.scaling) for p in copies
        ]
        row.add(name, calls, error(calls[0](), wanted), NORM_LIMIT)
    try:
        layers = [peft_layer(p, case, dora=True)[1] for p in copies]
    except Exception as reason:
        row.absent["peft"] = f"{type(reason).__name__}: {reason}"
        return row
    calls = [lambda p=p, layer=layer: _peft_norm(layer, p, case) for p, layer in zip(copies, layers)]
    row.add("peft", calls, error(calls[0](), wanted), ROUNDED_NORM_LIMIT)
    return row


def _peft_norm(layer: Any, problem: Problem, case: Case) -> Tensor:
    """What PEFT's DoRA layer does in every forward pass to have its norm."""
    dora = layer.lora_magnitude_vector["default"]
    with torch.no_grad(), torch.autocast(case.device.type, torch.bfloat16, enabled=case.autocast):
        product = dora.get_lora_weight(lora_A=layer.lora_A["default"], lora_B=layer.lora_B["default"])
        norm: Tensor = dora.get_weight_norm(problem.weight, product.to(problem.x.dtype), problem.scaling)
        return norm


def compose_row(case: Case, backend: str) -> KernelRow:
    """The base result read and the output written, h and B read; two operations for each output and rank."""
    size, rank, tokens = case.hidden, case.rank, case.tokens
    adapter = torch.finfo(case.adapters).bits // 8
    row = KernelRow(
        "compose", rank, tokens, f"bf16, {'fp32' if case.autocast else 'bf16'} B",
        2 * 2 * tokens * size + rank * (2 * tokens + adapter * size) + 6 * size, 2 * tokens * size * rank,
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
    for name, module in _modules(backend):
        calls = [lambda i=i, module=module: module.compose(*i, True) for i in inputs]
        row.add(name, calls, error(calls[0](), wanted), limit)
    return row


def scale_reduce_row(case: Case, backend: str) -> KernelRow:
    """Two inputs read, the scaled gradient written, two sums."""
    size, tokens = case.hidden, case.tokens
    row = KernelRow("scale_reduce", None, tokens, "bf16", 3 * 2 * tokens * size + 12 * size, 4 * tokens * size)
    inputs = [(p.dy, p.x, 0.5 + torch.rand(size, device=case.device)) for p in problems(case, row.bytes)]
    grad, other, g = inputs[0]
    wanted = [grad.double() * g.double(), (grad.double() * other.double()).sum(0), grad.double().sum(0)]
    plain = [(grad * g).to(grad.dtype), (grad.float() * other.float()).sum(0), grad.float().sum(0)]
    allowed = [max(FLOOR, ALLOWED * error(result, exact)) for result, exact in zip(plain, wanted)]
    for name, module in _modules(backend):
        calls = [lambda i=i, module=module: module.scale_reduce(*i, True, True) for i in inputs]
        # The worst of the three, as a fraction of what is allowed it.
        worst = max(error(one, exact) / limit for one, exact, limit in zip(calls[0](), wanted, allowed))
        row.add(name, calls, worst, 1.0)
    return row


def _modules(backend: str) -> Iterator[tuple[str, ModuleType]]:
    """Ours, and PyTorch operations where ours is another."""
    yield "ours", linear.primitives(backend)
    if backend != "torch":
        yield "torch", torch_backend
