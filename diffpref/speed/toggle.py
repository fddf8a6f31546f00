"""LoRA off and on again, for the reference: a flag on the layers that have one, found once.

diffusers' disable_adapters and enable_adapters walk all modules and switch every parameter's gradient off and on: tens
of milliseconds a step on a large UNet. The result is the same to the bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def trained_lora(denoiser: nn.Module) -> list[BaseTunerLayer]:
    """The layers whose LoRA trains; one that does not is a part of the base, which no reference is without."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if any("lora_" in n for n, p in layer.named_parameters() if p.requires_grad)]


@contextmanager
def lora_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """These layers as they were before they had a LoRA, inside."""
    switch(layers, off=True)
    try:
        yield
    finally:  # also after an exception: a policy left without its adapter would go on training nothing
        switch(layers, off=False)


def switch(layers: Sequence[BaseTunerLayer], off: bool) -> None:
    """The flag that peft's layers look at in their forward pass."""
    for layer in layers:
        layer._disable_adapters = off
