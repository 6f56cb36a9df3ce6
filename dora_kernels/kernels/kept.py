"""A norm that stays on the device and is recomputed only if what it was computed from has changed.

A first kernel takes fingerprints of A, of B and of a sample of W, 64 bits for every few thousand elements, compares
them with those of the last call, and sets a flag for each that differs. The norm's kernel reads the flags and exits at
once if none is set. This takes two launches, and the host never waits. It works the same in a CUDA graph, replay after
replay.

Bytes: A and B once, where the norm itself reads W. Kept: the norm, the fingerprints and the flags.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import fingerprint_config, fingerprints
from dora_kernels.kernels.fingerprint import bits_of, mixed, terms, total
from dora_kernels.kernels.launch import PLANS, Plan, launch
from dora_kernels.kernels.norm import renew_divisor


@triton.jit(do_not_specialize=["programs_a", "programs_b", "programs_w", "salt"])
def fingerprint_kernel(
    a_ptr, b_ptr, w_ptr, seen_ptr, changed_ptr,
    size_a, size_b, size_w, width_a, width_b,
    stride_ar, stride_ak, stride_bn, stride_br, stride_w,
    salt, programs_a, programs_b, programs_w,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compare a program's share of A, of B or of W's sample with its fingerprint from the last call."""
    pid = tl.program_id(0)
    if pid < programs_a:
        first, second = _fingerprint(a_ptr, size_a, width_a, stride_ar, stride_ak, pid, programs_a, BLOCK)
    elif pid < programs_a + programs_b:
        first, second = _fingerprint(b_ptr, size_b, width_b, stride_bn, stride_br, pid - programs_a, programs_b, BLOCK)
    else:
        first, second = _fingerprint(
            w_ptr, size_w, size_w, 0, stride_w, pid - programs_a - programs_b, programs_w, BLOCK
        )
    first ^= mixed(salt)
    second ^= mixed(salt)
    seen = seen_ptr + 2 * pid
    differs = (tl.load(seen) != first) | (tl.load(seen + 1) != second)
    if differs:
        tl.store(seen, first)
        tl.store(seen + 1, second)
    tl.store(changed_ptr + pid, differs.to(tl.int32))


@triton.jit
def _fingerprint(x_ptr, size, width, stride_row, stride_column, share, shares, BLOCK: tl.constexpr):
    """The two sums over every `shares`-th block of BLOCK elements."""
    first = tl.zeros((BLOCK,), tl.int32)
    second = tl.zeros((BLOCK,), tl.int32)
    for start in range(share * BLOCK, size, shares * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < size
        row = (offs // width).to(tl.int64)
        column = (offs % width).to(tl.int64)
        x = tl.load(x_ptr + row * stride_row + column * stride_column, mask=mask, other=0.0)
        one, other = terms(bits_of(x), offs.to(tl.int32))
        first += tl.where(mask, one, 0)
        second += tl.where(mask, other, 0)
    return total(first), total(second)


@functools.lru_cache(PLANS)
def _plan(
    shape_a: tuple[int, int],
    shape_b: tuple[int, int],
    size_w: int,
    strides_a: tuple[int, ...],
    strides_b: tuple[int, ...],
    stride_w: tuple[int, ...],
) -> Plan:
    sizes = math.prod(shape_a), math.prod(shape_b), size_w, shape_a[1], shape_b[1]
    return Plan((*sizes, *strides_a, *strides_b, *stride_w), (), fingerprint_config())


def _matrix(factor: Tensor) -> Tensor:
    """A matrix with the elements of a factor, of a stack in the order of memory; a copy if they lie with gaps."""
    if factor.dim() == 2:
        return factor
    strides = factor.stride()
    factor = factor.permute(sorted(range(factor.dim()), key=lambda dim: -strides[dim]))
    return factor.reshape(-1, factor.shape[-1])


_salts = itertools.count(1)


class KeptNorm:
    """The divisor of one layer: its norm, infinity in place of 0, for one W (address and strides) and one scaling.

    `shape` is the norm's. A stack of weights is one layer: if a part of it has changed, all is computed again.

    Calls run in order on one stream, from any thread. Nothing is initialised on the device, so a first call may be
    captured in a graph: each object's fingerprints have a salt that was never used before, so uninitialised memory does
    not match them.
    """

    def __init__(self, shape: int | Sequence[int], scaling: float, device: torch.device) -> None:
        self._scaling = scaling
        self._divisor = torch.empty(shape, dtype=torch.float32, device=device)
        self._seen = self._changed = torch.empty(0, dtype=torch.int32, device=device)
        self._salt = next(_salts)
        self._in_order = threading.Lock()

    def divisor(self, weight: Tensor, sample: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return the row norms of ``W + s B A``, infinity in place of 0, float32 ``[N]``, of stacks ``[G, N]``.

        This is the kept tensor itself; do not write to it. `sample` is a strided vector of W's elements.
        """
        shares = [fingerprints(t.numel()) for t in (lora_A, lora_B, sample)]
        with self._in_order:
            if self._changed.numel() != sum(shares):
                self._changed = torch.empty(sum(shares), dtype=torch.int32, device=weight.device)
                self._seen = torch.empty(2 * sum(shares), dtype=torch.int32, device=weight.device)
                self._salt = next(_salts)
            try:
                a, b = _matrix(lora_A), _matrix(lora_B)
                plan = _plan(a.shape, b.shape, sample.numel(), a.stride(), b.stride(), sample.stride())
                tensors = a, b, sample, self._seen, self._changed
                launch(fingerprint_kernel, plan, (sum(shares),), tensors, (self._salt, *shares))
                renew_divisor(self._divisor, weight, lora_A, lora_B, self._scaling, self._changed)
            except BaseException:
                self._salt = next(_salts)  # the fingerprints may not belong to the kept norm
                raise
        return self._divisor
