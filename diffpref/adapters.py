"""LoRA in and out, in the format that stock diffusers pipelines load."""

import re
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from diffpref.config import LoraSettings
from diffpref.engines import full
from diffpref.families import Family, family_of
from diffpref.users.adapter import user_modules
from diffpref.users.files import LORA

ADAPTER = "default"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)")

# The fields of LoraConfig that change what the weights mean. A full dump would break on every peft that lacks one
# of its keys.
METADATA_KEYS = (
    "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias",
)  # fmt: skip


def add_lora(denoiser: nn.Module, family: Family, settings: LoraSettings, seed: int) -> None:
    """Freeze the denoiser and give it a LoRA in fp32 that starts as the identity; a user adapter that is there already
    gets none. Raises ValueError for targets it lacks."""
    denoiser.requires_grad_(False)
    targets, names = settings.target_modules or list(family.lora_targets), [n for n, _ in denoiser.named_modules()]
    for target in targets:
        if not any(ends_in(name, [target]) for name in names):
            raise ValueError(f"lora.target_modules: no module of the {family.denoiser} is named {target!r}")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        target_modules=targets,
        exclude_modules=[name for name in user_modules(denoiser) if ends_in(name, targets)] or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_dropout=settings.dropout,
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params([denoiser], dtype=torch.float32)


def ends_in(name: str, targets: list[str]) -> bool:
    """Whether peft takes a module of this name for one of the targets."""
    return any(name == target or name.endswith("." + target) for target in targets)


def load_base_lora(pipe: DiffusionPipeline, path: str | None) -> None:
    """A LoRA that belongs to the base. Raises ValueError for a file or folder that holds none."""
    if path is None:
        return
    file = lora_file(path)
    if not Path(file).exists() and not HUB_ID.fullmatch(file):
        raise ValueError(f"model.lora: there is nothing at {path}, and a hub id it is not")
    try:
        pipe.load_lora_weights(file, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model.lora: cannot load a LoRA from {path!r}: {error}") from error


def copy_base_lora(path: str, folder: Path) -> None:
    """The same LoRA beside what was trained on it: the two belong together."""
    if Path(lora_file(path)).is_file():
        shutil.copyfile(lora_file(path), folder / LORA)


def lora_file(path: str) -> str:
    """What diffusers wants to be given: a run's folder holds more than its LoRA."""
    inside = Path(path) / LORA
    return str(inside) if inside.is_file() else path


def lora_state_dict(denoiser: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights in fp32 under lora_A/lora_B, which stock diffusers takes for any module.

    diffusers' older lora.down/lora.up has no names for convolutions: half-converted files load with those left out.
    """
    return {k: full(v).float() for k, v in get_peft_model_state_dict(denoiser).items()}


def lora_metadata(denoiser: nn.Module) -> dict:
    """The scale's ingredients; without them a file with alpha ≠ rank or rsLoRA loads with the wrong scale."""
    config = denoiser.peft_config[ADAPTER].to_dict()
    return {key: sorted(v) if isinstance(v := config[key], set) else v for key in METADATA_KEYS}


def save_lora(pipe: DiffusionPipeline, denoiser: nn.Module, folder: Path, main: bool = True) -> Path:
    """Write `pytorch_lora_weights.safetensors`, which `load_lora_weights` of any stock pipeline of the family takes.

    Where the denoiser is sharded every process must call it; only the `main` one writes.
    """
    prefix = family_of(pipe).denoiser
    layers = {f"{prefix}_lora_layers": lora_state_dict(denoiser)}
    metadata = {f"{prefix}_lora_adapter_metadata": lora_metadata(denoiser)}
    if main:
        type(pipe).save_lora_weights(save_directory=folder, safe_serialization=True, **layers, **metadata)
    return folder / LORA


def save_pipeline(pipe: DiffusionPipeline, folder: Path, main: bool = True) -> None:
    """Write the whole pipeline. Where it is sharded every process must call this; only the `main` one writes."""
    name = family_of(pipe).denoiser
    denoiser = getattr(pipe, name)
    weights = {key: full(value) for key, value in denoiser.state_dict().items()}
    if main:
        whole = getattr(diffusers, denoiser.config["_class_name"]).from_config(denoiser.config)
        whole.load_state_dict(weights)
        pipe.register_modules(**{name: whole})
        try:
            pipe.save_pretrained(folder, safe_serialization=True)
        finally:
            pipe.register_modules(**{name: denoiser})
