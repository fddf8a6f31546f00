"""Timesteps, noise, x_t and its target: the only folder that knows eps, v and flow."""

from diffpref.noise.draw import Draw, Model
from diffpref.noise.keys import FIXED_SEED, FixedDraws, generator
from diffpref.noise.levels import TIMESTEPS, logit_normal, uniform
from diffpref.noise.schedules import (
    Parameterization,
    RectifiedFlow,
    VariancePreserving,
    error_weight,
    parameterization,
)
from diffpref.noise.strategies import STRATEGIES, add_noise, check_strategy, needs_model

__all__ = [
    "FIXED_SEED",
    "STRATEGIES",
    "TIMESTEPS",
    "Draw",
    "FixedDraws",
    "Model",
    "Parameterization",
    "RectifiedFlow",
    "VariancePreserving",
    "add_noise",
    "check_strategy",
    "error_weight",
    "generator",
    "logit_normal",
    "needs_model",
    "parameterization",
    "uniform",
]
