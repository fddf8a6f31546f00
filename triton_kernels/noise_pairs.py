"""x_t and target of all items from one noise for each group, in one pass; also a step of an inversion.

    x_t = a·x0 + s·ε        target = c_x·x0 + c_n·ε        (ε: 0, 1;  v: −s, a;  a flow: −1, 1)

The noise is read, or made on the way from a few integers a row (philox.py) and never stored. PyTorch and the kernel
round alike, each product and each sum in fp32: their results are the same to the bit.
"""

import torch
from torch import Tensor

from diffpref.triton_kernels.available import use_triton
from diffpref.triton_kernels.blocks import block_of, launch
from diffpref.triton_kernels.philox import Streams

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@torch.no_grad()
def noise_pairs(
    x0: Tensor,
    noise: Tensor | Streams,
    coefficients: tuple[Tensor, ...],
    rows: Tensor | None = None,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """x_t, target [N,...] fp32, in x0's layout, without graph; no target where only a and s are given.

    Args:
        x0: [N,...], of any float dtype.
        noise: R rows: [R,...], or Streams that make them.
        coefficients: (a, s) or (a, s, c_x, c_n), each [N].
        rows: [N] int64, which row of noise each item takes; row i for item i when not given.
        kernel: auto, torch or triton; see `use_triton`.

    Raises ValueError for sizes that do not fit, and where the kernel asked for cannot run.
    """
    check(x0, noise, coefficients, rows)
    mix = fused if use_triton(kernel, x0.device) else plain
    return mix(x0, noise, coefficients, rows)


def check(x0: Tensor, noise: Tensor | Streams, coefficients: tuple[Tensor, ...], rows: Tensor | None) -> None:
    """Raise ValueError for sizes that do not fit."""
    n = len(x0)
    if len(coefficients) not in (2, 4) or any(value.shape != (n,) for value in coefficients):
        shapes = [tuple(value.shape) for value in coefficients]
        raise ValueError(f"noise_pairs wants two or four coefficients of shape ({n},), one for each item; got {shapes}")
    if isinstance(noise, Tensor) and noise.shape[1:] != x0.shape[1:]:
        raise ValueError(f"noise {tuple(noise.shape)} has rows of another shape than the items {tuple(x0.shape)}")
    if (len(noise) if rows is None else len(rows)) != n:
        wanted = f"{len(noise)} rows of noise" if rows is None else f"the rows of {len(rows)} items"
        raise ValueError(f"noise_pairs got {wanted} for {n} items; say with `rows` which row each item takes")


def plain(
    x0: Tensor, noise: Tensor | Streams, coefficients: tuple[Tensor, ...], rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """In PyTorch, on any device."""
    if isinstance(noise, Streams):
        noise = noise.normal(x0.shape[1:], "torch")
    x0, noise = x0.float(), (noise if rows is None else noise[rows]).float()
    wide = [value.float().view(-1, *(1,) * (x0.ndim - 1)) for value in coefficients]
    made = [of_x * x0 + of_noise * noise for of_x, of_noise in zip(wide[::2], wide[1::2], strict=True)]
    return made[0], made[1] if len(made) > 1 else None


def fused(
    x0: Tensor, noise: Tensor | Streams, coefficients: tuple[Tensor, ...], rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One launch of the kernel."""
    from diffpref.triton_kernels.noise_kernels import mix_kernel  # imports Triton

    x0, channels_last = laid_out(x0)
    x_t = torch.empty_like(x0, dtype=torch.float32)
    target = torch.empty_like(x_t) if len(coefficients) > 2 else None
    source = noise.table if isinstance(noise, Streams) else noise
    table = torch.stack([value.float() for value in coefficients], 1)
    n = x0.numel() // max(len(x0), 1)
    block, warps = block_of(n)
    blocks = -(-n // block)
    launch(
        mix_kernel, len(x0) * blocks, x0,
        x0, source.contiguous(), rows, table, x_t, target, n, blocks, x0.shape[1] if channels_last else 1,
        COEFFICIENTS=len(coefficients), PHILOX=isinstance(noise, Streams), CHANNELS_LAST=channels_last, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
    return x_t, target


def laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """(x with its items one after the other in memory, whether its channels come last): as it is, or a copy."""
    if not x.is_contiguous() and x.ndim in CHANNELS_LAST and x.is_contiguous(memory_format=CHANNELS_LAST[x.ndim]):
        return x, True
    return x.contiguous(), False
