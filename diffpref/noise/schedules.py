"""x_t and the denoiser's target at a level u in [0,1): eps, v and flow. The schedule stays fp32 under any dtype."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Parameterization(Protocol):
    """What a denoiser is trained to predict, and how much noise there is at a level u."""

    @property
    def space(self) -> str:
        """What the model predicts: epsilon or velocity."""
        ...

    def timestep(self, u: Tensor) -> Tensor:
        """u [N] -> t [N] as the denoiser takes it."""
        ...

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [N] -> a, s [N] of x_t = a·x0 + s·ε."""
        ...

    def target(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """u [N] -> c_x, c_n [N] of target = c_x·x0 + c_n·ε."""
        ...


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = a_t·x0 + s_t·ε with a² = ᾱ, s² = 1 − ᾱ; target ε, or v = a_t·ε − s_t·x0 (Salimans & Ho 2022).

    ᾱ stays fp32: rounded to bf16, 1000 timesteps collapse onto 733 noise levels.  spacing, offset and first_alpha (the
    ᾱ that the scheduler takes a clean picture to have) matter to the published inversion grid only.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    spacing: str = "leading"
    offset: int = 0
    first_alpha: float = 1.0

    @property
    def space(self) -> str:
        return VP_SPACES[self.prediction_type]

    def timestep(self, u: Tensor) -> Tensor:
        return (u * len(self.alphas_cumprod)).long()

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(self.timestep(u))

    def at(self, t: Tensor, clean: float = 1.0) -> tuple[Tensor, Tensor]:
        """Timesteps t -> a, s. t = −1 is the clean picture, one before the first timestep; its ᾱ is `clean`."""
        alpha = torch.where(t < 0, clean, self.alphas_cumprod.to(t.device)[t.clamp(min=0)])
        return alpha.sqrt(), (1 - alpha).sqrt()

    def target(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return VP_TARGETS[self.prediction_type](*self.coefficients(u))

    def epsilon(self, x: Tensor, prediction: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The noise that a prediction says is in x, taken to lie at a, s."""
        return VP_EPSILONS[self.prediction_type](x, prediction, a, s)


VP_SPACES = {"epsilon": "epsilon", "v_prediction": "velocity"}
VP_TARGETS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),
    "v_prediction": lambda a, s: (-s, a),
}
VP_EPSILONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x, prediction, a, s: prediction,
    "v_prediction": lambda x, prediction, a, s: a * prediction + s * x,
}


@dataclass(frozen=True)
class RectifiedFlow:
    """x_σ = (1 − σ)·x0 + σ·ε; target v = ε − x0 (Liu et al. 2022; SD3, arXiv 2403.03206, section 2).

    σ = shift·u / (1 + (shift − 1)·u) moves the levels towards noise for larger pictures (SD3, eq. 23).
    """

    shift: float
    num_train_timesteps: int
    space: str = "velocity"

    def sigma(self, u: Tensor) -> Tensor:
        """The share of noise at a level."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def timestep(self, u: Tensor) -> Tensor:
        return self.sigma(u) * self.num_train_timesteps

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(u)
        return 1 - sigma, sigma

    def target(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(u), torch.ones_like(u)


def mixture(parameters: Parameterization, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u [N] -> a, s, c_x, c_n [N]: x_t = a·x0 + s·ε, target = c_x·x0 + c_n·ε."""
    return *parameters.coefficients(u), *parameters.target(u)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N,1,...,1] against a wide tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def parameterization(scheduler) -> Parameterization:
    """Read a diffusers scheduler's configuration. Raises ValueError for a prediction type no objective can train on."""
    config = scheduler.config
    if "prediction_type" not in config and "shift" in config:
        return RectifiedFlow(flow_shift(config), config.num_train_timesteps)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has a noise schedule that is not known here")
    if config.prediction_type not in VP_TARGETS:
        raise ValueError(
            f"prediction_type {config.prediction_type!r} is not trainable here; known: {sorted(VP_TARGETS)}"
        )
    alphas = scheduler.alphas_cumprod.float()
    first = 1.0 if config.get("set_alpha_to_one", True) else alphas[0].item()
    grid = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
    return VariancePreserving(alphas, config.prediction_type, *grid, first)


def flow_shift(config: dict) -> float:
    """The shift of a flow scheduler. Where it moves with the size of the picture (FLUX: e^μ, with μ linear in the
    number of patches), that of the largest size, which the model draws at by itself; `shift` is then not in use."""
    return math.exp(config["max_shift"]) if config.get("use_dynamic_shifting") else config["shift"]


# --- the space in which errors are measured -------------------------------------------------------------------------

# Error of one prediction in a space, in units of its error as velocity. From x_t = a·x0 + s·ε, with x_t known:
# VP, v = a·ε − s·x0:  ‖dε‖² = a²‖dv‖², ‖dx0‖² = s²‖dv‖².  Flow, v = ε − x0, a = 1 − σ, s = σ: the same two.
IN_VELOCITY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "epsilon": lambda a, s: a**2,
    "velocity": lambda a, s: torch.ones_like(a),
    "sample": lambda a, s: s**2,
}


def error_weight(parameters: Parameterization, space: str, u: Tensor) -> Tensor:
    """w_t [N]: the factor from squared errors of the model's own prediction to those in another space, at levels u.

    So a target is a timestep weight: Flow-DPO's β(1−t)² (arXiv 2501.13918) is Diffusion-DPO's error in ε. Raises
    ValueError where it is infinite: the ε of an x_t that holds no picture says nothing of x0 or v.
    """
    if space in ("model", parameters.space):
        return torch.ones_like(u)
    a, s = parameters.coefficients(u)
    weight = IN_VELOCITY[space](a, s) / IN_VELOCITY[parameters.space](a, s)
    if not weight.isfinite().all():
        t = parameters.timestep(u)[~weight.isfinite()][0].item()
        raise ValueError(
            f"objective.error_space {space}: its errors are infinite at timestep {t}, where this model's x_t is noise"
            " alone (zero terminal SNR); set it to epsilon, or draw timesteps below (noise.timesteps range or list)"
        )
    return weight
