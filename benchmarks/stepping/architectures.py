"""Stock models by their published configurations, and the same classes made small: random weights cost the same time
and memory as trained ones."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

VOCABULARY, LENGTH = 49408, 77  # CLIP's


@dataclass(frozen=True)
class Architecture:
    """A pipeline's parts, by class and settings.

    denoiser: (class, settings).  vae: settings.  texts: (class, settings) of each encoder.  side: of the pictures, in
    pixels.  factor: of the VAE.  channels: of the latents.  tokens, width: of the prompt as the denoiser takes it.
    pooled: width of the pooled prompt; 0 for none.  limit: TFLOP of a picture's policy and reference passes with LoRA
    and all cached, as counted when the predictions were written; None where nothing was predicted.
    """

    denoiser: tuple[type[nn.Module], dict[str, Any]]
    vae: dict[str, Any]
    texts: tuple[tuple[type[nn.Module], dict[str, Any]], ...]
    side: int
    factor: int
    channels: int
    tokens: int
    width: int
    pooled: int = 0
    size_ids: bool = False
    limit: float | None = None
    targets: tuple[str, ...] = field(default=("to_q", "to_k", "to_v", "to_out.0"))

    @property
    def latent_side(self) -> int:
        """Of the square latents."""
        return self.side // self.factor


def clip(width: int, layers: int, heads: int, **more) -> dict[str, Any]:
    """Settings of a CLIP text tower."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"vocab_size": VOCABULARY, "intermediate_size": 4 * width, "projection_dim": width} | sizes | more


def vae(channels: tuple[int, ...], latent: int, side: int, **more) -> dict[str, Any]:
    """Settings of an autoencoder; each level after the first halves the picture."""
    levels = len(channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": channels, "latent_channels": latent, "sample_size": side, "layers_per_block": 2}
    return sizes | blocks | more


JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LEVELS = (128, 256, 512, 512)
CLIP_L = (CLIPTextModel, clip(768, 12, 12, hidden_act="quick_gelu"))
CLIP_L_PROJECTED = (CLIPTextModelWithProjection, clip(768, 12, 12, hidden_act="quick_gelu"))
CLIP_G = (CLIPTextModelWithProjection, clip(1280, 32, 20, hidden_act="gelu"))
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
T5_XXL = (T5EncoderModel, {"vocab_size": 32128} | T5)
UNET_XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX = {"guidance_embeds": True, "pooled_projection_dim": 768, "joint_attention_dim": 4096}

SD15 = Architecture(
    (UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    vae(LEVELS, 4, 512),
    (CLIP_L,),
    *(512, 8, 4, LENGTH, 768),
    limit=2.58,
)
SDXL = Architecture(
    (UNet2DConditionModel, UNET_XL),
    vae(LEVELS, 4, 1024, scaling_factor=0.13025, force_upcast=False),  # as the fixed VAE
    (CLIP_L, CLIP_G),
    *(1024, 8, 4, LENGTH, 2048),
    pooled=1280,
    size_ids=True,
    limit=21.3,
)
WITHOUT_QUANT = {"use_quant_conv": False, "use_post_quant_conv": False}
ARCHITECTURES: dict[str, Architecture] = {
    "sd15": SD15,
    "sdxl": SDXL,
    "sd3": Architecture(
        (SD3Transformer2DModel, SD3),
        vae(LEVELS, 16, 1024, **WITHOUT_QUANT),
        (CLIP_L_PROJECTED, CLIP_G, T5_XXL),
        *(1024, 8, 16, 333, 4096),  # 77 of the two CLIPs and 256 of T5
        pooled=2048,
        limit=31.0,
        targets=JOINT,
    ),
    "flux": Architecture(
        (FluxTransformer2DModel, FLUX),
        vae(LEVELS, 16, 1024, **WITHOUT_QUANT),
        (CLIP_L, T5_XXL),
        *(1024, 8, 16, 512, 4096),
        pooled=768,
        limit=245.6,
        targets=JOINT,
    ),
}

# --- made small: the whole command is tried with these on a CPU -------------------------------------------------------

SMALL_VAE = vae((8, 8, 8), 4, 32, norm_num_groups=4)
TINY: dict[str, Architecture] = {
    "sd15": replace(
        SD15,
        denoiser=(
            UNet2DConditionModel,
            {
                "sample_size": 8,
                "block_out_channels": (16, 32),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "cross_attention_dim": 32,
                "attention_head_dim": 2,
                "norm_num_groups": 4,
            },
        ),
        vae=SMALL_VAE,
        texts=((CLIPTextModel, clip(32, 2, 2)),),
        **{"side": 32, "factor": 4, "width": 32, "limit": None},
    ),
    "sdxl": replace(
        SDXL,
        denoiser=(
            UNet2DConditionModel,
            UNET_XL
            | {
                "sample_size": 8,
                "block_out_channels": (16, 32),
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                "cross_attention_dim": 56,
                "attention_head_dim": (2, 4),
                "transformer_layers_per_block": (1, 2),
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 24,
                "norm_num_groups": 4,
            },
        ),
        vae=SMALL_VAE | {"scaling_factor": 0.13025, "force_upcast": False},
        texts=((CLIPTextModel, clip(32, 2, 2)), (CLIPTextModelWithProjection, clip(24, 2, 2))),
        **{"side": 32, "factor": 4, "width": 56, "pooled": 24, "limit": None},
    ),
}


# --- modules ----------------------------------------------------------------------------------------------------------


def make_denoiser(architecture: Architecture) -> nn.Module:
    """Random weights, on the current default device."""
    kind, settings = architecture.denoiser
    return kind(**settings)


def make_text_encoder(kind: type[nn.Module], settings: dict[str, Any], **more) -> nn.Module:
    """Likewise, of transformers' classes, which take a configuration."""
    config = T5Config if kind is T5EncoderModel else CLIPTextConfig
    return kind(config(**(settings | more))).eval()


def make_vae(architecture: Architecture) -> AutoencoderKL:
    """Likewise."""
    return AutoencoderKL(**architecture.vae).eval()


def inputs(architecture: Architecture, items: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What the flow's conditioning holds for so many items, beside x_t and t."""
    found = {"prompt_embeds": torch.zeros(items, architecture.tokens, architecture.width, dtype=dtype)}
    if architecture.pooled:
        found["pooled"] = torch.zeros(items, architecture.pooled, dtype=dtype)
    if architecture.size_ids:
        found["time_ids"] = torch.zeros(items, 6, dtype=dtype)
    if architecture.denoiser[1].get("guidance_embeds"):
        found["guidance"] = torch.zeros(items, dtype=dtype)
    return found
