"""Timesteps, noise, x_t and its target: the only file that knows eps, v and flow.

Randomness is an argument: each group of items draws from a generator of its own, keyed by (seed, key), where the
key is the group's position in the stream of training groups. A rank holds other positions than its neighbour, so no
two draw the same noise, and the same positions draw the same noise however they are spread over ranks and
accumulation steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffpref.batch import Encoded, Noised
from diffpref.config import NoiseConfig


def generator(*key: int) -> torch.Generator:
    """A CPU generator for one key: equal keys, equal numbers, on every machine."""
    state = 0
    for part in key:  # splitmix64 over the parts: neighbouring keys give unrelated seeds
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


# --- parameterisations ----------------------------------------------------------------------------------------------


class Parameterization(Protocol):
    """x_t and the denoiser's target at level u in [0,1)."""

    def noise_latents(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0, noise [N,C,h,w], u [N] -> x_t, target [N,C,h,w], t [N]."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = a_t·x0 + s_t·ε with a² = ᾱ, s² = 1 − ᾱ; target ε, or v = a_t·ε − s_t·x0 (Salimans & Ho 2022).

    ᾱ stays fp32: rounded to bf16, 1000 timesteps collapse onto 733 noise levels.
    """

    alphas_cumprod: Tensor
    prediction_type: str

    def noise_latents(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (u * len(self.alphas_cumprod)).long()
        alpha = wide(self.alphas_cumprod.to(t.device)[t], x0)
        a, s = alpha.sqrt(), (1 - alpha).sqrt()
        return a * x0 + s * noise, VP_TARGETS[self.prediction_type](x0, noise, a, s), t


VP_TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, a, s: noise,
    "v_prediction": lambda x0, noise, a, s: a * noise - s * x0,
}


@dataclass(frozen=True)
class RectifiedFlow:
    """x_σ = (1 − σ)·x0 + σ·ε; target v = ε − x0 (Liu et al. 2022; SD3, arXiv 2403.03206, section 2).

    σ = shift·u / (1 + (shift − 1)·u) moves the levels towards noise for larger pictures (SD3, eq. 23).
    """

    shift: float
    num_train_timesteps: int

    def noise_latents(self, x0: Tensor, noise: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = self.shift * u / (1 + (self.shift - 1) * u)
        sigma = wide(level, x0)
        return (1 - sigma) * x0 + sigma * noise, noise - x0, level * self.num_train_timesteps


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N,1,...,1] against a wide tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def parameterization(scheduler) -> Parameterization:
    """Read a diffusers scheduler's configuration. Raises ValueError for a prediction type no objective can train on."""
    config = scheduler.config
    if "prediction_type" not in config and "shift" in config:
        return RectifiedFlow(config.shift, config.num_train_timesteps)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has a noise schedule that is not known here")
    if config.prediction_type not in VP_TARGETS:
        raise ValueError(
            f"prediction_type {config.prediction_type!r} is not trainable here; known: {sorted(VP_TARGETS)}"
        )
    return VariancePreserving(scheduler.alphas_cumprod.float(), config.prediction_type)


# --- timestep samplers: generator -> level u in [0, 1) --------------------------------------------------------------


def uniform(g: torch.Generator, config: NoiseConfig) -> Tensor:
    """u ~ U[0,1): every timestep equally often."""
    return torch.rand((), generator=g)


def logit_normal(g: torch.Generator, config: NoiseConfig) -> Tensor:
    """u = σ(m + s·z), z ~ N(0,1): SD3's emphasis on the middle of the path (arXiv 2403.03206, section 3.1)."""
    u = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn((), generator=g))
    return u.clamp(max=1 - 2**-24)


TIMESTEPS: dict[str, Callable[[torch.Generator, NoiseConfig], Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
}


# --- noise strategies: generator, items of the group -> (levels [k], noise [k,C,h,w]) -------------------------------


def shared(g: torch.Generator, size: torch.Size, config: NoiseConfig) -> tuple[Tensor, Tensor]:
    """One timestep and one noise for the whole group, as in Diffusion-DPO: the comparison differs only in the
    images."""
    u = TIMESTEPS[config.timesteps](g, config)
    return u.expand(size[0]), torch.randn(size[1:], generator=g).expand(size)


def independent(g: torch.Generator, size: torch.Size, config: NoiseConfig) -> tuple[Tensor, Tensor]:
    """One timestep for the group, fresh noise for every item."""
    u = TIMESTEPS[config.timesteps](g, config)
    return u.expand(size[0]), torch.randn(size, generator=g)


STRATEGIES = {"shared": shared, "independent": independent}


def add_noise(encoded: Encoded, parameters: Parameterization, config: NoiseConfig, seed: int) -> Noised:
    """Latents -> x_t and target, group by group. Drawn on the CPU in fp32, then moved: a seed means the same on
    every device."""
    x0, group = encoded.latents, encoded.structure.group.cpu()
    level, noise = torch.empty(len(x0)), torch.empty(x0.shape)
    for number, key in enumerate(encoded.keys):
        items = (group == number).nonzero().squeeze(1)
        size = torch.Size([len(items), *x0.shape[1:]])
        level[items], noise[items] = STRATEGIES[config.strategy](generator(seed, key), size, config)
    level = level.to(x0.device)
    return Noised(*parameters.noise_latents(x0.float(), noise.to(x0.device), level), level)
