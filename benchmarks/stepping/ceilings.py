"""What the machine can do at most, measured in the same process: products of matrices, and copies."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SIDES = {"cuda": 8192, "cpu": 1024}
COPIED = {"cuda": 2 << 30, "cpu": 64 << 20}  # bytes


def seconds(act: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Median of a few, the first left out."""
    found = []
    for _ in range(times + 1):
        wait(device)
        started = time.perf_counter()
        act()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square product of random numbers."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device) / 1e12


def copy_tbs(device: torch.device) -> float:
    """Bytes read and written a second, in TB."""
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device) / 1e12


def ceilings(device: torch.device) -> dict[str, float]:
    """Both, the first in the two precisions that steps compute in."""
    products = {
        f"matmul_{name}_tflops": matmul_tflops(device, getattr(torch, name)) for name in ("float32", "bfloat16")
    }
    return products | {"copy_tbs": copy_tbs(device)}
