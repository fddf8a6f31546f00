"""What every kernel needs: block sizes by formula, items as flat dense blocks, and one door through which all launches
go. Nothing here imports Triton."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# (most elements of an item, BLOCK, warps). No autotuning: the same n gives the same bits on any GPU, in any batch.
BLOCKS = ((16_384, 1024, 4), (262_144, 2048, 8), (math.inf, 4096, 8))
MOST_SPLITS = 64  # partial sums of an item: enough programs for a pair of items to fill a GPU, few enough to add up

_watchers: list[list[str]] = []


def block_of(n: int) -> tuple[int, int]:
    """(BLOCK, warps) for items of n elements."""
    return next((block, warps) for most, block, warps in BLOCKS if n <= most)


def splits_of(n: int) -> tuple[int, int]:
    """(programs that share an item of n elements, blocks that each of them adds up)."""
    blocks = math.ceil(n / block_of(n)[0]) or 1
    iterations = math.ceil(blocks / MOST_SPLITS)
    return math.ceil(blocks / iterations), iterations


def launch(kernel, programs: int, like: Tensor, *arguments, **options) -> None:
    """Run a kernel on the device of `like`, whatever the current device is; nothing where there is nothing to do.

    Products and sums are rounded one by one, as PyTorch does it: no fused multiply-add unless asked for, so that the
    bits do not depend on the version of Triton, which changed its mind about that.
    """
    if programs:
        for names in _watchers:
            names.append(kernel.__name__)
        with torch.cuda.device_of(like):
            kernel[(programs,)](*arguments, **{"enable_fp_fusion": False, **options})


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched inside, in order."""
    names: list[str] = []
    _watchers.append(names)
    try:
        yield names
    finally:
        _watchers.remove(names)


# --- layout -----------------------------------------------------------------------------------------------------------


def memory_order(x: Tensor) -> list[int]:
    """Dimensions of one item that are longer than 1, from the slowest to the fastest."""
    return sorted((d for d in range(1, x.ndim) if x.shape[d] > 1), key=lambda d: -x.stride(d))


def is_dense(x: Tensor) -> bool:
    """Whether each item [...] of x [N,...] fills one block of memory without gaps, in whatever order."""
    expected = 1
    for d in reversed(memory_order(x)):
        if x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it whose items are dense."""
    return x if is_dense(x) else x.contiguous()


def empty_like_items(x: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, ...], each item laid out as those of x are, one after the other."""
    n = math.prod(x.shape[1:])
    return torch.empty_strided((rows, *x.shape[1:]), (n, *x.stride()[1:]), dtype=dtype, device=x.device)


def laid_out_as(x: Tensor, like: Tensor, name: str) -> Tensor:
    """x [N,...] with the memory order of like's items: itself, or a copy. What all items share (stride 0) stays shared.

    Raises ValueError for another shape or device.
    """
    if x.shape != like.shape or x.device != like.device:
        mine, theirs = f"{list(x.shape)} on {x.device}", f"{list(like.shape)} on {like.device}"
        raise ValueError(
            f"{name} is {mine}, the policy's prediction {theirs}; they must be alike, so expand or move it"
        )
    if all(x.stride(d) == like.stride(d) for d in memory_order(like)):
        return x
    rows = 1 if x.stride(0) == 0 else len(x)
    return empty_like_items(like, rows, x.dtype).copy_(x[:rows]).expand(x.shape)


@dataclass(frozen=True)
class Spread:
    """A mask as kernels read it: element `off` of item i has values[i·row + (off // divisor) % modulus]."""

    values: Tensor
    row: int
    divisor: int
    modulus: int


def check_mask(mask: Tensor, policy: Tensor) -> None:
    """Raise ValueError for a mask that does not broadcast to the predictions [N,...]."""
    fits = mask.ndim == policy.ndim and all(m in (1, p) for m, p in zip(mask.shape, policy.shape, strict=True))
    if not fits:
        raise ValueError(
            f"mask {list(mask.shape)} does not fit predictions {list(policy.shape)}; give it as many dimensions, 1"
            " where it is the same for all"
        )


def spread(mask: Tensor, policy: Tensor) -> Spread:
    """A mask that broadcasts to policy [N,...], without writing it out over channels where it has none."""
    check_mask(mask, policy)
    order = memory_order(policy)
    kept = [place for place, d in enumerate(order) if mask.shape[d] > 1]
    if kept and kept != list(range(kept[0], kept[-1] + 1)):  # not one run of dimensions: write it out
        mask, kept = mask.expand(mask.shape[0], *policy.shape[1:]), list(range(len(order)))
    rest = [d for d in range(1, policy.ndim) if d not in order]
    values = mask.permute(0, *order, *rest).reshape(mask.shape[0], -1).contiguous()
    sizes = [policy.shape[d] for d in order]
    modulus = math.prod(sizes[kept[0] : kept[-1] + 1]) if kept else 1
    divisor = math.prod(sizes[kept[-1] + 1 :]) if kept else math.prod(sizes)
    values = values.view(torch.uint8) if values.dtype == torch.bool else values
    return Spread(values, 0 if mask.shape[0] == 1 else modulus, divisor, modulus)
