"""Equal maths, before anything is timed: the same latents, timesteps, noise and weights through the script's formula in
fp32 and through this package's own learner."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffpref.batch import Encoded, Noised
from diffpref.trainer import Trainer
from stepping.script import dpo

SCALE = 0.02  # of the LoRA's second half, which would else be zero, and policy and reference the same


class Unequal(RuntimeError):
    """The two sides do not compute the same."""


@dataclass(frozen=True)
class Limits:
    """What may differ: loss and margins, both absolute, for the loss moves with the margins, whose last digits the
    script loses (a difference of means of squares, times β); the gradients' cosine is at least so much."""

    loss: float
    cosine: float
    margin: float


EXACT, HALF = Limits(2e-3, 0.9999, 2e-3), Limits(1e-2, 0.999, 1e-2)


@dataclass(frozen=True)
class Found:
    """The differences of one variant. within: its limits."""

    loss: float
    script_loss: float
    cosine: float
    margin_difference: float
    limits: Limits

    @property
    def within(self) -> bool:
        """Whether it computes the same; nothing that is no number does."""
        near = abs(self.loss - self.script_loss) <= self.limits.loss
        return near and self.cosine >= self.limits.cosine and self.margin_difference <= self.limits.margin

    def row(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"within": self.within}


class Notes:
    """Takes the learner's metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """As a journal."""
        self.metrics |= metrics


@dataclass(frozen=True)
class Given:
    """Both sides' input: encoded items, what this package made of them with its own timesteps and noise, and that noise
    [N,C,h,w]."""

    encoded: Encoded
    noised: Noised
    noise: Tensor


def draw(trainer: Trainer, batch: Any, scheduler: DDPMScheduler) -> Given:
    """For a batch of pairs."""
    encoded, noised = trainer.learner.prepare(batch)
    encoded = replace(encoded, conditioning={key: value.float() for key, value in encoded.conditioning.items()})
    return Given(encoded, noised, noise_of(noised, scheduler))


# v = a·ε − s·x0 and x_t = a·x0 + s·ε with a² + s² = 1:  a·v + s·x_t = ε
def noise_of(noised: Noised, scheduler: DDPMScheduler) -> Tensor:
    """What was added to the latents."""
    if scheduler.config.prediction_type == "epsilon":
        return noised.target
    square = scheduler.alphas_cumprod.to(noised.t.device)[noised.t].view(-1, 1, 1, 1)
    return square.sqrt() * noised.target + (1 - square).sqrt() * noised.x_t


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def awaken(model: nn.Module, seed: int) -> None:
    """Give the LoRA a second half that is not zero, the same for equal seeds."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in sorted(trained(model).items()):
        spread = SCALE if "lora_B" in name else 1 / weight.shape[0]
        weight.copy_(spread * torch.randn(weight.shape, generator=g))


def through_ours(trainer: Trainer, given: Given) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, margins [P], gradients by name) of the learner's own loss."""
    notes = Notes()
    loss = trainer.learner.loss((given.encoded, given.noised), notes)
    trainer.accelerator.backward(loss)
    gradients = taken(trainer.denoiser)
    return loss.detach().float(), notes.metrics["rewards/margins"].float(), gradients


def through_script(
    unet: nn.Module, scheduler: DDPMScheduler, given: Given, beta: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same of the script's formula; winners first, as it has them."""
    structure, c = given.encoded.structure, given.encoded.conditioning
    order = torch.cat([structure.chosen, structure.rejected])
    inputs: dict[str, Any] = {"encoder_hidden_states": c["prompt_embeds"][order]}
    if "pooled" in c:
        inputs["added_cond_kwargs"] = {"text_embeds": c["pooled"][order], "time_ids": c["time_ids"][order]}
    drawn = given.encoded.latents[order], given.noise[order], given.noised.t[order]
    loss, logits, _ = dpo(unet, unet, scheduler, drawn, inputs, beta)
    loss.backward()
    return loss.detach(), logits.detach(), taken(unet)


def taken(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, taken away from their parameters."""
    found = {name: p.grad.float() for name, p in trained(model).items()}
    model.zero_grad(set_to_none=True)
    return found


def compare(ours: tuple, script: tuple, limits: Limits) -> Found:
    """Loss, margins and gradients of both."""
    (loss, margins, gradients), (script_loss, logits, script_gradients) = ours, script
    if gradients.keys() != script_gradients.keys():
        raise Unequal("the two sides do not train the same weights")
    a, b = (torch.cat([g[name].flatten() for name in sorted(g)]).double() for g in (gradients, script_gradients))
    cosine = (a @ b / (a.norm() * b.norm())).item()
    return Found(loss.item(), script_loss.item(), cosine, (margins - logits).abs().max().item(), limits)


def check(name: str, found: Found) -> None:
    """Raise Unequal for a variant beyond its limits."""
    if not found.within:
        raise Unequal(
            f"{name} does not compute what the script computes: loss {found.loss:.6g} against {found.script_loss:.6g},"
            f" cosine of the gradients {found.cosine:.6f}, margins up to {found.margin_difference:.2g} apart; allowed:"
            f" {found.limits}"
        )
