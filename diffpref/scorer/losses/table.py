"""LOSSES: every loss, and what it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffpref.objectives.pairs import keyword_names
from diffpref.scorer.losses.lists import hps, plackett_luce, rank_list
from diffpref.scorer.losses.pairs import aspects, bradley_terry, gaussian, gpm, hinge, rao_kupper, soft_label
from diffpref.scorer.losses.tastes import mixture, routing


@dataclass(frozen=True)
class Loss:
    """A loss function, `loss(judged, logit, structure, *, the options it uses) -> Tensor`, and what it reads.

    over: what it has an element for, pairs [P] or groups [G].  needs: fields of the data without which it cannot be,
    of pairs, scores, probability, aspects and user; needs_fields adds what options ask for. Every pair loss reads
    probability where the data have it, for ties.  reads: fields of Judged, beside the logit.
    """

    loss: Callable[..., Tensor]
    over: Literal["pairs", "groups"]
    needs: frozenset[str]
    reads: frozenset[str] = frozenset()

    @property
    def options(self) -> frozenset[str]:
        """Names of the settings that the loss takes."""
        return frozenset(keyword_names(self.loss))


def on_pairs(loss: Callable[..., Tensor], *fields: str, reads: tuple[str, ...] = ()) -> Loss:
    """One element per pair; needs the pairs and further fields."""
    return Loss(loss, "pairs", frozenset({"pairs", *fields}), frozenset(reads))


def on_lists(loss: Callable[..., Tensor]) -> Loss:
    """One element per list, of scores whose differences are log-odds."""
    return Loss(loss, "groups", frozenset({"scores"}), frozenset({"scores"}))


LOSSES: dict[str, Loss] = {
    "bradley_terry": on_pairs(bradley_terry),
    "soft_label": on_pairs(soft_label, "probability"),
    "hps": on_lists(hps),
    "rao_kupper": on_pairs(rao_kupper),
    "plackett_luce": on_lists(plackett_luce),
    "rank_list": on_lists(rank_list),
    "gaussian": on_pairs(gaussian, reads=("spread",)),
    "aspects": on_pairs(aspects, "aspects", reads=("aspects",)),
    "gpm": on_pairs(gpm, reads=("vectors",)),
    "mixture": on_pairs(mixture, reads=("components", "mixture")),
    "routing": on_pairs(routing, "user", reads=("components", "mixture")),
    "hinge": on_pairs(hinge),
}
