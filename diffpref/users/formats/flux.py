"""FLUX: attention to the user beside the joint attention of every double-stream block, as in published IP-adapters."""

from typing import Any

from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from diffpref.users.formats.contract import TOKENS, UserFormat, attach_for_stock, base_weight

PROCESSOR = ".processor"


class FluxFormat(UserFormat):
    """One vector (four tokens); the loader of diffusers knows no other projection. Layers count 0, 1, 2, …"""

    sequences, offsets = False, True

    def layers(self, denoiser: Any) -> dict[str, Any]:
        names = [name for name in denoiser.attn_processors if not name.startswith("single_transformer_blocks")]
        return {str(i): denoiser.get_submodule(name.removesuffix(PROCESSOR)) for i, name in enumerate(names)}

    def token(self, denoiser: Any) -> int:
        return denoiser.config.joint_attention_dim

    def keys(self, denoiser: Any, layer: Any) -> Tensor:
        """The layer's map for text, after the one that brings T5's tokens to the transformer's width."""
        return base_weight(layer.add_k_proj).float() @ base_weight(denoiser.context_embedder).float()

    def processor(self, size: int, token: int) -> nn.Module:
        return FluxIPAdapterAttnProcessor(size, token, [TOKENS])

    def attach(self, denoiser: Any, projection: nn.Module) -> None:
        attach_for_stock(denoiser, projection)

    def projection(self, denoiser: Any) -> nn.Module:
        return denoiser.encoder_hid_proj.image_projection_layers[0]
