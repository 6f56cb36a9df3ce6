"""Combine: the sum of partial sums, or the norm of partial norms, in their order.

Shapes: parts ``[P, ...]`` float32, the result ``[...]``, rounded once. Bytes: everything once.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, combine_config
from dora_kernels.kernels.dot import cast
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["parts"])
def combine_kernel(
    parts_ptr, out_ptr, size, parts, NORM: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements."""
    offs = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = offs < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, parts, loop_unroll_factor=8):  # the loads of several parts wait together
        value = tl.load(parts_ptr + offs, mask=mask, other=0.0)
        total += value * value if NORM else value
        parts_ptr += size
    out = tl.sqrt(total) if NORM else total
    tl.store(out_ptr + offs, cast(out, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


def combine(parts: Tensor, out: Tensor, norm: bool = False) -> Tensor:
    """Fill and return `out` with the sum of the parts or, with `norm`, with the root of the sum of their squares."""
    size = out.numel()
    plan = _plan(size, norm)
    launch(combine_kernel, plan, (blocks(size, plan.config.BLOCK),), (parts, out), (parts.shape[0],))
    return out


@functools.lru_cache(PLANS)
def _plan(size: int, norm: bool) -> Plan:
    return Plan((size,), (norm, INTERPRETED), combine_config())
