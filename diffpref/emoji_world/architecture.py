"""The small Stable Diffusion: every part a stock diffusers or transformers class, at emoji size."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Architecture:
    """Sizes of the pipeline. The defaults are the shipped 32-pixel world; one more VAE level makes 64 pixels."""

    vae_channels: tuple[int, ...] = (32, 64)  # each level after the first halves the picture
    latent_channels: int = 8
    unet_channels: tuple[int, ...] = (64, 128, 128)
    text_width: int = 128
    text_layers: int = 2
    max_length: int = 20  # tokens in a prompt, with start and end


def make_tokenizer(captions: list[str], max_length: int) -> CLIPTokenizer:
    """An ordinary CLIP tokenizer whose merges are learned from the world's own captions; any other text still
    tokenizes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    pieces = list(dict.fromkeys([*letters, *(c + "</w>" for c in letters), *pieces, START, END]))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    with tempfile.TemporaryDirectory() as folder:  # CLIP's own two files, read back the ordinary way
        (Path(folder) / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_length, pad_token=END)


def make_text_encoder(tokenizer: CLIPTokenizer, arch: Architecture) -> CLIPTextModel:
    """CLIP's text tower at small size."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=arch.text_width,
        intermediate_size=4 * arch.text_width,
        projection_dim=arch.text_width,
        num_hidden_layers=arch.text_layers,
        num_attention_heads=4,
        max_position_embeddings=arch.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae(size: int, arch: Architecture) -> AutoencoderKL:
    """A VAE whose residual branches start at zero: icons train much faster from an identity-like start."""
    levels = len(arch.vae_channels)
    vae = AutoencoderKL(
        sample_size=size,
        latent_channels=arch.latent_channels,
        block_out_channels=arch.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2") and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    with torch.no_grad():  # posterior noise starts small: log-variance -6 is a standard deviation of 0.05
        vae.quant_conv.bias[arch.latent_channels :] = -6.0
    return vae


def make_unet(latent_size: int, arch: Architecture) -> UNet2DConditionModel:
    """A UNet that also takes the pooled prompt into its time embedding: at this size cross-attention alone learns
    colours only."""
    levels = len(arch.unet_channels)
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=arch.latent_channels,
        out_channels=arch.latent_channels,
        block_out_channels=arch.unet_channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        cross_attention_dim=arch.text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction on a schedule that ends in pure noise, sampled from its very end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # what diffusers expects; trailing spacing does not use it
    )


def assemble(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    """The stock pipeline out of its parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline with fp16 weights that load in fp32 unless a dtype is asked for.

    diffusers parts load in fp32 by default, but a transformers part in the precision that its configuration names:
    the stock pipeline would then be half one, half the other, and fail at its first step.
    """
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
