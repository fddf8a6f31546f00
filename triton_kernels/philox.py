"""Noise that is a function of (seed, key, draw, position): Philox-4x32-10 (Salmon et al., SC 2011) and a normal
distribution made of it, in PyTorch. Nothing has a state, so any part of it can be made again, anywhere.

The numbers are the same to the bit in PyTorch on any device and in the Triton kernel beside it: integers are exact, and
the rest is conversions, additions and multiplications in fp32, each rounded to nearest, none fused. (No square root:
PyTorch's is off by a unit in the last place for one number in a hundred on some CPUs.)

Counter words: position // 4, draw, low and high half of the key; Philox's own key is the seed. The four words that come
out are for the positions 4i … 4i+3 of a row, in its contiguous order (channels first).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.triton_kernels.available import use_triton
from diffpref.triton_kernels.blocks import block_of, launch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by at each round
ROUNDS = 10
LOW = 0xFFFFFFFF

# Polynomials, highest power first, coefficients in fp32. Fitted in fp64 by Lawson's iteration to the least greatest
# relative error: 2.6e-8, 1.3e-8 and 1.9e-8.
LOG2 = (
    0.125837042927742, -0.2072697877883911, 0.21571561694145203, -0.23894481360912323, 0.28791624307632446,
    -0.3607036769390106, 0.48091062903404236, -0.7213473320007324, 1.4426950216293335,
)  # fmt: skip
CENTRAL = (
    2.1087966442512318e-11, -1.356715295663946e-10, -2.5435988870725623e-09, 3.7715679468419694e-08,
    -7.505556709475059e-08, -3.5706680137082003e-06, 5.265959043754265e-05, -0.00023692969989497215,
    -0.004529652185738087, 0.2311614602804184, 2.453317880630493,
)  # fmt: skip
TAIL = (
    1.1119022674430882e-14, -2.0989876232512666e-13, -5.271344884032192e-13, 4.365232827985288e-11,
    -1.0838692166004193e-09, 3.5647492069301734e-08, -1.1571437426027842e-06, 3.9308913983404636e-05,
    -0.0016331010265275836, 0.13276584446430206, 5.0354084968566895,
)  # fmt: skip
SPLIT = 10.0  # w where the tail begins, |z| = 3.5
MIDDLE, FAR = 5.0, 20.0  # where the two are expanded
ROOT_HALF = 0x3F3504F3  # the bits of √½: mantissas are taken from [√½, √2)


@dataclass(frozen=True)
class Streams:
    """Rows of noise that is not there yet. table [R,3] int64: seed, key and draw of each row."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def normal(self, shape: Sequence[int], kernel: str = "auto") -> Tensor:
        """Standard normal noise [R,*shape], fp32, on the table's device; the same numbers whoever computes them."""
        n = math.prod(shape)
        make = fused if use_triton(kernel, self.table.device) else plain
        return make(self.table, n).view(-1, *shape)


def streams(
    keys: Sequence[int] | Tensor, *, seed: int, draw: int | Tensor = 0, device: torch.device | str = "cpu"
) -> Streams:
    """keys: R integers, or int64 [R]; draw: one, or [R]. Seed and keys count modulo 2^64, draws modulo 2^32."""
    if not isinstance(keys, Tensor):
        keys = torch.tensor([signed(key) for key in keys], dtype=torch.int64)
    table = keys.new_empty(len(keys), 3)
    table[:, 0], table[:, 1], table[:, 2] = signed(seed), keys, draw
    return Streams(table.to(device, non_blocking=True))


def philox_normal(
    keys: Sequence[int] | Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int | Tensor = 0,
    device: torch.device | str = "cpu",
    kernel: str = "auto",
) -> Tensor:
    """Standard normal noise [R,*shape] of R keys, fp32. Raises ValueError where the kernel asked for cannot run."""
    return streams(keys, seed=seed, draw=draw, device=device).normal(shape, kernel)


def plain(table: Tensor, n: int) -> Tensor:
    """[R,n] in PyTorch."""
    return normal_of(philox_words(table, n))


def fused(table: Tensor, n: int) -> Tensor:
    """[R,n] by the kernel."""
    from diffpref.triton_kernels.noise_kernels import normal_kernel  # imports Triton

    out, (block, warps) = torch.empty(len(table), n, device=table.device), block_of(n)
    blocks = -(-n // block)
    launch(normal_kernel, len(table) * blocks, out, table, out, n, blocks, BLOCK=block, num_warps=warps)
    return out


def signed(value: int) -> int:
    """value modulo 2^64, as the bits of an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox-4x32-10: four counter words and two key words, int64 tensors of values below 2^32 that broadcast against
    each other -> four words. Each round makes (hi(M1·c2)^c1^k0, lo(M1·c2), hi(M0·c0)^c3^k1, lo(M0·c0)) of c0 … c3."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64: the sign bit is a bit like others
        c0, c1 = ((odd >> 32) & LOW) ^ c1 ^ k0, odd & LOW
        c2, c3 = ((even >> 32) & LOW) ^ c3 ^ k1, even & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return [c0, c1, c2, c3]


def philox_words(table: Tensor, n: int) -> Tensor:
    """The first n words, [R,n] int64 below 2^32, of the streams [R,3]. n up to 2^34."""
    seed, key, draw = (column[:, None] for column in table.unbind(1))
    block = torch.arange((n + 3) // 4, device=table.device)[None]
    words = philox((block, draw & LOW, key & LOW, (key >> 32) & LOW), (seed & LOW, (seed >> 32) & LOW))
    return torch.stack(words, 2).flatten(1)[:, :n]


def normal_of(words: Tensor) -> Tensor:
    """Words below 2^32 -> standard normal numbers, fp32, |z| < 6.34.

    z = Φ⁻¹((1 + q)/2), q = (2v + 1)/2^32 with v the word as a signed integer, so that z is symmetric and never 0. With
    w = −log2(1 − q²), z = q·P(w), the form of Giles (2010); P is one polynomial in the middle and another in the tail.
    1 − |q| comes from the integers: it has all its digits in the tail, too. Within 4 units in the last place of Φ⁻¹.
    """
    negative = words > LOW >> 1
    odd = 2 * torch.where(negative, words ^ LOW, words) + 1  # |q|·2^32
    q, p = odd.float().mul_(2.0**-32), (2**32 - odd).float().mul_(2.0**-32)
    w = negative_log2(p * (2.0 - p))
    z = q * torch.where(w < SPLIT, polynomial(CENTRAL, w - MIDDLE), polynomial(TAIL, w - FAR))
    return torch.where(negative, -z, z)


def negative_log2(x: Tensor) -> Tensor:
    """−log2 x of positive normal fp32 numbers: x = 2^e·m, m in [√½, √2), log2 m = f·P(f) with f = m − 1."""
    bits = x.view(torch.int32)
    exponent = (bits - ROOT_HALF) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    return -(exponent.float() + f * polynomial(LOG2, f))


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule, each product and each sum rounded."""
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y.mul_(x).add_(coefficient)
    return y
