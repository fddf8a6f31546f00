"""Kernels of noise: made from (seed, key, draw, position), and mixed with pictures. Importing this imports Triton.

`blocks.launch` lets no product be fused with a sum: each is rounded as PyTorch rounds it, and the numbers are the same
to the bit (philox.py says which operations there are, and gives the equations).
"""

import triton
import triton.language as tl

from diffpref.triton_kernels import philox

LOG2 = tl.constexpr(philox.LOG2)
CENTRAL = tl.constexpr(philox.CENTRAL)
TAIL = tl.constexpr(philox.TAIL)
LOG2_TERMS = tl.constexpr(len(philox.LOG2))
TERMS = tl.constexpr(len(philox.TAIL))
SPLIT = tl.constexpr(philox.SPLIT)
MIDDLE = tl.constexpr(philox.MIDDLE)
FAR = tl.constexpr(philox.FAR)
ROOT_HALF = tl.constexpr(philox.ROOT_HALF)


@triton.jit
def polynomial(coefficients: tl.constexpr, terms: tl.constexpr, x):
    """Horner's rule, highest power first."""
    y = tl.full(x.shape, coefficients[0], tl.float32)
    for i in tl.static_range(1, terms):  # pyright: ignore[reportGeneralTypeIssues]
        y = y * x + coefficients[i]
    return y


@triton.jit
def negative_log2(x):
    """−log2 x of positive normal numbers."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return -(exponent.to(tl.float32) + f * polynomial(LOG2, LOG2_TERMS, f))


@triton.jit
def normal_of(word):
    """uint32 -> standard normal: Φ⁻¹((1 + q)/2) with q = (2v + 1)/2^32, v the word as a signed integer."""
    negative = word > 0x7FFFFFFF
    # bits are turned by ^: Triton 3.8's interpreter knows no ~ of unsigned numbers
    odd = tl.where(negative, word ^ 0xFFFFFFFF, word) * 2 + 1
    rest = (odd ^ 0xFFFFFFFF) + 1  # 2^32 − odd
    q, p = odd.to(tl.float32) * 2.3283064365386963e-10, rest.to(tl.float32) * 2.3283064365386963e-10
    w = negative_log2(p * (2.0 - p))
    z = q * tl.where(w < SPLIT, polynomial(CENTRAL, TERMS, w - MIDDLE), polynomial(TAIL, TERMS, w - FAR))
    return tl.where(negative, -z, z)


@triton.jit
def normal_block(streams, row, block, BLOCK: tl.constexpr):
    """Normal numbers at the positions block·BLOCK … of a row of streams, [BLOCK]."""
    seed, key, draw = tl.load(streams + row * 3), tl.load(streams + row * 3 + 1), tl.load(streams + row * 3 + 2)
    counter = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    low, high = (key & 0xFFFFFFFF).to(tl.uint32) + zero, ((key >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    a, b, c, d = tl.philox(seed, counter, (draw & 0xFFFFFFFF).to(tl.uint32) + zero, low, high)
    even, odd = tl.interleave(normal_of(a), normal_of(c)), tl.interleave(normal_of(b), normal_of(d))
    return tl.interleave(even, odd)


@triton.jit
def normal_kernel(streams, out, n, blocks, BLOCK: tl.constexpr):
    """out [R,n]: the rows of noise themselves. Grid: R·blocks."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row * n + offset, normal_block(streams, row, block, BLOCK), mask=offset < n)


@triton.jit
def mix_kernel(
    x0, noise, rows, coefficients, x_t, target, n, blocks, channels,
    COEFFICIENTS: tl.constexpr, PHILOX: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_t = a·x0 + s·ε and, where asked for, target = c_x·x0 + c_n·ε, for every item. Grid: N·blocks.

    x0, x_t, target [N,n] in one layout; noise [R,n] in contiguous order, or the streams [R,3] that make it; rows [N]:
    the row of each item's noise, or None: its own; coefficients [N,2] or [N,4].
    """
    item, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    row = item
    if rows is not None:
        row = tl.load(rows + item)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    inside = offset < n
    if PHILOX:
        e = normal_block(noise, row, block, BLOCK)
    else:
        e = tl.load(noise + row * n + offset, mask=inside, other=0.0).to(tl.float32)
    place = offset
    if CHANNELS_LAST:
        pixels = n // channels
        place = (offset % pixels) * channels + offset // pixels
    place += item * n
    x = tl.load(x0 + place, mask=inside, other=0.0).to(tl.float32)
    c = coefficients + item * COEFFICIENTS
    tl.store(x_t + place, tl.load(c) * x + tl.load(c + 1) * e, mask=inside)
    if target is not None:
        tl.store(target + place, tl.load(c + 2) * x + tl.load(c + 3) * e, mask=inside)
