"""The section that says which head a scorer has. The docstring is the help text, too."""

import inspect
import math
from dataclasses import dataclass, fields
from typing import Literal

from diffpref.config.limits import NOT_NEGATIVE, POSITIVE, Limits
from diffpref.scorer.heads.contract import Head
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.table import HEADS


@dataclass(frozen=True)
class HeadConfig:
    """What becomes of the embeddings. The docstrings in diffpref/scorer/heads have the equations.

    Args:
        name: A row of HEADS.
        logit_scale: Logarithm of the factor before the cosine, at the start (all but affine and gpm); never more than
            ln 100. The scorer's own when not given.
        prompt_rank: Rank of the maps by which queries differ from prompt to prompt (aspects, gaussian, micro, pal of
            kind b); 0, and every prompt is moved alike, which few prompts are enough for.
        names: Names of the aspects, in the order of the data's (aspects).
        weights: Of the aspects in the overall score (aspects); equal, when it is null.
        learned_weights: Training changes these weights (aspects).
        spread: Standard deviation of a score at the start (gaussian).
        dim: Numbers in a vector, an even count (gpm).
        tau: τ, by which the preference is divided (gpm).
        prompt_scales: The prompt weighs the planes of the vectors (gpm).
        kind: a, ideal points; b, mixtures of maps (pal).
        prototypes: Tastes of which the users' are mixtures (pal).
        tastes: Tastes among which the prompt, and a user's choices, decide (micro).
    """

    name: Literal["affine", "aspects", "cosine", "gaussian", "gpm", "micro", "pal", "taste"] = "taste"
    logit_scale: float | None = None
    prompt_rank: int = 0
    names: list[str] | None = None
    weights: list[float] | None = None
    learned_weights: bool = False
    spread: float = 1.0
    dim: int = 6
    tau: float = 0.1
    prompt_scales: bool = False
    kind: Literal["a", "b"] = "b"
    prototypes: int = 8
    tastes: int = 8


LIMITS: Limits = {
    "head.logit_scale": ("must be at most ln 100", lambda x: x <= math.log(100) + 1e-9),
    "head.prompt_rank": NOT_NEGATIVE,
    "head.spread": POSITIVE,
    "head.dim": ("must be even and positive", lambda x: x > 0 and x % 2 == 0),
    "head.tau": POSITIVE,
    "head.prototypes": POSITIVE,
    "head.tastes": POSITIVE,
}


def options(name: str) -> frozenset[str]:
    """Names of the settings that a head takes, beside width and users."""
    return frozenset(inspect.signature(HEADS[name]).parameters) - {"width", "users"}


def check_head(config: HeadConfig) -> None:
    """Raise ValueError for an option that differs from its default and that the head does not use, and for aspects
    without names."""
    for field in fields(config):
        if field.name not in options(config.name) | {"name"} and getattr(config, field.name) != field.default:
            users = ", ".join(name for name in HEADS if field.name in options(name))
            raise ValueError(
                f"head.{field.name} is not used by head.name {config.name}; leave it out (it is for {users})"
            )
    if config.name == "aspects" and not config.names:
        raise ValueError("head.name aspects needs head.names, the aspects in the order of the data's")


def takes_users(name: str) -> bool:
    """Whether a head has a table of users."""
    return "users" in inspect.signature(HEADS[name]).parameters


def make_head(config: HeadConfig, width: int, users: int = 0, scale: float | None = None) -> Head:
    """An untrained head for embeddings of a width D, and for so many known users if it is one that knows users.

    scale: logit_scale where the configuration has none; ln 100 where nobody has.
    """
    check_head(config)
    settings = {name: getattr(config, name) for name in options(config.name)}
    if "logit_scale" in settings and settings["logit_scale"] is None:
        settings["logit_scale"] = LARGEST if scale is None else min(scale, LARGEST)
    known = {"users": users} if takes_users(config.name) else {}
    return HEADS[config.name](width=width, **settings, **known)
