"""Pictures with paired seeds: what is compared differs only in the weights.

Each picture has its own CPU generator: it depends on its prompt, its seed and the weights; not, but for float
rounding, on the batch or the device it was made in.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import nn
from tqdm.auto import tqdm


def sample(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    progress: str | None = None,
) -> list[Image]:
    """One picture for each (prompts[i], seeds[i]), in order.

    Args:
        pipe: Any text-to-image pipeline. It is left as it was found: training modes, scheduler, progress bar.
        prompts: N prompts.
        seeds: N seeds of the initial noise (and of the scheduler's own, where it draws any).
        batch_size: Pictures made at once; of no influence on them.
        height, width: In pixels; the pipeline's own size when not given.
        progress: Label of a progress bar; none when not given.

    Raises:
        ValueError: prompts and seeds of different lengths, or batch_size < 1.
        FloatingPointError: the model made NaN or infinite pixels.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"one seed for each prompt is needed, got {len(prompts)} prompts and {len(seeds)} seeds")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = {key: value for key, value in (("height", height), ("width", width)) if value is not None}
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **size}
    images: list[Image] = []
    with sampling(pipe), tqdm(total=len(prompts), desc=progress, disable=progress is None, unit="image") as bar:
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            images += sample_batch(pipe, prompts[chunk], seeds[chunk], options)
            bar.update(len(images) - start)
    return images


def sample_batch(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], options: dict) -> list[Image]:
    """One call of the pipeline."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with autocast(pipe):
        pixels = pipe(prompts, generator=generators, output_type="np", **options).images  # [N,H,W,3] in [0,1]
    if not np.isfinite(pixels).all():
        raise FloatingPointError(
            "sampling made NaN or infinite pixels: either the weights have diverged (lower the learning rate),"
            " or the pipeline's dtype is too narrow for it (float16: use bfloat16 or float32)"
        )
    return pipe.numpy_to_pil(pixels)


@contextmanager
def sampling(pipe: DiffusionPipeline) -> Iterator[None]:
    """Every module in eval mode, a scheduler of its own, and no inner progress bar; all put back at the end."""
    modules = [m for part in pipe.components.values() if isinstance(part, nn.Module) for m in part.modules()]
    training = [m.training for m in modules]
    scheduler, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    try:
        for module in modules:
            module.training = False
        pipe.scheduler = copy.deepcopy(scheduler)  # sampling rewrites its timesteps, which training may be reading
        pipe.set_progress_bar_config(disable=True)
        with decoding_outside_autocast(pipe):
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(**bar)


@contextmanager
def decoding_outside_autocast(pipe: DiffusionPipeline) -> Iterator[None]:
    """A VAE that overflows in fp16 is decoded in fp32 by its pipeline; an autocast around it would undo that."""
    vae = pipe.vae
    if vae.dtype != torch.float16 or not vae.config.force_upcast:
        yield
        return
    decode = vae.decode

    def decode_as_it_is(z: torch.Tensor, *args, **kwargs):
        with torch.autocast(z.device.type, enabled=False):
            return decode(z.to(vae.dtype), *args, **kwargs)

    vae.decode = decode_as_it_is
    try:
        yield
    finally:
        del vae.decode  # the class's own again


def autocast(pipe: DiffusionPipeline) -> torch.autocast:
    """On where parts differ in dtype, as when fp32 masters of a denoiser are trained beside a bf16 text encoder."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    dtypes = {p.dtype for part in parts for p in part.parameters()} & {torch.float32, torch.bfloat16, torch.float16}
    narrow = torch.float16 if torch.float16 in dtypes else torch.bfloat16
    return torch.autocast(pipe.device.type, dtype=narrow, enabled=len(dtypes) > 1)
