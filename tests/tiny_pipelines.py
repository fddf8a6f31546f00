"""Tiny random pipelines out of real diffusers and transformers classes: 32-pixel pictures, 8x8 latents; no download."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

IMAGE_SIZE, LATENT_SIZE = 32, 8
START, END = "<|startoftext|>", "<|endoftext|>"
WIDTH, PROMPT_LENGTH = 16, 16


def tiny_sd(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x ("epsilon") or 2.x ("v_prediction")."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        return StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer, WIDTH)).eval(),
            tokenizer=tokenizer,
            unet=unet(cross_attention_dim=WIDTH),
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL: two text encoders of different widths, the second projected; time ids."""
    second, pooled, time_dim = 24, 12, 8
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad="!")
        return StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer, WIDTH)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2, second, pooled)).eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet(
                cross_attention_dim=WIDTH + second,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_dim,
                projection_class_embeddings_input_dim=6 * time_dim + pooled,
                use_linear_projection=True,
            ),
            scheduler=ddim("epsilon"),
            add_watermarker=False,
        )


def tiny_sd3(t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """SD3: the flow transformer, two projected CLIPs, and T5 or nothing in its place.

    Stock diffusers loads a folder saved without T5 only when text_encoder_3=None and tokenizer_3=None are passed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        tokenizer_3 = t5_tokenizer() if t5 else None
        return StableDiffusion3Pipeline(
            vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, WIDTH, WIDTH)).eval(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, WIDTH, WIDTH)).eval(),
            text_encoder_3=t5_encoder(tokenizer_3) if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            tokenizer_3=tokenizer_3,
            transformer=SD3Transformer2DModel(
                sample_size=LATENT_SIZE,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=2 * LATENT_SIZE,
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def tiny_flux(guidance: bool = True, seed: int = 0) -> FluxPipeline:
    """FLUX.1: patches of latents in double and single blocks, CLIP's pooled vector, T5's tokens; with distilled
    guidance ("dev") or without ("schnell"). By itself it would draw 128x128 latents: tell it the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        return FluxPipeline(
            vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModel(clip_config(tokenizer, WIDTH)).eval(),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=2,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance,
                axes_dims_rope=(2, 2, 4),
            ).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        )


# --- parts ------------------------------------------------------------------------------------------------------------


def vae(**changes) -> AutoencoderKL:
    """Four latent channels, a quarter of the picture's side."""
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": IMAGE_SIZE}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**sizes, **blocks, **changes).eval()


def unet(**changes) -> UNet2DConditionModel:
    """Two levels, one with cross-attention."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **changes,
    ).eval()


def ddim(prediction_type: str) -> DDIMScheduler:
    """The schedule of the Stable Diffusion checkpoints."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer with an alphabet and no merges: every letter is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=PROMPT_LENGTH, pad_token=pad)


def clip_config(tokenizer: CLIPTokenizer, width: int, projection: int = WIDTH) -> CLIPTextConfig:
    """A text tower of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer over single letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,0123456789"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(vocab=pieces, tokenizer_object=tokenizer, extra_ids=0, model_max_length=PROMPT_LENGTH)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """One layer, as wide as the transformer's joint attention."""
    config = T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()
