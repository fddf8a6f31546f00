"""Latents -> x_t and target: who shares which noise, drawn or found by inversion."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffpref.batch import Encoded, Noised
from diffpref.config import NoiseConfig
from diffpref.noise.draw import Draw, Model, Noise
from diffpref.noise.inversion import SPACINGS, ddim, flow, renoise
from diffpref.noise.keys import generator
from diffpref.noise.levels import TIMESTEPS, draw_level
from diffpref.noise.schedules import Parameterization, RectifiedFlow, VariancePreserving, error_weight, mixture
from diffpref.triton_kernels.noise_pairs import noise_pairs


def shared(draw: Draw) -> Noise:
    """One noise for the whole group, as in Diffusion-DPO: the comparison differs only in the images."""
    return draw.of_groups()


def shared_latent(draw: Draw) -> Noise:
    """One x_t for the whole group: its items are one picture under several prompts (TDPO, arXiv 2509.25771).
    Raises ValueError where they are not."""
    for items in draw.items:
        if not torch.equal(draw.x0[items], draw.x0[items[:1]].expand(len(items), *draw.x0.shape[1:])):
            raise ValueError(
                "noise.strategy shared_latent is for several prompts of one picture, and here the items of a group have"
                " different latents; set it to shared, or take data of captions (prompt, image, rejected_prompt)"
            )
    return shared(draw)


def independent(draw: Draw) -> Noise:
    """Fresh noise for every item."""
    return draw.of_items()


@dataclass(frozen=True)
class Strategy:
    """noise: Draw -> noise of N items.  inverts: the kind of model that it runs backwards; None if it asks no model."""

    noise: Callable[[Draw], Noise]
    inverts: type | None = None


STRATEGIES: dict[str, Strategy] = {
    "shared": Strategy(shared),
    "shared_latent": Strategy(shared_latent),
    "independent": Strategy(independent),
    "ddim": Strategy(ddim, VariancePreserving),
    "renoise": Strategy(renoise, VariancePreserving),
    "flow": Strategy(flow, RectifiedFlow),
}

KINDS = {VariancePreserving: "an eps or v model", RectifiedFlow: "a rectified flow"}


def needs_model(config: NoiseConfig) -> bool:
    """Whether add_noise must be given a model."""
    return STRATEGIES[config.strategy].inverts is not None


def check_strategy(config: NoiseConfig, parameters: Parameterization, error_space: str = "model") -> None:
    """Raise ValueError, before anything is trained, for a strategy that does not fit the model or the grid, and for an
    error space that is infinite at a level that can be drawn."""
    inverts = STRATEGIES[config.strategy].inverts
    if inverts is not None and not isinstance(parameters, inverts):
        fit = [name for name, row in STRATEGIES.items() if row.inverts is None or isinstance(parameters, row.inverts)]
        raise ValueError(
            f"noise.strategy {config.strategy} inverts {KINDS[inverts]}, and this is {KINDS[type(parameters)]};"
            f" set it to one of {', '.join(fit)}"
        )
    if inverts is not None and config.inversion_grid == "snap":
        check_snap(config, parameters)
    error_weight(parameters, error_space, TIMESTEPS[config.timesteps].highest(config))


def check_snap(config: NoiseConfig, parameters: Parameterization) -> None:
    """Raise ValueError where diffusers' DDIMInverseScheduler would have no grid to snap to."""
    if not isinstance(parameters, VariancePreserving):
        raise ValueError("noise.inversion_grid snap is a grid of timesteps, and a flow has none; set it to exact")
    if parameters.spacing not in SPACINGS:
        raise ValueError(
            f"noise.inversion_grid snap knows the timestep spacings {', '.join(SPACINGS)}, and this model's scheduler"
            f" has {parameters.spacing}; set it to exact"
        )
    if config.inversion_steps > (total := len(parameters.alphas_cumprod)):
        raise ValueError(
            f"noise.inversion_steps {config.inversion_steps} is more than the {total} timesteps to snap to"
        )


@torch.no_grad()
def add_noise(
    encoded: Encoded,
    parameters: Parameterization,
    config: NoiseConfig,
    seed: int,
    *,
    strata: int = 1,
    model: Model | None = None,
    error_space: str = "model",
    kernel: str = "auto",
) -> Noised:
    """Latents -> x_t, target and the timesteps' weights. Each group's generator draws its level first, then its noise,
    unless noise.source has that from somewhere else.

    Args:
        encoded: N items in G groups, in any order.
        parameters: Of the model, from `parameterization`.
        config: Strategy and sampler.
        seed: Of the run.
        strata: Groups of an optimiser step over all processes and accumulation steps, for noise.stratified.
        model: (x_t [N,C,h,w], t [N], conditioning) -> prediction, of policy or reference; see `needs_model`.
        error_space: Space whose errors the weight turns the model's own into.
        kernel: Who computes x_t, target and noise; all give the same numbers.

    Raises ValueError where strategy, model, grid, error space or data do not fit together, and where the kernel asked
    for cannot run.
    """
    check_strategy(config, parameters, error_space)
    x0, device = encoded.latents.float(), encoded.latents.device
    generators = [generator(seed, key) for key in encoded.keys]
    drawn = zip(generators, encoded.keys, strict=True)
    levels = torch.stack([draw_level(g, config, seed, key, strata) for g, key in drawn])
    group = encoded.structure.group.to(device, non_blocking=True)
    # What is known of each group is computed on the CPU, and goes to the device at once.
    numbers = [levels, error_weight(parameters, error_space, levels), *mixture(parameters, levels)]
    level, weight, *coefficients = torch.stack(numbers).to(device, non_blocking=True)[:, group]
    t = parameters.timestep(levels).to(device, non_blocking=True)[group]
    world = encoded.conditioning, parameters, config, model, kernel
    noise = STRATEGIES[config.strategy].noise(Draw(x0, level, group, encoded.keys, generators, seed, *world))
    x_t, target = noise_pairs(x0, noise.rows, tuple(coefficients), noise.row, kernel=kernel)
    return Noised(x_t, target, t, level, weight)
