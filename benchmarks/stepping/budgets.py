"""Memory of a training step by model and setting: its parts, how it grows with the pairs, and what fits a card."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffpref.adapters import add_lora
from diffpref.config import LoraSettings
from diffpref.errors import item_errors
from diffpref.families import FAMILIES, Family
from diffpref.predict import Models, adapter_off
from diffpref.speed.casting import compute_in_input_dtype
from stepping.architectures import Architecture, inputs, make_denoiser, make_text_encoder, make_vae
from stepping.live import Live

FAMILY = {
    "sd15": FAMILIES["StableDiffusionPipeline"],
    "sdxl": FAMILIES["StableDiffusionXLPipeline"],
    "sd3": FAMILIES["StableDiffusion3Pipeline"],
    "flux": FAMILIES["FluxPipeline"],
}
GB = 1e9
CARDS = (8, 12, 16, 24, 48, 80)  # GB
CONTEXT = 1.0  # GB that the driver, the libraries and the allocator's gaps take, a guess
OPTIMIZERS = {"adamw": 8, "adamw_8bit": 2}  # bytes of state for each weight that trains


@dataclass(frozen=True)
class Setting:
    """dtype: of the base.  cast: LoRA computed in it, not in fp32.  checkpointing: activations computed twice."""

    dtype: str = "bfloat16"
    cast: bool = True
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """In tables."""
        lora = "" if self.dtype == "float32" else ", LoRA in bf16" if self.cast else ", LoRA in fp32"
        return f"{self.dtype}{lora}{', checkpointing' * self.checkpointing}"


SETTINGS = (
    Setting(),
    Setting(checkpointing=True),
    Setting(cast=False),
    Setting("float32", cast=False),
)


@dataclass(frozen=True)
class Parts:
    """Bytes. denoiser: its frozen weights.  lora, optimizer: what trains, its states.  vae, texts: encoders, where they
    are not cached.  pair: the most that one pair's activations, gradients and passing tensors take at one moment; of
    two pairs it is twice as much, but for the gradients of the LoRA."""

    denoiser: int
    lora: int
    optimizer: int
    vae: int
    texts: int
    pair: int

    def fixed(self, situation: "Situation") -> int:
        """All but what grows with the pairs."""
        states = self.optimizer * OPTIMIZERS[situation.optimizer] // OPTIMIZERS["adamw"]
        models = self.denoiser * (1 + situation.frozen_copy) + situation.encoders * (self.vae + self.texts)
        return models + self.lora + states

    def pairs(self, card: float, situation: "Situation") -> int:
        """So many pairs fit a card of so many GB."""
        return max(0, int(((card - CONTEXT) * GB - self.fixed(situation)) // self.pair))


@dataclass(frozen=True)
class Situation:
    """What else is in memory. encoders: those of pictures and text, which a cache lets go.  frozen_copy: a second
    denoiser as reference."""

    encoders: bool = False
    frozen_copy: bool = False
    optimizer: str = "adamw"


SITUATIONS = {
    "cached": Situation(),
    "cached, 8-bit AdamW": Situation(optimizer="adamw_8bit"),
    "encoders kept": Situation(encoders=True),
    "cached, frozen copy as reference": Situation(frozen_copy=True),
}


# --- a step -----------------------------------------------------------------------------------------------------------


def with_lora(architecture: Architecture, family: Family, setting: Setting, rank: int) -> nn.Module:
    """The denoiser, ready to train, on the current default device."""
    with default_dtype(getattr(torch, setting.dtype)):
        denoiser = make_denoiser(architecture)
    add_lora(denoiser, family, LoraSettings(rank=rank), seed=0)
    if setting.cast:
        compute_in_input_dtype(denoiser)
    if setting.checkpointing:
        denoiser.enable_gradient_checkpointing()
    return denoiser.train()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this type, inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def step(models: Models, architecture: Architecture, pairs: int, device: str) -> Callable[[], None]:
    """Reference, policy, errors, loss, backward pass, as the learner has them, on zeros that are there already."""
    items, side = 2 * pairs, architecture.latent_side
    with torch.device(device):
        x = torch.zeros(items, architecture.channels, side, side)
        t, weight = torch.zeros(items, dtype=torch.long), torch.ones(items)
        conditioning = inputs(architecture, items, models.dtype)

    def run() -> None:
        base = models.reference(x, t, conditioning)
        errors = item_errors(models.policy(x, t, conditioning), base, x, weight)
        winners, losers = errors.advantage.chunk(2)
        (-torch.nn.functional.logsigmoid(winners - losers)).mean().backward()

    return run


def make_models(denoiser: nn.Module, family: Family, setting: Setting, device: str) -> Models:
    """Policy and reference in one."""
    dtype = getattr(torch, setting.dtype)
    half: Callable[[], AbstractContextManager] = partial(torch.autocast, device, dtype)
    return Models(family, denoiser, adapter_off(denoiser), dtype, nullcontext if setting.dtype == "float32" else half)


# --- computed ---------------------------------------------------------------------------------------------------------


def computed(name: str, architecture: Architecture, setting: Setting, rank: int = 8) -> Parts:
    """Of a published configuration, without its weights or a GPU."""
    with torch.device("meta"):
        denoiser = with_lora(architecture, FAMILY[name], setting, rank)
        encoders = encoder_bytes(architecture, setting)
    with FakeTensorMode():  # not meta tensors, on which attention would be that of no real device
        imagine(denoiser)
        models = make_models(denoiser, FAMILY[name], setting, "cpu")
        pair = peak(denoiser, step(models, architecture, 1, "cpu"))
        weights = trained_and_frozen(denoiser)
    states = OPTIMIZERS["adamw"] * weights["lora"] // 4
    return Parts(**weights, **encoders, optimizer=states, pair=pair)


def imagine(module: nn.Module) -> None:
    """Give a module parameters and buffers that say they are on the CPU, and take no memory."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def peak(denoiser: nn.Module, run: Callable[[], None]) -> int:
    """Bytes of one step beyond what is there before it, gradients included."""
    with Live([*denoiser.parameters(), *denoiser.buffers()]) as live:
        run()
    denoiser.zero_grad(set_to_none=True)
    return live.peak


def trained_and_frozen(denoiser: nn.Module) -> dict[str, int]:
    """Bytes of the weights."""
    sizes = {"lora": 0, "denoiser": 0}
    for parameter in denoiser.parameters():
        sizes["lora" if parameter.requires_grad else "denoiser"] += parameter.numel() * parameter.element_size()
    return sizes


def encoder_bytes(architecture: Architecture, setting: Setting) -> dict[str, int]:
    """Bytes of the encoders' weights."""
    with default_dtype(getattr(torch, setting.dtype)):
        texts = [make_text_encoder(*text) for text in architecture.texts]
        return {"vae": size(make_vae(architecture)), "texts": sum(size(text) for text in texts)}


def size(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


# --- measured ---------------------------------------------------------------------------------------------------------


def measured(name: str, architecture: Architecture, setting: Setting, batches: list[int], rank: int = 8) -> dict:
    """Peak bytes of the GPU's allocator at each batch, up to the first one that does not fit (None)."""
    with torch.device("cuda"):
        denoiser = with_lora(architecture, FAMILY[name], setting, rank)
    models = make_models(denoiser, FAMILY[name], setting, "cuda")
    found: dict[int, int | None] = {}
    for pairs in batches:
        found[pairs] = peak_on_gpu(denoiser, models, architecture, pairs)
        if found[pairs] is None:
            break
    return found


def peak_on_gpu(denoiser: nn.Module, models: Models, architecture: Architecture, pairs: int) -> int | None:
    """Of two steps: the first one's workspaces and caches stay. None where it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            step(models, architecture, pairs, "cuda")()
            denoiser.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def row(parts: Parts) -> dict[str, Any]:
    """For the report."""
    fits = {name: {f"{card} GB": parts.pairs(card, s) for card in CARDS} for name, s in SITUATIONS.items()}
    return {"bytes": asdict(parts), "pairs_that_fit": fits}
