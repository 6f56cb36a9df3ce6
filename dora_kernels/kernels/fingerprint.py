"""Fingerprints of tensors: two sums modulo 2**32 of well mixed bits of the elements and their positions."""

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    """The bits of 16-bit or 32-bit elements, as int32."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def terms(bits, position):
    """An element's contribution to the two sums. Both are int32; `position` is the element's index in its tensor."""
    first = mixed(bits ^ mixed(position))
    return first, mixed(first ^ 0x5BD1E995)


@triton.jit
def mixed(x):
    """A bijection on 32 bits in which every input bit affects every output bit."""
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x ^ (x >> 16)).to(tl.int32, bitcast=True)


@triton.jit
def total(terms):
    """The sum of a block's int32 terms modulo 2**32. Triton 3.8's interpreter cannot wrap a sum of 32 bits."""
    return tl.sum(terms.to(tl.int64), 0).to(tl.int32)
