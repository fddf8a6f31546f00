"""UNets of Stable Diffusion and SDXL: attention to the user in every cross-attention (IP-Adapter, arXiv 2308.06721)."""

from torch import Tensor, nn

from diffpref.users.formats.contract import StockFormat, base_weight

PROCESSOR = ".processor"


class UNetFormat(StockFormat):
    """One vector (four tokens), or L vectors (a token each). Layers count 1, 3, 5, …, as in the published files."""

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        names = [name for name in denoiser.attn_processors if not name.endswith("attn1.processor")]
        return {str(2 * i + 1): denoiser.get_submodule(n.removesuffix(PROCESSOR)) for i, n in enumerate(names)}

    def token(self, denoiser: nn.Module) -> int:
        return denoiser.config.cross_attention_dim

    def keys(self, denoiser: nn.Module, layer: nn.Module) -> Tensor:
        """The map that the layer has for text."""
        return base_weight(layer.to_k)
