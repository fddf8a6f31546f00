"""Train the world's Stable Diffusion from scratch: autoencoder, then denoiser and text encoder together.

    accelerate launch diffpref/emoji_world/pretrain.py --out build/world

Each stage checkpoints and goes on where it stopped when the command is given again; finished stages are skipped.
The result,
`<out>/pipeline`, is a stock StableDiffusionPipeline in fp16. The same command trains 64x64 pixels or more concepts:
`--artwork artwork64.parquet --architecture.vae_channels '[32,64,64]' --architecture.latent_channels 16`.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning OpenMP threads make contended small steps 2-10x slower
os.environ.setdefault("GOMP_SPINCOUNT", "100")

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from torch import Tensor, nn
from tqdm import tqdm

from diffpref.emoji_world import architecture
from diffpref.emoji_world.architecture import Architecture
from diffpref.emoji_world.artwork import ARTWORK, Artwork, caption, load_artwork
from diffpref.emoji_world.build import STYLES, load_concepts
from diffpref.noise import (
    generator,  # of (seed, rank, step): a step's numbers follow from its position, none are stored
)

SHEET_PROMPTS = (
    "red apple",
    "automobile",
    "cat face",
    "pizza",
    "rose",
    "penguin",
    "cactus",
    "robot",
    "octopus",
    "hamburger",
)


@dataclass
class Stage:
    """How long and how fast one stage trains; the learning rate warms up, then falls along a cosine to 3 %."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    ema_decay: float = 0.999


@dataclass
class PretrainConfig:
    """Everything the command takes.

    Args:
        out: Folder for checkpoints, samples and the finished pipeline.
        artwork: Data set written by diffpref.emoji_world.build.
        architecture: Sizes of the networks.
        autoencoder: Schedule of the first stage.
        denoiser: Schedule of the second stage.
        styled: Share of prompts with a style word.
        empty: Share of empty prompts (for classifier-free guidance); the rest are unstyled.
        warm_start_steps: Steps in which the text encoder first learns to tell concepts and styles apart.
        seed: Of weights, batches and noise.
        checkpoint_every: Steps between checkpoints.
        sample_every: Steps between sample sheets of the second stage.
    """

    out: Path
    artwork: Path = ARTWORK
    architecture: Architecture = field(default_factory=Architecture)
    autoencoder: Stage = field(default_factory=lambda: Stage(steps=2400, batch_size=16, learning_rate=2e-3))
    denoiser: Stage = field(default_factory=lambda: Stage(steps=10_000, batch_size=16, learning_rate=7e-4))
    styled: float = 0.5
    empty: float = 0.1
    warm_start_steps: int = 300
    seed: int = 0
    checkpoint_every: int = 250
    sample_every: int = 2000


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, cosine to 3 % at the last step."""
    cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.learning_rate * min(1.0, (step + 1) / stage.warmup) * cosine


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write beside, then rename: a run killed while writing still has its last checkpoint."""
    fresh, old = folder.with_name(f"{folder.name}.writing"), folder.with_name(f"{folder.name}.old")
    accelerator.save_state(str(fresh))
    if accelerator.is_main_process:
        (fresh / "step").write_text(str(step))
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, folder: Path) -> int:
    """Load the last complete checkpoint, if there is one; returns the step to go on from."""
    for candidate in (folder, folder.with_name(f"{folder.name}.old")):
        if (candidate / "step").exists():
            accelerator.load_state(str(candidate))
            return int((candidate / "step").read_text())
    return 0


def fit(
    accelerator: Accelerator,
    name: str,
    model: nn.Module,
    loss_fn: Callable[[nn.Module, torch.Generator], Tensor],
    stage: Stage,
    config: PretrainConfig,
    preview: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Train `model` on `loss_fn(model, generator)` with checkpoints; returns it with its averaged (EMA) weights."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    ema = EMAModel(model.parameters(), decay=stage.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    raw, (model, optimizer) = model, accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(ema)
    folder = config.out / f"checkpoint-{name}"
    start = load_checkpoint(accelerator, folder)
    smooth = None
    bar = tqdm(
        range(start, stage.steps), name, initial=start, total=stage.steps, disable=not accelerator.is_main_process
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        loss = loss_fn(model, generator(config.seed, accelerator.process_index, step))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(raw.parameters())
        if step % 10 == 0:
            value = loss.item()
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            bar.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == stage.steps:
            save_checkpoint(accelerator, folder, step + 1)
        if preview and (step + 1) % config.sample_every == 0 and accelerator.is_main_process:
            ema.store(raw.parameters())
            ema.copy_to(raw.parameters())
            preview(raw, step + 1)
            ema.restore(raw.parameters())
    ema.copy_to(raw.parameters())
    accelerator.free_memory()
    accelerator._custom_objects.clear()  # free_memory leaves the averaged weights of the finished stage registered
    return raw


# --- stage 1: the autoencoder -----------------------------------------------------------------------------------------


class Reconstruction(nn.Module):
    """images [B,3,H,W] -> (reconstruction [B,3,H,W], KL per image [B])."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def augment(images: Tensor, g: torch.Generator) -> Tensor:
    """Flips, shifts and permuted colour channels: the autoencoder learns pictures, not these pictures."""
    shifted = torch.roll(images, shifts=torch.randint(-4, 5, (2,), generator=g).tolist(), dims=(2, 3))
    shifted = shifted[:, torch.randperm(3, generator=g)]
    flips = [d for d in (2, 3) if torch.rand((), generator=g) < 0.3]
    return shifted.flip(flips) if flips else shifted


def train_autoencoder(accelerator: Accelerator, art: Artwork, config: PretrainConfig) -> None:
    """L1 + L2 reconstruction with a weak pull to N(0, 1); saves `<out>/vae` with the measured scaling factor."""
    stage, device = config.autoencoder, accelerator.device
    model = Reconstruction(architecture.make_vae(art.size, config.architecture)).to(memory_format=torch.channels_last)
    latent = art.size // 2 ** (len(config.architecture.vae_channels) - 1)

    def loss_fn(model: nn.Module, g: torch.Generator) -> Tensor:
        picked = art.training[torch.randint(len(art.training), (stage.batch_size,), generator=g)]
        images = augment(art.images[picked], g).to(device, memory_format=torch.channels_last)
        noise = torch.randn(stage.batch_size, config.architecture.latent_channels, latent, latent, generator=g).to(
            device
        )
        reconstruction, kl = model(images, noise)
        return F.l1_loss(reconstruction, images) + F.mse_loss(reconstruction, images) + 1e-6 * kl.mean()

    vae = fit(accelerator, "autoencoder", model, loss_fn, stage, config).vae
    with torch.no_grad():
        latents = encode_artwork(vae, art, device)[art.training]
        rebuilt = torch.cat([vae.decode(x.to(device)).sample.clamp(-1, 1).cpu() for x in latents.split(64)])
    mse = (rebuilt - art.images[art.training]).square().mean(dim=(1, 2, 3))
    accelerator.print(f"autoencoder: PSNR {(10 * torch.log10(4 / mse)).mean():.1f} dB, latent std {latents.std():.3f}")
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    if accelerator.is_main_process:
        vae.save_pretrained(config.out / "vae")


@torch.no_grad()
def encode_artwork(vae: AutoencoderKL, art: Artwork, device: torch.device) -> Tensor:
    """Posterior means of every drawing, [N,C,h,w], unscaled, on the CPU."""
    vae.to(device).eval()
    return torch.cat([vae.encode(x.to(device)).latent_dist.mean.cpu() for x in art.images.split(64)])


# --- stage 2: text encoder and denoiser -----------------------------------------------------------------------------


class Denoiser(nn.Module):
    """(x_t, t, prompt token ids) -> v, with the text encoder inside so that both train together."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text_encoder(ids).last_hidden_state).sample


def separate_prompts(text_encoder: nn.Module, tokenizer, art: Artwork, config: PretrainConfig) -> None:
    """Warm start of the text encoder: tell concepts and styles apart. From a random start the denoiser learns
    colours only."""
    pairs = [(c, s) for c in range(len(art.concepts)) for s in range(len(STYLES) + 1)]
    texts = [caption(art.concepts[c], STYLES[s] if s < len(STYLES) else None) for c, s in pairs]
    ids, (concept, style) = tokenize(tokenizer, texts), torch.tensor(pairs).T
    width = config.architecture.text_width
    heads = nn.ModuleList([nn.Linear(width, len(art.concepts)), nn.Linear(width, len(STYLES) + 1)])
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=1e-3)
    for step in tqdm(range(config.warm_start_steps), "text encoder warm start"):
        picked = torch.randint(len(ids), (64,), generator=generator(config.seed, 0, step))
        pooled = text_encoder(ids[picked]).last_hidden_state.mean(dim=1)
        loss = F.cross_entropy(heads[0](pooled), concept[picked]) + F.cross_entropy(heads[1](pooled), style[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """Prompts -> token ids [N, max_length], padded as the pipeline pads them."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def train_denoiser(accelerator: Accelerator, art: Artwork, vae: AutoencoderKL, config: PretrainConfig):
    """v-prediction on the artwork's latents; saves `<out>/pipeline`."""
    stage, arch, device = config.denoiser, config.architecture, accelerator.device
    names = [c["name"] for c in load_concepts(core_only=False)]
    tokenizer = architecture.make_tokenizer([caption(n, s) for n in names for s in STYLES], arch.max_length)
    torch.manual_seed(config.seed)  # the networks' start must not depend on whether the first stage ran just now
    text_encoder = architecture.make_text_encoder(tokenizer, arch)
    if not (config.out / "checkpoint-denoiser").exists():
        separate_prompts(text_encoder, tokenizer, art, config)
    latents = encode_artwork(vae, art, device) * vae.config.scaling_factor
    prompts = {s: tokenize(tokenizer, [art.caption(i, s) for i in range(len(art.images))]) for s in (True, False)}
    empty = tokenize(tokenizer, [""])
    alphas = architecture.make_scheduler().alphas_cumprod.float()
    model = Denoiser(architecture.make_unet(latents.shape[-1], arch), text_encoder)

    def loss_fn(model: nn.Module, g: torch.Generator) -> Tensor:
        picked = art.training[torch.randint(len(art.training), (stage.batch_size,), generator=g)]
        kind = torch.rand(stage.batch_size, 1, generator=g)
        ids = torch.where(kind < config.styled, prompts[True][picked], prompts[False][picked])
        ids = torch.where(kind > 1 - config.empty, empty, ids)
        t = torch.randint(len(alphas), (stage.batch_size,), generator=g)
        x0, noise = latents[picked], torch.randn(latents[picked].shape, generator=g)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        x_t, target = a * x0 + s * noise, a * noise - s * x0
        x_t = x_t.to(device, memory_format=torch.channels_last)
        return F.mse_loss(model(x_t, t.to(device), ids.to(device)), target.to(device))

    def pipeline(model: nn.Module):
        return architecture.assemble(vae, model.text_encoder, tokenizer, model.unet)

    def preview(model: nn.Module, step: int) -> None:
        sample_sheet(pipeline(model)).save(config.out / f"samples-{step:05d}.png")

    model = model.to(memory_format=torch.channels_last)
    model = fit(accelerator, "denoiser", model, loss_fn, stage, config, preview)
    if accelerator.is_main_process:
        architecture.save_half(pipeline(model), config.out / "pipeline")


def sample_sheet(pipe, prompts: tuple[str, ...] = SHEET_PROMPTS, unstyled: int = 3):
    """One row a concept: its five styles, then unstyled draws."""
    pipe.set_progress_bar_config(disable=True)
    texts = [caption(p, s) for p in prompts for s in (*STYLES, *(None,) * unstyled)]
    noise = [torch.Generator().manual_seed(i) for i in range(len(texts))]
    images = pipe(texts, num_inference_steps=20, guidance_scale=1.5, generator=noise).images
    scaled = [image.resize((96, 96)) for image in images]
    return make_image_grid(scaled, rows=len(prompts), cols=len(STYLES) + unstyled)


def pretrain(config: PretrainConfig) -> None:
    """Run the stages that are not finished yet."""
    accelerator = Accelerator(mixed_precision="no")
    torch.manual_seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    art = load_artwork(config.artwork)
    if not (config.out / "vae" / "config.json").exists():
        train_autoencoder(accelerator, art, config)
        accelerator.wait_for_everyone()
    vae = AutoencoderKL.from_pretrained(config.out / "vae").requires_grad_(
        False
    )  # as a resumed run has it, to the last bit
    train_denoiser(accelerator, art, vae, config)
    accelerator.print(f"a stock StableDiffusionPipeline is in {config.out / 'pipeline'}")
    accelerator.end_training()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    pretrain(auto_cli(PretrainConfig, as_positional=False))
