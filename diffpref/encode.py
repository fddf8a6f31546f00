"""Images -> latents, prompts -> conditioning."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffpref.batch import USERS, Conditioning, Encoded, PreferenceBatch
from diffpref.families import family_of
from diffpref.noise import generator

POSTERIOR = 1  # which random stream of a group: keeps the VAE's draw apart from the diffusion noise
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def present(pipe: DiffusionPipeline, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The components of these names that a pipeline has."""
    found = {name: getattr(pipe, name, None) for name in names}
    return {name: module for name, module in found.items() if module is not None}


def freeze(pipe: DiffusionPipeline) -> None:
    """No gradients, no dropout in the encoders. Torch may also round otherwise where weights want gradients."""
    for module in present(pipe, ("vae", *TEXT_ENCODERS)).values():
        module.requires_grad_(False).eval()


@contextmanager
def full_range(vae: AutoencoderKL) -> Iterator[AutoencoderKL]:
    """The VAE in fp32 where it says that fp16 overflows (SDXL's does), as the pipeline decodes; else as it is."""
    dtype = vae.dtype
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield vae
        return
    vae.float()
    try:
        yield vae
    finally:
        vae.to(dtype)


@torch.no_grad()
def encode_moments(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """images [N,3,H,W] in [-1,1] -> what latents are drawn from, [N,C',h,w] in the dtype that the VAE computes in."""
    with full_range(pipe.vae) as vae:
        return family_of(pipe).moments(vae, images.to(vae.device, vae.dtype, non_blocking=True)).contiguous()


def release_encoders(pipe: DiffusionPipeline, latents: bool = True, text: bool = True) -> None:
    """Take the VAE (`latents`) and the text encoders (`text`) out of a pipeline, and give their memory back.

    Tokenizers stay. An Encoder of the pipeline then takes only batches that hold moments and conditioning.
    """
    for name in present(pipe, ("vae",) * latents + TEXT_ENCODERS * text):
        setattr(pipe, name, None)
    gc.collect()  # modules stand in reference cycles
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed for itself, unless told
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Encoder:
    """Encodes batches with a pipeline's own encoders, or takes what a cache has of them. Prompts are remembered: they
    are few and come again every epoch.

    With `features`, the structure of what it gives has features [N,D], what the text encoders make of each prompt.
    """

    def __init__(self, pipe: DiffusionPipeline, seed: int, remember: int = 256, features: bool = False):
        self.pipe, self.family, self.seed, self.remember = pipe, family_of(pipe), seed, remember
        self.features = features
        # Kept here, for the encoders may leave the pipeline.
        self.device, self.channels = pipe.device, pipe.vae.config.latent_channels
        self.scale, self.shift = pipe.vae.config.scaling_factor, getattr(pipe.vae.config, "shift_factor", None) or 0.0
        self.prompts: dict[str, Conditioning] = {}
        freeze(pipe)

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Encoded:
        """Batch -> latents and conditioning on the pipeline's device."""
        conditioning = batch.conditioning or self.encode_prompts(batch.prompts)
        conditioning = {key: value.to(self.device, non_blocking=True) for key, value in conditioning.items()}
        structure = batch.structure.to(self.device)
        if self.features:
            structure = replace(structure, features=prompt_features(conditioning))
        return Encoded(
            self.encode_images(batch)[batch.picture.to(self.device, non_blocking=True)],
            self.family.describe(batch, conditioning) | self.users(batch),
            batch.keys,
            structure,
        )

    def users(self, batch: PreferenceBatch) -> Conditioning:
        """What is known of the user of each item, under names of its own."""
        group, known = batch.structure.group.to(self.device, non_blocking=True), batch.users or {}
        return {USERS + name: value.to(self.device, non_blocking=True)[group] for name, value in known.items()}

    def encode_images(self, batch: PreferenceBatch) -> Tensor:
        """latents [M,C,h,w] = (z − shift)·scale, z drawn from the VAE's posterior; fp32. Items of one picture have one
        draw."""
        moments = (
            encode_moments(self.pipe, batch.images)
            if batch.moments is None
            else batch.moments.to(self.device, non_blocking=True)
        )
        return (self.draw(moments.float(), batch) - self.shift) * self.scale

    def draw(self, moments: Tensor, batch: PreferenceBatch) -> Tensor:
        """z [M,C,h,w] = mean + std·ε; of a VAE that draws nothing, the moments are z."""
        if moments.shape[1] == self.channels:
            return moments
        mean, std = moments.chunk(2, dim=1)
        draws = [torch.randn(mean.shape[1:], generator=g) for g in self.posterior_generators(batch)]
        return mean + std * torch.stack(draws).to(mean.device, non_blocking=True)

    def posterior_generators(self, batch: PreferenceBatch) -> list[torch.Generator]:
        """One generator for each picture in turn; the pictures of a group share theirs, drawing one after the other."""
        streams = [generator(self.seed, key, POSTERIOR) for key in batch.keys]
        group_of = dict(zip(batch.picture.tolist(), batch.structure.group.tolist(), strict=True))
        return [streams[group_of[picture]] for picture in sorted(group_of)]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning [N,...] of N prompts, each different one encoded once, and by itself: in a batch, its last
        digits would depend on its neighbours, and so on where a run was resumed."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.prompts:
                encoded = self.family.encode_prompts(self.pipe, [prompt])
                self.prompts[prompt] = {key: value[0].clone() for key, value in encoded.items()}
        found = [self.prompts[p] for p in prompts]
        for stale in list(self.prompts)[: -self.remember]:
            del self.prompts[stale]
        return {key: torch.stack([c[key] for c in found]) for key in found[0]}


def prompt_features(conditioning: Conditioning) -> Tensor:
    """A unit vector for each prompt, [N,D], fp32: what the family pools of it, else the mean over its tokens."""
    pooled = conditioning.get("pooled")
    return normalize(conditioning["prompt_embeds"].float().mean(dim=1) if pooled is None else pooled.float(), dim=1)
