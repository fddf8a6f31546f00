"""The step of diffusers' example scripts for Diffusion-DPO with LoRA, written anew in their order of work and dtypes:
examples/research_projects/diffusion_dpo/train_diffusion_dpo.py and train_diffusion_dpo_sdxl.py, as of August 2026.

A step decodes its pictures in the training process, encodes them and their prompts, draws noise for 2B and uses half
of it, runs the policy first and keeps its graph while the reference runs, toggles the adapter by walking the model,
reads four numbers back, and refreshes its bar. Validation, checkpoints and trackers are left out, as on the other side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from stepping.clock import Clock, Turn
from stepping.rows import Precomputed, ScriptRows, stacked

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
VAE_BATCH = 8  # --vae_encode_batch_size
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How the script is called.

    workers: --dataloader_num_workers, 0 as shipped.  cached: latents and text granted: they come out of memory.
    checkpointing, precision: --gradient_checkpointing, --mixed_precision.  batch, rank, rate: of pairs, of the LoRA, of
    learning.  beta: --beta_dpo in the sense of the SDXL script, which halves it; the SD script is given the half.
    """

    workers: int = 0
    cached: bool = False
    checkpointing: bool = False
    precision: str = "no"
    batch: int = 16
    rank: int = 8
    rate: float = 1e-5
    beta: float = 5000.0


# --- the formula ------------------------------------------------------------------------------------------------------

# L = −log σ(−(β/2)·(Δ_policy − Δ_reference)),  Δ = mse_w − mse_l   (Wallace et al. 2023, eq. 14)


def pair_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each item in fp32, [2B]."""
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none")
    return losses.mean(dim=list(range(1, losses.ndim)))


def target_of(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the model is to predict."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, t)
    return noise


def dpo(
    unet: nn.Module, toggled: nn.Module, scheduler: DDPMScheduler, drawn: tuple[Tensor, ...], inputs: dict, beta: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The middle of a step, policy first -> (loss, logits [B], what is logged).

    Args:
        unet: As it is called.
        toggled: The same, unwrapped: it has the adapters.
        scheduler: Of the noise.
        drawn: latents, noise [2B,C,h,w] and timesteps [2B]; winners first, then losers.
        inputs: Of the unet beside x_t and t.
        beta: Of the objective, the SDXL script's.
    """
    latents, noise, t = drawn
    x_t = scheduler.add_noise(latents, noise, t)
    prediction = unet(x_t, t, **inputs).sample
    target = target_of(scheduler, latents, noise, t)
    policy = pair_errors(prediction, target)
    winners, losers = policy.chunk(2)
    toggled.disable_adapters()
    with torch.no_grad():
        reference = pair_errors(unet(x_t, t, **inputs).sample.detach(), target)
        base_winners, base_losers = reference.chunk(2)
    toggled.enable_adapters()
    logits = -0.5 * beta * ((winners - losers) - (base_winners - base_losers))
    loss = -F.logsigmoid(logits).mean()
    accuracy = ((logits > 0).sum().float() + 0.5 * (logits == 0).sum().float()) / logits.size(0)
    raw = 0.5 * (winners.mean() + losers.mean())
    return loss, logits, {"loss": loss, "raw_model_loss": raw, "ref_loss": reference.mean(), "implicit_acc": accuracy}


def with_lora(unet: nn.Module, recipe: Recipe) -> nn.Module:
    """The script's adapter. With bf16 its parameters stay bf16; only its fp16 branch makes them fp32."""
    unet.requires_grad_(False)
    sizes = {"r": recipe.rank, "lora_alpha": recipe.rank}
    unet.add_adapter(LoraConfig(**sizes, init_lora_weights="gaussian", target_modules=TARGETS))
    for parameter in (p for p in unet.parameters() if p.requires_grad):
        parameter.data = parameter.to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    if recipe.checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()


# --- the script -------------------------------------------------------------------------------------------------------


class Script:
    """A run of the script on a pipeline in fp32.

    Args:
        pipe: Whose denoiser is this run's own.
        rows: Preferences, prompts and both pictures' bytes.
        recipe: How it is called.
        resolution: Side of the training pictures.
    """

    def __init__(self, pipe: DiffusionPipeline, rows: list[dict[str, Any]], recipe: Recipe, resolution: int):
        self.pipe, self.recipe, self.resolution = pipe, recipe, resolution
        self.accelerator = Accelerator(cpu=pipe.device.type == "cpu", mixed_precision=recipe.precision)
        self.dtype, self.sdxl = PRECISIONS[recipe.precision], getattr(pipe, "text_encoder_2", None) is not None
        self.vae, self.scheduler = pipe.vae, DDPMScheduler.from_config(pipe.scheduler.config)
        self.bare = with_lora(pipe.unet, recipe)
        self.trained = [p for p in self.bare.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.trained, lr=recipe.rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        schedule = get_scheduler("constant", optimizer)
        loader = self.make_loader(ScriptRows(rows, self.tokenizers(), resolution, self.sdxl))
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.bare, optimizer, loader, schedule
        )
        self.bar = tqdm(disable=True)

    def tokenizers(self) -> list:
        """One, or two."""
        return [self.pipe.tokenizer, *([self.pipe.tokenizer_2] if self.sdxl else [])]

    def make_loader(self, rows: ScriptRows) -> DataLoader:
        """The script's; or, granted latents and text, one that only stacks them."""
        data = Precomputed([self.encoded(stacked([row])) for row in rows]) if self.recipe.cached else rows
        return DataLoader(
            data, batch_size=self.recipe.batch, shuffle=True, collate_fn=stacked, num_workers=self.recipe.workers
        )

    # --- what is encoded at each step --------------------------------------------------------------------------------

    @torch.no_grad()
    def encoded(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """For the cache: the posterior of both pictures of a row, and its text."""
        pixels = batch["pixels"].to(self.vae.device, self.vae.dtype)
        posterior = self.vae.encode(torch.cat(pixels.chunk(2, dim=1))).latent_dist
        kept = {"mean": posterior.mean, "std": posterior.std} | self.text(batch)
        kept = {key: value[0] if len(value) == 1 else value for key, value in kept.items()}
        return kept | {key: batch[key][0] for key in batch if key == "time_ids"}

    def latents(self, batch: dict[str, Tensor]) -> Tensor:
        """[2B,C,h,w], winners first; drawn from the posterior."""
        if self.recipe.cached:
            mean, std = (torch.cat([batch[key][:, side] for side in (0, 1)]) for key in ("mean", "std"))
            return (mean + std * torch.randn_like(mean)) * self.vae.config.scaling_factor
        pixels = batch["pixels"].to(dtype=self.vae.dtype)
        feed = torch.cat(pixels.chunk(2, dim=1))
        parts = [self.vae.encode(feed[i : i + VAE_BATCH]).latent_dist.sample() for i in range(0, len(feed), VAE_BATCH)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def text(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prompts as the unet takes them, [B,...]."""
        if "prompt_embeds" in batch:
            return {key: batch[key] for key in ("prompt_embeds", "pooled") if key in batch}
        if not self.sdxl:
            return {"prompt_embeds": self.pipe.text_encoder(batch["ids"].to(self.pipe.device))[0]}
        encoders = self.pipe.text_encoder, self.pipe.text_encoder_2
        pairs = zip(encoders, (batch["ids"], batch["ids_2"]), strict=True)
        found = [encoder(ids.to(self.pipe.device), output_hidden_states=True) for encoder, ids in pairs]
        return {"prompt_embeds": torch.cat([f.hidden_states[-2] for f in found], dim=-1), "pooled": found[1][0]}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Everything the unet takes beside x_t and t, for winners and losers."""
        text = self.text(batch)
        inputs: dict[str, Any] = {"encoder_hidden_states": text["prompt_embeds"].repeat(2, 1, 1)}
        if self.sdxl:
            ids = torch.cat([row[None].to(self.accelerator.device, dtype=self.dtype) for row in batch["time_ids"]])
            added = {"time_ids": ids.repeat(2, 1), "text_embeds": text["pooled"].repeat(2, 1)}
            inputs["added_cond_kwargs"] = added
        return inputs

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, batch: dict[str, Tensor]) -> None:
        """One optimiser step on a batch of pairs."""
        with self.accelerator.accumulate(self.unet):
            latents = self.latents(batch)
            if self.sdxl:
                latents = latents.to(self.dtype)
            noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
            total = self.scheduler.config.num_train_timesteps
            t = torch.randint(0, total, (len(latents) // 2,), device=latents.device).repeat(2)
            drawn, inputs = (latents, noise, t), self.inputs(batch)
            loss, _, logged = dpo(self.unet, self.bare, self.scheduler, drawn, inputs, self.recipe.beta)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.bar.update()
        read = {key: value.detach().item() for key, value in logged.items()}
        self.bar.set_postfix(**read, lr=self.schedule.get_last_lr()[0])

    def forever(self) -> Iterator[dict[str, Tensor]]:
        """Epoch after epoch."""
        while True:
            yield from self.loader

    def once(self) -> Callable[[], Any]:
        """A step on a batch that is here already."""
        batch = next(iter(self.loader))
        return lambda: self.step(batch)

    @property
    def model(self) -> nn.Module:
        """What trains."""
        return self.bare

    def turn(self, warm: int, steps: int) -> Turn:
        """So many steps, timed after the first ones. Workers are started anew, and end."""
        clock = Clock(warm, steps, self.accelerator.device)
        self.bar = tqdm(total=warm + steps, desc="script")
        batches = self.forever()
        for _, batch in zip(range(warm + steps), clock.watched(batches), strict=False):
            self.step(batch)
            clock.tick()
        batches.close()
        self.bar.close()
        return clock.turn()
