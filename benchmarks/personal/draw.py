"""Pictures of the experiment, drawn once and kept: a command that was killed goes on with what is missing."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffpref.config import ModelConfig
from diffpref.emoji_world.classifier import concept_recognition
from diffpref.emoji_world.users import attributes
from diffpref.families import load_pipeline
from diffpref.sample import sample
from diffpref.users import UserEmbedding, load_user_adapter

LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class How:
    """Of drawing. steps, guidance: as configs/quickstart.yaml.  bf16: the denoiser in bfloat16, of all models."""

    steps: int = 16
    guidance: float = 1.5
    batch: int = 36
    bf16: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Of `diffpref.sample.sample`."""
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "batch_size": self.batch}


@dataclass(frozen=True)
class Drawn:
    """N pictures: pixels [N,H,W,3] uint8, what users see in them [N,K], and whether the prompt's concept is recognised,
    [N]."""

    pixels: np.ndarray
    seen: np.ndarray
    recognised: np.ndarray

    def images(self) -> list[Image.Image]:
        return [Image.fromarray(one) for one in self.pixels]


class Model:
    """A pipeline with a run's LoRA, if it has one, and with its user adapter, if it has one; scale: of that."""

    def __init__(self, base: Path, run: Path | None, how: How, scale: float = 1.0) -> None:
        self.base, self.run, self.how, self.scale = base, run, how, scale

    @property
    def weights(self) -> list[Path]:
        """Files that make it what it is."""
        files = [] if self.run is None else [self.run / LORA, self.run / "user_adapter.safetensors"]
        return [self.base / "unet" / "diffusion_pytorch_model.safetensors", *(f for f in files if f.exists())]

    @cached_property
    def name(self) -> str:
        """Of the weights and the way of drawing."""
        about = ["LoRAs fused", *(hashlib.sha256(file.read_bytes()).hexdigest() for file in self.weights)]
        about += [str(self.scale)] * (self.scale != 1)
        return hashlib.sha256(json.dumps([about, asdict(self.how)]).encode()).hexdigest()[:12]

    @cached_property
    def pipe(self) -> Any:
        """Loaded when the first picture is wanted."""
        pipe = load_pipeline(ModelConfig(str(self.base)))
        if self.how.bf16:
            narrow(pipe.unet)
        if self.run is not None and (self.run / LORA).exists():
            pipe.load_lora_weights(str(self.run), weight_name=LORA)
            pipe.fuse_lora()  # a third faster
            pipe.unload_lora_weights()
        personal = self.run is not None and (self.run / "user_adapter.safetensors").exists()
        return load_user_adapter(pipe, self.run) if personal else pipe

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], user: UserEmbedding | None) -> list[Image.Image]:
        """Pictures for one user, or for nobody."""
        bound = self.pipe.bound(user, self.scale) if hasattr(self.pipe, "bound") else self.pipe
        return sample(bound, list(prompts), list(seeds), **self.how.options)


def narrow(denoiser: torch.nn.Module) -> None:
    """Run it in bfloat16, its weights as they are."""
    forward = denoiser.forward

    def narrowed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    denoiser.forward = narrowed


class Studio:
    """Models, and the folder in which their pictures lie: <folder>/<model>/<what>-<of whom and what>.npz"""

    def __init__(self, folder: Path, models: dict[str, Model]) -> None:
        self.folder, self.models = folder, models

    def pictures(
        self, model: str, what: str, prompts: Sequence[str], seeds: Sequence[int], user: UserEmbedding | None = None
    ) -> Drawn:
        """Pictures for one user or for nobody."""
        return self.kept(model, what, prompts, seeds, user, lambda: self.models[model].draw(prompts, seeds, user))

    def kept(
        self,
        model: str,
        what: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        user: UserEmbedding | None,
        draw: Callable[[], list[Image.Image]],
    ) -> Drawn:
        """Pictures under a name and for whom and what they are, drawn if they are not there."""
        whose = None if user is None else user.states.tolist()
        about = hashlib.sha256(json.dumps([list(prompts), list(seeds), whose]).encode()).hexdigest()[:12]
        path = self.folder / f"{model}-{self.models[model].name}" / f"{what}-{about}.npz"
        if not path.exists():
            keep(path, draw(), prompts)
        with np.load(path) as stored:
            return Drawn(stored["pixels"], stored["seen"], stored["recognised"])


def keep(path: Path, images: list[Image.Image], prompts: Sequence[str]) -> None:
    """Write a shard, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recognised = concept_recognition(images, list(prompts))
    beside = path.with_suffix(".writing.npz")
    pixels = np.stack([np.asarray(image) for image in images])
    np.savez_compressed(beside, pixels=pixels, seen=attributes(images), recognised=recognised)
    beside.rename(path)
