"""The configuration of a run that trains an encoder of users."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffpref.config import RUN_CONTRADICTIONS, RUN_LIMITS, DataConfig, LoopConfig, RunConfig, check
from diffpref.config.command_line import load
from diffpref.config.limits import NOT_NEGATIVE, POSITIVE, SHARE, Contradictions, Limits
from diffpref.scorer.config import CUTTING


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder.

    Args:
        towers: Name or folder of the scorer whose towers see.
        levels: Of its image tower's intermediate features that are looked at beside the embedding, from the first on.
        rank: Features of pictures that tastes are told apart by; a user vector has one number more.
    """

    towers: str = "bundled"
    levels: int = 2
    rank: int = 16


@dataclass(frozen=True)
class EpisodeConfig:
    """What a step is made of: persons (train.train_batch_size), some of their choices, and others to tell.

    Args:
        support: Fewest and most choices that the encoder is shown; how many is drawn for every person. Of none it gives
            the population.
        query: Other choices of the same person, on other prompts, that it is to tell.
        dispersion: What the contrast of a person's two supports with those of others counts beside the loss (InfoNCE).
        temperature: Of that contrast.
        held_out: Share of the persons who are not trained on, and by whom it is measured.
    """

    support: tuple[int, int] = (0, 16)
    query: int = 16
    dispersion: float = 0.0
    temperature: float = 0.1
    held_out: float = 0.1


@dataclass(frozen=True, kw_only=True)
class UserEncoderConfig(RunConfig):
    """A run that trains an encoder of users on their choices.

    Args:
        encoder: What is trained.
        episodes: What a step is made of.
    """

    train: LoopConfig = field(
        default_factory=lambda: LoopConfig(max_train_steps=600, train_batch_size=48, learning_rate=3e-3)
    )
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)


LIMITS: Limits = RUN_LIMITS | {
    "encoder.levels": NOT_NEGATIVE,
    "encoder.rank": POSITIVE,
    "episodes.support": ("must be fewest and most, none negative", lambda x: 0 <= x[0] <= x[1] and x[1] > 0),
    "episodes.query": POSITIVE,
    "episodes.dispersion": NOT_NEGATIVE,
    "episodes.temperature": POSITIVE,
    "episodes.held_out": SHARE,
}
CONTRADICTIONS: Contradictions = [
    *RUN_CONTRADICTIONS,
    (
        lambda c: any(getattr(c.data, key) != getattr(DataConfig(""), key) for key in CUTTING),
        f"data.{', data.'.join(CUTTING)}: an encoder's towers prepare pictures in their own way and it reads every"
        " prompt; leave these keys out",
    ),
    (
        lambda c: c.data.validation is not None,
        "data.validation is not read here: an encoder is measured by people held out (episodes.held_out)",
    ),
    (lambda c: c.data.streaming, "data.streaming passes rows once; an encoder of users needs all choices of a person"),
    (lambda c: c.data.random_flip, "data.random_flip: a choice is read as it was made; leave it out"),
]


def load_encoder_config(argv: Sequence[str] | None = None) -> UserEncoderConfig:
    """Parse a command line. Raises ValueError, naming the key, for anything a run cannot use."""
    return check(load(argv, UserEncoderConfig), LIMITS, CONTRADICTIONS)
