"""The only file that knows one family of pipelines from another: what its denoiser takes, what its latents mean.

A family is one row of FAMILIES: a few functions over stock diffusers pipelines. Adding one touches nothing else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffpref.batch import Conditioning, PreferenceBatch
from diffpref.config import ModelConfig

ALIGNMENT = 64  # bytes; of torch's allocator on the CPU
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def posterior(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean and standard deviation of the VAE's posterior, [N,2C,h,w]; of a VAE that has none, its latents [N,C,h,w]."""
    output = vae.encode(images)
    if "latent_dist" not in output:
        return next(iter(output.values()))
    return torch.cat([output.latent_dist.mean, output.latent_dist.std], dim=1)


def configured_side(denoiser: Any) -> int:
    """The side of the latents that a denoiser was made for, as its configuration says."""
    size = denoiser.config.sample_size
    return size if isinstance(size, int) else size[0]


def configured_patch(denoiser: nn.Module) -> int:
    """The side of a transformer's patches of latents; 1 for a UNet."""
    return getattr(denoiser.config, "patch_size", 1)


@dataclass(frozen=True)
class Family:
    """What the flow needs to know of a pipeline class.

    denoiser: attribute of the pipeline, and prefix of its LoRA keys.
    lora_targets: module name endings that a LoRA adapts by default.
    encode_prompts: (pipeline, N prompts) -> conditioning [N,...] as the pipeline itself would make it.
    describe: (batch, conditioning) -> conditioning with what depends on the picture and not on the prompt.
    denoise: (denoiser, x_t [N,C,h,w], t [N], conditioning) -> prediction [N,C,h,w]. conditioning["user"], [N,1,U] or
        [N,1,L,U], goes to the denoiser's user adapter; there must be one exactly where there is an adapter.
    moments: (VAE, pictures [N,3,H,W]) -> what latents are drawn from, [N,2C,h,w]; or, when nothing is drawn, [N,C,h,w].
    side: denoiser -> side of the latents that the pipeline draws by itself.
    patch: denoiser -> what the sides of latents must be multiples of.
    """

    denoiser: str
    lora_targets: tuple[str, ...]
    encode_prompts: Callable[[DiffusionPipeline, list[str]], Conditioning]
    describe: Callable[[PreferenceBatch, Conditioning], Conditioning]
    denoise: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    moments: Callable[[AutoencoderKL, Tensor], Tensor] = posterior
    side: Callable[[Any], int] = configured_side
    patch: Callable[[nn.Module], int] = configured_patch


def keep(batch: PreferenceBatch, conditioning: Conditioning) -> Conditioning:
    """Nothing about the picture itself."""
    return conditioning


# --- Stable Diffusion 1.x and 2.x -----------------------------------------------------------------------------------


def encode_sd(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    """prompt_embeds [N,L,D]."""
    return {"prompt_embeds": pipe.encode_prompt(prompts, pipe.device, 1, False)[0]}


def denoise_sd(unet: nn.Module, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """UNet with cross-attention."""
    return unet(x_t, t, encoder_hidden_states=c["prompt_embeds"], added_cond_kwargs=user_embeds(c), return_dict=False)[
        0
    ]


def user_embeds(c: Conditioning) -> dict[str, list[Tensor]]:
    """What a UNet's user adapter takes, if there is a user."""
    return {"image_embeds": [c["user"]]} if "user" in c else {}


# --- SDXL -----------------------------------------------------------------------------------------------------------


def encode_sdxl(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    """prompt_embeds [N,L,D], pooled [N,D']. The empty prompt is zeros where the pipeline's own guidance uses zeros."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        kept = torch.tensor([bool(p) for p in prompts], device=embeds.device)
        embeds, pooled = embeds * kept[:, None, None], pooled * kept[:, None]
    return {"prompt_embeds": embeds, "pooled": pooled}


def describe_sdxl(batch: PreferenceBatch, c: Conditioning) -> Conditioning:
    """time_ids [N,6]: each picture's own original size, crop corner, and the size trained at."""
    size = torch.tensor(batch.size).expand(len(batch.prompts), 2)
    time_ids = torch.cat([batch.original_size, batch.crop_top_left, size], dim=1)
    return c | {"time_ids": time_ids.to(c["pooled"])}


def denoise_sdxl(unet: nn.Module, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """UNet with two text encoders and size conditioning."""
    added = {"text_embeds": c["pooled"], "time_ids": c["time_ids"]} | user_embeds(c)
    return unet(x_t, t, encoder_hidden_states=c["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]


# --- Stable Diffusion 3 ---------------------------------------------------------------------------------------------


def encode_sd3(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    """prompt_embeds [N,L,D] (two CLIPs and T5, or zeros for an absent T5), pooled [N,D']."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, prompts, prompts, device=pipe.device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeds, "pooled": pooled}


def denoise_sd3(transformer: nn.Module, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """Flow transformer; predicts v = ε − x0."""
    user = {"ip_adapter_image_embeds": c["user"]} if "user" in c else None
    return transformer(
        x_t,
        encoder_hidden_states=c["prompt_embeds"],
        pooled_projections=c["pooled"],
        timestep=t,
        joint_attention_kwargs=user,
        return_dict=False,
    )[0]


# --- FLUX.1 ---------------------------------------------------------------------------------------------------------

FLUX_SIDE, FLUX_PATCH = 128, 2  # FluxPipeline's own; the transformer's configuration does not say
FLUX_GUIDANCE = 3.5  # what FluxPipeline draws with unless told, and the strength diffusers' own FLUX scripts train at


def encode_flux(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    """prompt_embeds [N,L,D] of T5, pooled [N,D'] of CLIP; guidance [N] where the transformer has distilled guidance,
    and so wants to be told its strength."""
    embeds, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device)
    conditioning = {"prompt_embeds": embeds, "pooled": pooled}
    if pipe.transformer.config.guidance_embeds:
        conditioning["guidance"] = torch.full([len(prompts)], FLUX_GUIDANCE, device=embeds.device)
    return conditioning


def denoise_flux(transformer: nn.Module, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """Flow transformer over 2x2 patches of latents; predicts v = ε − x0. It takes t as a share of 1000."""
    h, w = x_t.shape[-2] // FLUX_PATCH, x_t.shape[-1] // FLUX_PATCH
    user = {"ip_adapter_image_embeds": [c["user"]]} if "user" in c else None
    patches = transformer(
        pixel_unshuffle(x_t, FLUX_PATCH).flatten(2).transpose(1, 2),
        encoder_hidden_states=c["prompt_embeds"],
        pooled_projections=c["pooled"],
        timestep=t / 1000,
        guidance=c.get("guidance"),
        txt_ids=x_t.new_zeros(c["prompt_embeds"].shape[1], 3),
        img_ids=places(h, w).to(x_t),
        joint_attention_kwargs=user,
        return_dict=False,
    )[0]
    return pixel_shuffle(patches.transpose(1, 2).unflatten(2, (h, w)), FLUX_PATCH)


def places(h: int, w: int) -> Tensor:
    """(0, row, column) of each patch, [hw,3]."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w))


JOINT_TARGETS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("unet", ATTENTION, encode_sd, keep, denoise_sd),
    "StableDiffusionXLPipeline": Family("unet", ATTENTION, encode_sdxl, describe_sdxl, denoise_sdxl),
    "StableDiffusion3Pipeline": Family("transformer", JOINT_TARGETS, encode_sd3, keep, denoise_sd3),
    "FluxPipeline": Family(
        "transformer",
        JOINT_TARGETS,
        encode_flux,
        keep,
        denoise_flux,
        side=lambda transformer: FLUX_SIDE,
        patch=lambda transformer: FLUX_PATCH,
    ),
}


# --- loading --------------------------------------------------------------------------------------------------------


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline. Raises ValueError for a class that FAMILIES does not hold."""
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} is of no family known here; known pipelines: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def absent_components(path: str) -> dict[str, None]:
    """Components a local pipeline was saved without, such as SD3's T5; diffusers wants to be told so again."""
    index = Path(path) / "model_index.json"
    components = json.loads(index.read_text()) if index.is_file() else {}
    return {name: None for name, origin in components.items() if origin == [None, None]}


def load_pipeline(config: ModelConfig, **components: nn.Module) -> DiffusionPipeline:
    """Load a stock pipeline, safetensors only, around components that are there already. Raises ValueError, naming the
    path and the mend, when that is not one."""
    path = config.pretrained_model_name_or_path
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ValueError(
            f"model.pretrained_model_name_or_path: {path} is not a diffusers pipeline (no model_index.json in it);"
            " give a folder that pipe.save_pretrained() wrote, or a hub id"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path,
            **(absent_components(path) | components),
            revision=config.revision,
            variant=config.variant,
            dtype=getattr(torch, config.dtype),
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.pretrained_model_name_or_path: cannot load a pipeline from {path!r}: {error}"
        ) from error
    family_of(pipe)
    loaded = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and k not in components}
    refuse_no_numbers(loaded, path)
    align(loaded)
    if getattr(pipe, "safety_checker", None) is not None:
        if not components:
            print("leaving the safety checker out: pictures it blackens would count in before and after")
        pipe.safety_checker = None
    return pipe


def align(modules: dict[str, nn.Module]) -> None:
    """Put weights on the CPU into memory of torch's own. A file maps them to wherever they begin in it, and there
    products of matrices may round otherwise from one process to the next: a run would not repeat to the bit."""
    for tensor in (t for module in modules.values() for t in (*module.parameters(), *module.buffers())):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def refuse_no_numbers(modules: dict[str, nn.Module], path: str) -> None:
    """Raise ValueError for weights that are NaN or infinite: everything after them would be, too."""
    for part, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.isfinite().all():
                raise ValueError(
                    f"model.pretrained_model_name_or_path: {path} holds weights that are NaN or infinite"
                    f" ({part}: {name}); the file is damaged, or was made with an overflow: fetch or make it again"
                )
