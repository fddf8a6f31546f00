"""The base pipelines of a run: one set of weights in memory for each precision, however many variants train on it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from worlds import EMOJI, World, prompts, save_pairs

from diffpref import trainer
from diffpref.config import ModelConfig
from diffpref.emoji_world.architecture import make_tokenizer
from diffpref.encode import TEXT_ENCODERS, present
from diffpref.families import family_of, load_pipeline
from stepping.architectures import ARCHITECTURES, LENGTH, TINY, Architecture, make_denoiser, make_text_encoder, make_vae

PARTS = ("vae", "unet", *TEXT_ENCODERS)


@dataclass
class Bases:
    """A pipeline in fp32, and casts of it that are made when asked for.

    what: In words.  pairs: File of preferences.  resolution: Side of the training pictures.  tflop: Of a picture, as
    predicted.
    """

    pipe: DiffusionPipeline
    what: str
    pairs: Path
    resolution: int
    tflop: float | None = None
    casts: dict[torch.dtype, DiffusionPipeline] = field(default_factory=dict)

    def at(self, dtype: torch.dtype) -> DiffusionPipeline:
        """A pipeline of its own whose weights share the memory of all others of this precision."""
        if dtype not in self.casts:
            self.casts[dtype] = self.pipe if dtype == torch.float32 else in_precision(self.pipe, dtype)
        return twin(self.casts[dtype])


def in_precision(pipe: DiffusionPipeline, dtype: torch.dtype) -> DiffusionPipeline:
    """A copy in another precision."""
    other = copy.copy(pipe)
    for name, module in present(pipe, PARTS).items():
        setattr(other, name, copy.deepcopy(module).to(dtype))
    return other


def twin(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline with modules of its own, whose parameters lie where the first one's lie until they are moved or
    cast. Of the encoders nothing is changed by training, so they are the same modules."""
    other, name = copy.copy(pipe), family_of(pipe).denoiser
    setattr(other, name, sharing(getattr(pipe, name)))
    return other


def sharing(module: nn.Module) -> nn.Module:
    """A deep copy with new parameters over the same memory."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, memo)


@contextmanager
def given(pipe: DiffusionPipeline) -> Iterator[None]:
    """Inside, a Trainer takes this pipeline and loads none: random weights of this size need not go over a disk."""
    with patch.object(trainer, "load_pipeline", lambda *_, **__: pipe):
        yield


# --- by name ----------------------------------------------------------------------------------------------------------


def make_bases(model: str, size: str, folder: Path, pairs: int, device: torch.device) -> Bases:
    """The bundled pipeline, or a stock one with random weights made on the device, and preferences to train on."""
    if model == "emoji":
        pipe = load_pipeline(ModelConfig(str(EMOJI / "pipeline"))).to(device)
        return Bases(pipe, "the bundled emoji pipeline", EMOJI / "preferences" / "pairs.parquet", 32)
    architecture = (TINY if size == "tiny" else ARCHITECTURES)[model]
    file = folder / f"{model}.parquet"
    save_pairs(World(model, "", pairs, *(0,) * 6, side=architecture.side), file)
    what = f"{model}'s published configuration" if size == "full" else f"{model}'s classes made small"
    pipe = make_pipeline(architecture, pairs, device)
    return Bases(pipe, f"{what}, random weights", file, architecture.side, architecture.limit)


def make_pipeline(architecture: Architecture, pairs: int, device: torch.device) -> DiffusionPipeline:
    """A stock Stable Diffusion or SDXL pipeline out of configurations."""
    torch.manual_seed(0)
    names = [f"tokenizer{end}" for end in ("", "_2")[: len(architecture.texts)]]
    tokenizers = {name: make_tokenizer(prompts(pairs), LENGTH) for name in names}
    ids = tokenizers["tokenizer"]
    ends = {f"{kind}_token_id": getattr(ids, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    with device:
        encoders = [make_text_encoder(*text, **ends) for text in architecture.texts]
        parts = {"vae": make_vae(architecture), "unet": make_denoiser(architecture).eval()}
    parts |= dict(zip(TEXT_ENCODERS, encoders, strict=False)) | tokenizers | {"scheduler": make_scheduler()}
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    extras = {"safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(**parts, **extras, requires_safety_checker=False)


def make_scheduler() -> DDIMScheduler:
    """The schedule of the Stable Diffusion checkpoints."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
