"""x_t by running the model backwards from the picture, instead of by drawn noise.

The denoiser is then trained at the point from which its own sampler comes to this picture (InPO, arXiv 2503.18454;
SmPO, arXiv 2506.02698). Each function returns the noise that the x_t found holds, (x_t − a·x0)/s, and the usual
equations make x_t and target of it: x_t = a·x0 + s·ε holds as for drawn noise. Items have timesteps of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpref.noise.draw import Draw, Noise
from diffpref.noise.schedules import VariancePreserving, wide
from diffpref.triton_kernels.noise_pairs import noise_pairs

# --- grids: timesteps t [N], number of steps -> where each step starts and ends, [n,N] ------------------------------


@dataclass(frozen=True)
class Grid:
    """start, end [n,N]: timesteps of each step, −1 for the clean picture, equal where an item stays; clean: its ᾱ."""

    start: Tensor
    end: Tensor
    clean: float


def exact_grid(parameters: VariancePreserving, t: Tensor, steps: int) -> Grid:
    """n equal steps, rounded to timesteps, from the clean picture (−1, one before the first timestep, ᾱ = 1) to t
    itself. Where n divides t + 1 it is the part below t of a "trailing" grid of diffusers' samplers."""
    shares = torch.arange(steps + 1, device=t.device)[:, None]
    points = (2 * shares * (t + 1) + steps) // (2 * steps) - 1
    return Grid(points[:-1], points[1:], clean=1.0)


def leading(total: int, n: int, offset: int) -> Tensor:
    """diffusers' timestep spacing of that name: whole strides from the offset."""
    return torch.arange(n) * (total // n) + offset


def trailing(total: int, n: int, offset: int) -> Tensor:
    """diffusers' timestep spacing of that name: equal strides down from the last timestep."""
    return (total - torch.arange(n - 1, -1, -1).double() * (total / n)).round().long() - 1


SPACINGS: dict[str, Callable[[int, int, int], Tensor]] = {"leading": leading, "trailing": trailing}


def snap_grid(parameters: VariancePreserving, t: Tensor, steps: int) -> Grid:
    """The published forks' grid: the points below t among n over the whole schedule, as diffusers' DDIMInverseScheduler
    lays them; the target is then formed as if the last of them were t. For n = 10, x_t holds up to a hundred timesteps
    less noise than t says, 50 on average. (The forks' diffusers 0.20 errs as far to the other side, and calls the
    model with the timestep a step comes from, the first at −99.)"""
    total = len(parameters.alphas_cumprod)
    points = SPACINGS[parameters.spacing](total, steps, parameters.offset).clamp(max=total - 1)
    ends = points.to(t.device)[:, None].expand(-1, len(t))
    starts = (ends - total // steps).clamp(min=-1)
    return Grid(torch.where(ends < t, starts, ends), ends, parameters.first_alpha)


GRIDS: dict[str, Callable[[VariancePreserving, Tensor, int], Grid]] = {"exact": exact_grid, "snap": snap_grid}

# --- one step -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """From level (a, s) to the noisier (a_to, s_to), each [N,1,1,1]; t [N]: the timestep it goes to."""

    t: Tensor
    a: Tensor
    s: Tensor
    a_to: Tensor
    s_to: Tensor

    def move(self, x: Tensor, epsilon: Tensor, kernel: str) -> Tensor:
        """x_to = a_to·x0^ + s_to·ε^ with x0^ = (x − s·ε^)/a (DDIM, Song et al. 2021, eq. 12 with σ = 0)."""
        ratio = self.a_to / self.a
        coefficients = ratio.flatten(), (self.s_to - ratio * self.s).flatten()
        return noise_pairs(x, epsilon, coefficients, kernel=kernel)[0]

    def deviation(self) -> Tensor:
        """DDIM's standard deviation between the levels: σ² = (s/s_to)²·(1 − (a_to/a)²) (Song et al. 2021, eq. 16)."""
        return self.s / self.s_to * (1 - (self.a_to / self.a) ** 2).clamp(min=0).sqrt()


def ddim_epsilon(draw: Draw, step: Step, x: Tensor) -> Tensor:
    """The noise as the model sees it where the step starts, asked at the timestep where it ends."""
    return draw.parameters.epsilon(x, draw.predict(x, step.t), step.a, step.s)


def renoise_epsilon(draw: Draw, step: Step, x: Tensor) -> Tensor:
    """The mean of that and of the noise seen where the step ends: half way from DDIM's explicit step to the implicit
    one that its sampler undoes (ReNoise, Garibi et al., arXiv 2403.14602; one correction at each step as in SmPO)."""
    first = ddim_epsilon(draw, step, x)
    there = step.move(x, first, draw.kernel)
    return (first + draw.parameters.epsilon(there, draw.predict(there, step.t), step.a_to, step.s_to)) / 2


# --- strategies -----------------------------------------------------------------------------------------------------


def ddim(draw: Draw) -> Noise:
    """DDIM inversion of an eps or v model -> the noise found, [N,C,h,w]. One evaluation a step (InPO)."""
    return Noise(invert(draw, ddim_epsilon))


def renoise(draw: Draw) -> Noise:
    """DDIM inversion with each step corrected once -> the noise found, [N,C,h,w]. Two evaluations a step (SmPO)."""
    return Noise(invert(draw, renoise_epsilon))


def invert(draw: Draw, epsilon: Callable[[Draw, Step, Tensor], Tensor]) -> Tensor:
    """From x0 to x_t over the grid -> ε = (x_t − a_t·x0) / s_t. No two items need the same t.

    The model is called with all items at each step, also with those that stay: processes that hold parts of one model
    must call it equally often.
    """
    parameters, config, x = draw.parameters, draw.config, draw.x0
    grid = GRIDS[config.inversion_grid](parameters, parameters.timestep(draw.level), config.inversion_steps)
    for k, (start, end) in enumerate(zip(grid.start, grid.end, strict=True)):
        levels = [wide(value, x) for t in (start, end) for value in parameters.at(t, grid.clean)]
        step = Step(end.clamp(min=0), *levels)
        there = step.move(x, epsilon(draw, step, x), draw.kernel)
        if config.inversion_eta:  # as published: on top of the step, whose own level already is that of its end
            there = there + config.inversion_eta * step.deviation() * draw.normal(k)
        x = torch.where(wide(start < end, x), there, x)
    a, s = (wide(value, x) for value in parameters.coefficients(draw.level))
    return (x - a * draw.x0) / s


def flow(draw: Draw) -> Noise:
    """Euler's method on dx = v dσ, from the picture at σ = 0 to σ_t in n equal steps -> the noise found, [N,C,h,w].

    What is kept is the mean velocity, (x_σ − x0)/σ: it has all its digits also where σ is next to nothing.
    """
    parameters, n = draw.parameters, draw.config.inversion_steps
    sigma, velocity = wide(parameters.sigma(draw.level), draw.x0), torch.zeros_like(draw.x0)
    for k in range(n):
        x, t = draw.x0 + sigma * velocity, parameters.timestep(draw.level) * (k / n)
        velocity = velocity + draw.predict(x, t) / n
        if draw.config.inversion_eta:
            velocity = velocity + draw.config.inversion_eta * flow_deviation(sigma, k, n) * draw.normal(k)
    return Noise(draw.x0 + velocity)


def flow_deviation(sigma: Tensor, k: int, n: int) -> Tensor:
    """DDIM's standard deviation of step k on the straight path, in units of σ. With s the share of noise at its start,
    s_to at its end: σ² = (s/s_to)²·(s_to² − (a_to/a)²·s²), a = 1 − s, which on a VP path is DDIM's equation."""
    ratio = (1 - sigma * (k + 1) / n) / (1 - sigma * k / n)
    return k / (k + 1) * (((k + 1) / n) ** 2 - (ratio * k / n) ** 2).clamp(min=0).sqrt()
