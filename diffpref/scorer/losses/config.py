"""The section that says which loss a scorer is trained with. The docstring is the help text, too."""

from dataclasses import dataclass
from typing import Literal

from diffpref.config.limits import NOT_NEGATIVE, POSITIVE, Limits


@dataclass(frozen=True)
class LossConfig:
    """What a scorer is trained with. The docstrings in diffpref/scorer/losses have the equations.

    Args:
        name: A row of LOSSES.
        label_smoothing: Share of labels taken to be wrong (bradley_terry).
        margin: What a pair must be won by (bradley_terry): nothing, margin_size, or margin_size times the strength of
            the preference.
        margin_size: See margin; VideoAlign's constant is 0.57.
        strength: How strong a preference is (bradley_terry): the difference of the pair's scores, as an ensemble of
            scorers may have given them, or the log-odds of its probability.
        flip_below: Pairs whose strength is below this are taken to be labelled the wrong way round (bradley_terry);
            0 where the strength's sign says who is right.
        probability_range: Preference probabilities are clipped to it (soft_label).
        tie_factor: k of Rao and Kupper (rao_kupper, aspects): with equal scores, (k-1)/(k+1) of the comparisons are
            ties. VideoAlign has 5.
        top: Only the contests for so many first places count (plackett_luce); all, when it is null.
        list_ties: How items of equal score share their places (plackett_luce).
        skip: How many levels below an item still count as comparisons with it (rank_list); 1 has neighbours only.
        skip_weight: What the comparisons beyond the neighbours count (rank_list).
        spread_average: What is averaged over the spread (gaussian): the probability, as the likelihood says, or the
            loss, as HPSv3's code has it, which only ever makes the spread smaller.
        aspect_ties: What a tie in an aspect does (aspects): it has a probability of its own, or none asks.
        overall_weight: What the pair as a whole counts beside its aspects (aspects).
        entropy_weight: α of MiCRo, which draws the weights of the tastes apart from any one (mixture).
        one_taste: For whom one taste is drawn (mixture): for each pair, or for each user, whose pairs in the batch
            then share it.
        hedge_temperature: τ of the Hedge update, in units of the loss (routing).
        hinge_margin: Log-odds beyond which a pair no longer pushes (hinge).
        hinge_smoothing: γ, the stretch before the margin in which the hinge is a parabola (hinge); PAL has 5.
    """

    name: Literal[
        "bradley_terry",
        "soft_label",
        "hps",
        "rao_kupper",
        "plackett_luce",
        "rank_list",
        "gaussian",
        "aspects",
        "gpm",
        "mixture",
        "routing",
        "hinge",
    ] = "bradley_terry"
    label_smoothing: float = 0.0
    margin: Literal["none", "constant", "strength"] = "none"
    margin_size: float = 1.0
    strength: Literal["scores", "probability"] = "scores"
    flip_below: float | None = None
    probability_range: tuple[float, float] = (0.0, 1.0)
    tie_factor: float = 5.0
    top: int | None = None
    list_ties: Literal["breslow", "efron"] = "breslow"
    skip: int = 2
    skip_weight: float = 1.0
    spread_average: Literal["probability", "loss"] = "probability"
    aspect_ties: Literal["rao_kupper", "ignored"] = "rao_kupper"
    overall_weight: float = 1.0
    entropy_weight: float = 0.5
    one_taste: Literal["pair", "user"] = "pair"
    hedge_temperature: float = 1.0
    hinge_margin: float = 1.0
    hinge_smoothing: float = 0.0


LIMITS: Limits = {
    "loss.label_smoothing": ("must lie in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "loss.probability_range": ("must be lowest and highest in [0, 1]", lambda x: 0 <= x[0] < x[1] <= 1),
    "loss.tie_factor": ("must be greater than 1", lambda x: x > 1),
    "loss.top": POSITIVE,
    "loss.skip": POSITIVE,
    "loss.skip_weight": NOT_NEGATIVE,
    "loss.overall_weight": NOT_NEGATIVE,
    "loss.entropy_weight": NOT_NEGATIVE,
    "loss.hedge_temperature": POSITIVE,
    "loss.hinge_smoothing": NOT_NEGATIVE,
}
