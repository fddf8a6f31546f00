"""UNets of Stable Diffusion and SDXL: attention to the user in every cross-attention (IP-Adapter, arXiv 2308.06721)."""

from typing import Any

from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from diffpref.users.formats.contract import TOKENS, UserFormat, attach_for_stock, base_weight

PROCESSOR = ".processor"


class UNetFormat(UserFormat):
    """One vector (four tokens), or L vectors (a token each). Layers count 1, 3, 5, …, as in the published files."""

    def layers(self, denoiser: Any) -> dict[str, Any]:
        names = [name for name in denoiser.attn_processors if not name.endswith("attn1.processor")]
        return {str(2 * i + 1): denoiser.get_submodule(n.removesuffix(PROCESSOR)) for i, n in enumerate(names)}

    def token(self, denoiser: Any) -> int:
        return denoiser.config.cross_attention_dim

    def keys(self, denoiser: Any, layer: Any) -> Tensor:
        """The map that the layer has for text."""
        return base_weight(layer.to_k)

    def processor(self, size: int, token: int) -> nn.Module:
        return IPAdapterAttnProcessor2_0(size, token, [TOKENS])

    def attach(self, denoiser: Any, projection: nn.Module) -> None:
        attach_for_stock(denoiser, projection)

    def projection(self, denoiser: Any) -> nn.Module:
        return denoiser.encoder_hid_proj.image_projection_layers[0]
