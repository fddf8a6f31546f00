"""What switching the adapter off and on again costs: the public way, and a flag on layers found once."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from diffpref.speed.toggle import lora_off, trained_lora

TIMES = 20


def milliseconds(act: Callable[[], Any]) -> float:
    """Median."""
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return 1e3 * statistics.median(found)


def toggles(denoiser: nn.Module) -> dict[str, float]:
    """Of a denoiser with a LoRA that trains."""
    layers = trained_lora(denoiser)

    def public() -> None:
        denoiser.disable_adapters()
        denoiser.enable_adapters()

    def cheap() -> None:
        with lora_off(layers):
            pass

    return {"layers": len(layers), "public_ms": milliseconds(public), "flag_ms": milliseconds(cheap)}
