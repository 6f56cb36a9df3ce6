"""Fingerprints of what tensors hold: two sums modulo 2**32 of well mixed bits of elements and their positions."""

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    """The bits of elements of 16 or 32 bits, as int32."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def terms(bits, position):
    """What an element adds to the two sums; both int32, the position within its tensor."""
    first = mixed(bits ^ mixed(position))
    return first, mixed(first ^ 0x5BD1E995)


@triton.jit
def mixed(x):
    """A bijection of 32 bits in which every bit of x reaches every bit of the result."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True)
