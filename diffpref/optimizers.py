"""The optimisers by name."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from diffpref.config import LoopConfig


def adamw(parameters: Iterable[nn.Parameter], fused: bool = True, **settings) -> Optimizer:
    """torch's AdamW: one kernel for all parameters, or one operation after the other."""
    return torch.optim.AdamW(parameters, fused=fused, **settings)


adamw_unfused = partial(adamw, fused=False)


def adamw_8bit(parameters: Iterable[nn.Parameter], **settings) -> Optimizer:
    """bitsandbytes' AdamW: two moments of one byte each, for parameters of 4096 numbers and more. Raises ValueError
    where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ValueError(
            "train.optimizer adamw_8bit needs bitsandbytes: pip install 'diffpref[8bit]', or take adamw"
        ) from error
    return AdamW8bit(parameters, **settings)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": adamw,
    "adamw_unfused": adamw_unfused,
    "adamw_8bit": adamw_8bit,
}


def make_optimizer(parameters: Iterable[nn.Parameter], config: LoopConfig) -> Optimizer:
    """The optimiser of train.optimizer over these parameters."""
    return OPTIMIZERS[config.optimizer](
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
