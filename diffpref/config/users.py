"""Configuration of whom a model is personalised for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class UsersConfig:
    """The users that a denoiser is conditioned on; README.md says what the data need.

    Args:
        source: Where users come from: few other pairs of theirs, read by an encoder (encoder); made-up users, whose
            tastes are drawn from an encoder's prior (tastes); a vector learned for each user of the data (table);
            states made before, such as those of a vision-language model (states); made-up users who weigh the scorers
            of data.scorers, one unit direction each (rewards). With none, nobody is asked.
        path: The encoder's folder, or the file of states.
        support: Fewest and most pairs that an encoder is shown; how many is drawn anew for every group.
        labels: What made-up tastes say of a pair (tastes): all they think of it, or its difference from what the
            population does, for an adapter on a base that has everybody's taste already (model.lora).
        dropout: Share of groups that are trained with the null user, who gets the LoRA alone; with an adapter alone
            they train nothing.
        width: Of the vectors of a table.
        weights: How made-up users weigh scorers: all of it on one (one_hot), or any share on each (sphere).
    """

    source: Literal["none", "encoder", "tastes", "table", "states", "rewards"] = "none"
    path: str | None = None
    support: tuple[int, int] = (1, 16)
    labels: Literal["taste", "difference"] = "taste"
    dropout: float = 0.1
    width: int = 64
    weights: Literal["one_hot", "sphere"] = "sphere"
