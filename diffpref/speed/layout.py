"""Channels-last layout: the order of numbers in memory that a GPU's convolutions work in."""

import torch
from torch import nn


def channels_last(denoiser: nn.Module) -> torch.memory_format:
    """Lay the convolutions' weights out so, in place: shapes, names and parameters stay; returns the layout that x_t
    must then have. Raises ValueError for a denoiser to which it means nothing."""
    if not any(isinstance(module, nn.Conv2d) and slides(module) for module in denoiser.modules()):
        raise ValueError(
            f"train.channels_last: {type(denoiser).__name__} has no convolutions but, at most, the one that cuts"
            " patches; the layout is for UNets: set it to false"
        )
    denoiser.to(memory_format=torch.channels_last)
    return torch.channels_last


def slides(convolution: nn.Conv2d) -> bool:
    """Whether its windows overlap; where they do not it is a product of matrices."""
    return any(size > step for size, step in zip(convolution.kernel_size, convolution.stride, strict=True))
