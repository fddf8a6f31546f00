"""LoRA that computes in the base's precision, its fp32 weights cast once for all passes of an optimiser step.

peft casts the input of every layer to the weights' fp32, which costs copies and products in fp32; autocast casts the
weights at every pass. Here they stay fp32 parameters, and their gradients are summed in fp32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F


class CastLinear(nn.Linear):
    """A linear layer that computes in its input's precision, whatever its weights' is."""

    kept: dict[tuple[torch.dtype, bool], Tensor] | None = None  # casts, while they are kept

    def forward(self, x: Tensor) -> Tensor:
        """[...,i] -> [...,o] in x's dtype."""
        return F.linear(x, self.cast(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight [o,i], with graph where there is one. Passes share the cast's node, which holds no tensors and can
        be gone through more than once."""
        if self.kept is None or torch.compiler.is_compiling() or self.weight.dtype == dtype:
            return self.weight.to(dtype)
        key = dtype, torch.is_grad_enabled()
        if key not in self.kept:
            self.kept[key] = self.weight.to(dtype)
        return self.kept[key]


@contextmanager
def casting_once(layers: Sequence[CastLinear]) -> Iterator[None]:
    """Casts are kept, inside, where no weight may change. That cannot be told from the weights themselves: torch's
    fused optimisers do not count their versions up."""
    for layer in layers:
        layer.kept = {}
    try:
        yield
    finally:
        for layer in layers:
            layer.kept = None


def compute_in_input_dtype(denoiser: nn.Module) -> list[CastLinear]:
    """Let every plain LoRA on a linear layer compute in its input's precision; returns what casts. DoRA and
    convolutions are left alone."""
    made = []
    for layer in [module for module in denoiser.modules() if isinstance(module, LoraLinear)]:
        if layer.lora_variant:
            continue
        layer.cast_input_dtype_enabled = False
        for halves in (layer.lora_A, layer.lora_B):
            for name, half in halves.items():
                halves[name] = with_weights_of(half)
                made.append(halves[name])
    return made


def with_weights_of(linear: nn.Linear) -> CastLinear:
    """The same parameters in a layer that casts them."""
    cast = CastLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    cast.weight, cast.bias = linear.weight, linear.bias
    return cast.train(linear.training)
