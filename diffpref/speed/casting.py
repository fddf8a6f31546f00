"""LoRA that computes in the base's precision, its fp32 weights cast once for each value they take.

peft casts the input of every layer to the weights' fp32, which costs copies and products in fp32; autocast casts the
weights at every pass. Here they stay fp32 parameters, and their gradients are summed in fp32.
"""

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F


class CastLinear(nn.Linear):
    """A linear layer that computes in its input's precision, whatever its weights' is."""

    made: tuple[int, torch.dtype, bool] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[...,i] -> [...,o] in x's dtype."""
        return F.linear(x, self.cast(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def cast(self, dtype: torch.dtype) -> Tensor:
        """The weight [o,i], with graph. An optimiser's step changes its version, and it is cast again. Passes of one
        step share the cast's node, which holds no tensors and can be gone through more than once."""
        if torch.compiler.is_compiling() or self.weight.dtype == dtype:
            return self.weight.to(dtype)
        now = self.weight._version, dtype, torch.is_grad_enabled()
        if self.made != now:
            self.low, self.made = self.weight.to(dtype), now
        return self.low

    def __getstate__(self) -> dict:
        """What a copy of the layer takes along: all but the cast."""
        return {key: value for key, value in self.__dict__.items() if key not in ("low", "made")}


def compute_in_input_dtype(denoiser: nn.Module) -> None:
    """Let every plain LoRA on a linear layer compute in its input's precision. DoRA and convolutions are left alone."""
    for layer in [module for module in denoiser.modules() if isinstance(module, LoraLinear)]:
        if layer.lora_variant:
            continue
        layer.cast_input_dtype_enabled = False
        for halves in (layer.lora_A, layer.lora_B):
            for name, half in halves.items():
                halves[name] = with_weights_of(half)


def with_weights_of(linear: nn.Linear) -> CastLinear:
    """The same parameters in a layer that casts them."""
    cast = CastLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    cast.weight, cast.bias = linear.weight, linear.bias
    return cast.train(linear.training)
