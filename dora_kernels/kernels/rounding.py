"""Stochastic rounding of tiles, with the random words and the results of `dora_kernels.rounding`.

Only a merge rounds this way. Every element computes its own four words and uses one of them: about 100 integer
instructions, while W's two passes are 6 bytes. On a GPU that is still in the order of the memory's time, and no tile
has to begin at a multiple of four.
"""

import triton
import triton.language as tl


@triton.jit
def draw(seed, index):
    """The 32-bit word of each element: word ``index % 4`` of Philox 4x32-10 with key `seed`, counter ``index // 4``."""
    counter = index >> 2
    # In 32-bit words: with a 64-bit counter some versions of `tl.randint4x` use another generator, with 64-bit words.
    low, high = counter.to(tl.uint32), (counter.to(tl.int64) >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    tl.static_assert(w0.dtype == tl.uint32, "Philox 4x32 gives words of 32 bits")
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def round_by_words(x, words, dtype: tl.constexpr):
    """Round float32 x to numbers that `dtype` has, still as float32. Numbers beyond its largest are left unchanged.

    A number rounds away from zero if its word is below 2**32 times its fraction of the step. This is integer
    arithmetic: float32 has 16 bits more than bfloat16, with the same exponents, and 13 more than the normal numbers of
    float16.
    """
    DROPPED: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
    LARGEST: tl.constexpr = 0x7F7F0000 if dtype == tl.bfloat16 else 0x477FE000
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    fraction = (bits << (32 - DROPPED)).to(tl.uint32, bitcast=True)
    steps = ((bits >> DROPPED) + (words < fraction).to(tl.int32)) << DROPPED
    if dtype == tl.float16:
        # Numbers below 2**-14 are subnormal: multiples of 2**-24. The sign, which -0 has too, is put back as a bit.
        subnormal = size < 0x38800000
        small = tl.where(subnormal, tl.abs(x), 0.0) * 16777216.0
        whole = tl.floor(small)
        fraction = tl.ceil((small - whole) * 4294967296.0).to(tl.uint32)
        multiple = (whole + (words < fraction).to(tl.float32)) * 5.9604644775390625e-08
        steps = tl.where(subnormal, multiple.to(tl.int32, bitcast=True) | (bits ^ size), steps)
    return tl.where(size > LARGEST, bits, steps).to(tl.float32, bitcast=True)
