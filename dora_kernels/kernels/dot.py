"""Tile products with float32 accumulation for every operand dtype, on the matrix units of every target.

float32 operands are split into bfloat16 pieces, ``a = a1 + a2 + a3``, whose products run as bfloat16 matrix
instructions on every target. ``ieee`` float32 products have no matrix instruction on any target, ``tf32x3`` none on
AMD.

| products | pieces | relative error of a product | for |
|---|---|---|---|
| 1 | 1 | that of the 16-bit operands: none | 16-bit operands |
| 3 | 2 | about 2**-16 | float32 adapters of a 16-bit weight, where the norm's budget is 1e-5 |
| 6 | 3 | about 2**-23 | float32 throughout |
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr, FINITE: tl.constexpr = False):
    """``acc + a @ b`` for a and b of the same dtype and a float32 acc.

    FINITE: a and b are, as weights are. Where activations are infinite, so is the result; that costs registers.
    """
    if PRODUCTS == 1:
        acc = _dot(a, b, acc, INTERPRETED)
    else:
        a1 = cast(a, tl.bfloat16, INTERPRETED)
        b1 = cast(b, tl.bfloat16, INTERPRETED)
        a_rest = rest(a, a1, FINITE)
        b_rest = rest(b, b1, FINITE)
        a2 = cast(a_rest, tl.bfloat16, INTERPRETED)
        b2 = cast(b_rest, tl.bfloat16, INTERPRETED)
        if PRODUCTS == 6:
            a3 = cast(a_rest - a2.to(tl.float32), tl.bfloat16, INTERPRETED)
            b3 = cast(b_rest - b2.to(tl.float32), tl.bfloat16, INTERPRETED)
            # The small products first: a large accumulator would absorb them.
            acc = _dot(finite(a1, FINITE), b3, acc, INTERPRETED)
            acc = _dot(a3, finite(b1, FINITE), acc, INTERPRETED)
            acc = _dot(a2, b2, acc, INTERPRETED)
        acc = _dot(finite(a1, FINITE), b2, acc, INTERPRETED)
        acc = _dot(a2, finite(b1, FINITE), acc, INTERPRETED)
        acc = _dot(a1, b1, acc, INTERPRETED)
    return acc


@triton.jit
def dot_by_pieces(a, b, acc, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` to about 2**-24 for a bfloat16 a and a float32 b, which three pieces represent exactly."""
    b1 = cast(b, tl.bfloat16, INTERPRETED)
    b_rest = rest(b, b1, False)
    b2 = cast(b_rest, tl.bfloat16, INTERPRETED)
    b3 = cast(b_rest - b2.to(tl.float32), tl.bfloat16, INTERPRETED)
    acc = _dot(finite(a, False), b3, acc, INTERPRETED)
    acc = _dot(finite(a, False), b2, acc, INTERPRETED)
    acc = _dot(a, b1, acc, INTERPRETED)
    return acc


@triton.jit
def rest(x, piece, FINITE: tl.constexpr):
    """What a bfloat16 piece leaves of float32 x; nothing where the piece is infinite."""
    left = x - piece.to(tl.float32)
    return left if FINITE else tl.where(_infinite(piece), 0.0, left)


@triton.jit
def finite(piece, FINITE: tl.constexpr):
    """A piece for products with small pieces, which are mostly 0: an infinity counts in the large product alone."""
    return piece if FINITE else tl.where(_infinite(piece), 0.0, piece).to(piece.dtype)


@triton.jit
def _infinite(piece):
    return (piece.to(tl.int16, bitcast=True) & 0x7FFF) == 0x7F80


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16.
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in `dtype`, rounded to nearest even."""
    if INTERPRETED and (dtype == tl.bfloat16 and x.dtype == tl.float32):  # Triton 3.2 does not allow longer chains
        # The interpreter truncates where hardware rounds, so the bits are rounded before they are cut off.
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
