"""Times of small things: each call by itself, hot (the same memory again) and cold (more memory than caches hold)."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from stepping.ceilings import wait

INSIDE = 20  # calls in one CUDA graph
WARM = 3  # calls before the clock starts
MOST = 500  # calls timed
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
Act = Callable[[], Any]


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    size = CACHE.read_text().strip() if CACHE.exists() else "32768K"
    return int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)


def sets_for_cold(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs take more than three caches."""
    return math.floor(3 * cache_bytes(device) / bytes_of_one) + 1


def microseconds(acts: Sequence[Act], device: torch.device, seconds: float) -> list[float]:
    """Of each call, the acts in turn, for about so many seconds and at least once each."""
    for act in [*acts, *[acts[0]] * WARM]:
        act()
    one = timed([acts[0]] * WARM, device)
    count = max(len(acts), min(MOST, int(seconds / (statistics.median(one) / 1e6))))
    return timed([acts[i % len(acts)] for i in range(count)], device)


def timed(acts: Sequence[Act], device: torch.device) -> list[float]:
    """µs of each: on a GPU between two events, so that a call that the host is slow to launch counts what it takes."""
    wait(device)
    marks = [mark(device)]
    for act in acts:
        act()
        marks.append(mark(device))
    wait(device)
    return [between(a, b) for a, b in zip(marks[:-1], marks[1:], strict=True)]


def mark(device: torch.device) -> Any:
    """A moment on the device's own clock."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def between(first: Any, second: Any) -> float:
    """µs between two of them."""
    return 1e6 * (second - first) if isinstance(first, float) else 1e3 * first.elapsed_time(second)


def graphed(acts: Sequence[Act]) -> Act:
    """INSIDE calls, the acts in turn, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            acts[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(max(INSIDE, len(acts))):
            acts[i % len(acts)]()
    return graph.replay


def spread(runs: list[list[float]]) -> dict[str, float | int]:
    """Runs of the same thing -> median with 20th and 80th percentile of all calls, and how far the runs' medians lie
    apart, over the median."""
    calls = sorted(value for run in runs for value in run)
    medians = [statistics.median(run) for run in runs]
    middle = statistics.median(calls)
    found = {f"p{q}": calls[min(len(calls) - 1, q * len(calls) // 100)] for q in (20, 80)}
    return {"p50": middle} | found | {"n": len(calls), "apart": (max(medians) - min(medians)) / middle}
