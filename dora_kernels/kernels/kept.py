"""A norm that stays on the device and is computed again only where what it was computed from has changed.

A first kernel takes fingerprints of A, of B and of a sample of W, 64 bits for every few thousand elements, and compares
them with those of the last call; where one differs it writes this call's number. The norm's kernels read that number:
unless it is this call's, they leave at once, and the norm comes from where it is kept. The host waits for nothing.

Bytes: A and B once, where the norm itself reads W. Kept: the norm, and the fingerprints.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import fingerprint_config, fingerprints
from dora_kernels.kernels.launch import on_device
from dora_kernels.kernels.norm import Kept, direct_norm


@triton.jit(do_not_specialize=["call"])
def fingerprint_kernel(
    a_ptr, b_ptr, w_ptr, seen_ptr, changed_ptr,
    size_a, size_b, size_w, width_a, width_b,
    stride_ar, stride_ak, stride_bn, stride_br, stride_w,
    programs_a, programs_b, programs_w, call,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's share of A, of B or of W's sample against what it has seen before."""
    pid = tl.program_id(0)
    if pid < programs_a:
        first, second = _fingerprint(a_ptr, size_a, width_a, stride_ar, stride_ak, pid, programs_a, BLOCK)
    elif pid < programs_a + programs_b:
        first, second = _fingerprint(b_ptr, size_b, width_b, stride_bn, stride_br, pid - programs_a, programs_b, BLOCK)
    else:
        first, second = _fingerprint(
            w_ptr, size_w, size_w, 0, stride_w, pid - programs_a - programs_b, programs_w, BLOCK
        )
    seen = seen_ptr + 2 * pid
    if (tl.load(seen) != first) | (tl.load(seen + 1) != second):
        tl.store(seen, first)
        tl.store(seen + 1, second)
        tl.store(changed_ptr, call)


@triton.jit
def _fingerprint(x_ptr, size, width, stride_row, stride_column, share, shares, BLOCK: tl.constexpr):
    """Two xors of well mixed bits of elements and positions, over every `shares`-th block of BLOCK elements."""
    first = tl.zeros((BLOCK,), tl.int32)
    second = tl.zeros((BLOCK,), tl.int32)
    for start in range(share * BLOCK, size, shares * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < size
        row = (offs // width).to(tl.int64)
        column = (offs % width).to(tl.int64)
        x = tl.load(x_ptr + row * stride_row + column * stride_column, mask=mask, other=0.0)
        if x.dtype == tl.float32:
            bits = x.to(tl.int32, bitcast=True)
        else:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        bits = _mixed(bits ^ _mixed(offs.to(tl.int32)))
        first ^= tl.where(mask, bits, 0)
        second ^= tl.where(mask, _mixed(bits ^ 0x5BD1E995), 0)
    return tl.xor_sum(first, 0), tl.xor_sum(second, 0)


@triton.jit
def _mixed(x):
    """A bijection of 32 bits in which every bit of x reaches every bit of the result."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True)


class KeptNorm:
    """The norm of one layer, for calls in order on one stream, with one W's address and strides and one scaling."""

    def __init__(self, out_features: int, scaling: float, device: torch.device) -> None:
        self._scaling = scaling
        self._norm = torch.empty(out_features, dtype=torch.float32, device=device)
        self._changed = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(0, dtype=torch.int32, device=device)
        self._calls = 0

    def norm(self, weight: Tensor, sample: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Row norms of ``W + s B A``, float32 ``[N]``, in memory of their own at every call.

        `sample` is a strided vector of W's elements.
        """
        shares = [fingerprints(t.numel()) for t in (lora_A, lora_B, sample)]
        if self._seen.numel() != 2 * sum(shares):
            self._seen = torch.zeros(2 * sum(shares), dtype=torch.int32, device=weight.device)
        self._calls += 1
        try:
            with on_device(weight):
                fingerprint_kernel[(sum(shares),)](
                    lora_A, lora_B, sample, self._seen, self._changed,
                    lora_A.numel(), lora_B.numel(), sample.numel(), lora_A.shape[1], lora_B.shape[1],
                    *lora_A.stride(), *lora_B.stride(), sample.stride(0),
                    *shares, self._calls,
                    **fingerprint_config()._asdict(),
                )  # fmt: skip
            kept = Kept(self._norm, self._changed, self._calls)
            return direct_norm(weight, lora_A, lora_B, self._scaling, kept)
        except BaseException:
            # What was seen may not be what the kept norm is of.
            self._seen = torch.zeros(0, dtype=torch.int32, device=weight.device)
            raise
