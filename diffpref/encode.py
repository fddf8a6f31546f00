"""Images -> latents, prompts -> conditioning."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from diffpref.batch import Conditioning, Encoded, PreferenceBatch
from diffpref.families import family_of
from diffpref.noise import generator

POSTERIOR = 1  # which random stream of a group: keeps the VAE's draw apart from the diffusion noise


@contextmanager
def full_range(vae: AutoencoderKL) -> Iterator[AutoencoderKL]:
    """The VAE in fp32 where it says that fp16 overflows (SDXL's does), as the pipeline decodes; else as it is."""
    dtype = vae.dtype
    if dtype != torch.float16 or not vae.config.force_upcast:
        yield vae
        return
    vae.float()
    try:
        yield vae
    finally:
        vae.to(dtype)


class Encoder:
    """Encodes batches with a pipeline's own encoders. Prompts are remembered: they are few and come again every
    epoch."""

    def __init__(self, pipe: DiffusionPipeline, seed: int, remember: int = 256):
        self.pipe, self.family, self.seed, self.remember = pipe, family_of(pipe), seed, remember
        self.prompts: dict[str, Conditioning] = {}
        for module in (
            pipe.vae,
            *(getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")),
        ):
            if module is not None:
                module.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, batch: PreferenceBatch) -> Encoded:
        """Batch -> latents and conditioning on the pipeline's device."""
        conditioning = self.family.describe(batch, self.encode_prompts(batch.prompts))
        return Encoded(self.encode_images(batch), conditioning, batch.keys, batch.structure.to(self.pipe.device))

    def encode_images(self, batch: PreferenceBatch) -> Tensor:
        """latents [N,C,h,w] = (z − shift)·scale, z drawn from the VAE's posterior; fp32."""
        with full_range(self.pipe.vae) as vae:
            posterior = vae.encode(batch.images.to(vae.device, vae.dtype)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
        draws = [torch.randn(mean.shape[1:], generator=g) for g in self.posterior_generators(batch)]
        z = mean + std * torch.stack(draws).to(mean.device)
        return (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def posterior_generators(self, batch: PreferenceBatch) -> list[torch.Generator]:
        """One generator for each item in turn; the items of a group share theirs, drawing one after the other."""
        streams = [generator(self.seed, key, POSTERIOR) for key in batch.keys]
        return [streams[g] for g in batch.structure.group.tolist()]

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning [N,...] of N prompts, each different one encoded once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self.prompts]
        if missing:
            encoded = self.family.encode_prompts(self.pipe, missing)
            self.prompts |= {p: {k: v[i].clone() for k, v in encoded.items()} for i, p in enumerate(missing)}
        found = [self.prompts[p] for p in prompts]
        for stale in list(self.prompts)[: -self.remember]:
            del self.prompts[stale]
        return {key: torch.stack([c[key] for c in found]) for key in found[0]}
