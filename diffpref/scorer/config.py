"""The configuration of a run that trains a scorer."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffpref.config import RUN_CONTRADICTIONS, RUN_LIMITS, DataConfig, RunConfig, check
from diffpref.config.command_line import load
from diffpref.config.limits import NOT_NEGATIVE, Contradictions, Limits
from diffpref.scorer.heads.config import LIMITS as HEAD_LIMITS
from diffpref.scorer.heads.config import HeadConfig
from diffpref.scorer.losses.config import LIMITS as LOSS_LIMITS
from diffpref.scorer.losses.config import LossConfig


@dataclass(frozen=True)
class TowersConfig:
    """The scorer to begin with, and what of its towers trains.

    Args:
        pretrained_model_name_or_path: Name (bundled, hpsv2.1, pickscore, clip:…), folder or hub id of a scorer.
        image_groups: Groups of layers at the end of the image tower that train; 0 for none, -1 for all of it. HPSv2 has
            20, of ViT-H's 34.
        text_layers: The same of the text tower, whose projection is a group by itself; HPSv2 has 11.
    """

    pretrained_model_name_or_path: str = "bundled"
    image_groups: int = 0
    text_layers: int = 0


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured on preferences that are not trained on.

    Args:
        steps: Training steps between measures; 0 for the end alone.
        share: Of the prompts, with all their rows, that is held out when there is no data.validation.
        keep_best: Let the result be the scorer of the measure with the least loss, and not the last one.
    """

    steps: int = 100
    share: float = 0.1
    keep_best: bool = True


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(RunConfig):
    """A run that trains a scorer on preferences.

    Args:
        model: The scorer to begin with.
        head: What turns embeddings into scores; where the scorer has such a head already, it goes on from there.
        loss: What it is trained with.
        contrast_weight: What the contrast of each winner's prompt with the other prompts of the batch counts beside the
            loss: it keeps the scorer reading its prompts.
        validation: Held-out preferences; data.validation names them.
    """

    model: TowersConfig = field(default_factory=TowersConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    contrast_weight: float = 0.0
    validation: ValidationConfig = field(default_factory=ValidationConfig)


LIMITS: Limits = (
    RUN_LIMITS
    | HEAD_LIMITS
    | LOSS_LIMITS
    | {
        "model.image_groups": ("must be -1 (all) or more", lambda x: x >= -1),
        "model.text_layers": ("must be -1 (all) or more", lambda x: x >= -1),
        "contrast_weight": NOT_NEGATIVE,
        "validation.steps": NOT_NEGATIVE,
        "validation.share": ("must lie in (0, 1)", lambda x: 0 < x < 1),
    }
)

# Keys of data that say how pictures are cut: a scorer's checkpoint says that itself.
CUTTING = ("resolution", "buckets", "center_crop", "caption_dropout")

CONTRADICTIONS: Contradictions = [
    *RUN_CONTRADICTIONS,
    (
        lambda c: any(getattr(c.data, key) != getattr(DataConfig(""), key) for key in CUTTING),
        f"data.{', data.'.join(CUTTING)}: a scorer prepares pictures in its own way and reads every prompt; leave these"
        " keys out",
    ),
    (
        lambda c: c.head.name == "cosine" and not (c.model.image_groups or c.model.text_layers),
        "head.name cosine has nothing but its scale to train where the towers are locked; let layers train"
        " (model.image_groups, model.text_layers), or take the head taste",
    ),
    (
        lambda c: c.data.streaming and c.data.validation is None,
        "data.streaming cannot hold prompts out; give data.validation",
    ),
    (
        lambda c: c.data.streaming and not (c.model.image_groups or c.model.text_layers),
        "data.streaming passes pictures once; towers that do not train are for sets whose embeddings are kept: let some"
        " layers train (model.image_groups), or download the set",
    ),
]


def load_scorer_config(argv: Sequence[str] | None = None) -> ScorerConfig:
    """Parse a command line. Raises ValueError, naming the key, for anything a run cannot use."""
    return check(load(argv, ScorerConfig), LIMITS, CONTRADICTIONS)
