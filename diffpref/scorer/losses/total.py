"""From a loss's vector to the number that is differentiated, and the checks of its settings."""

from dataclasses import fields

from torch import Tensor

from diffpref.batch import Structure
from diffpref.objectives.total import reduce
from diffpref.scorer.heads import HEADS
from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.losses.config import LossConfig
from diffpref.scorer.losses.pairs import measures_strength
from diffpref.scorer.losses.table import LOSSES


def total(head: Head, judged: Judged, structure: Structure, config: LossConfig) -> tuple[Tensor, Tensor]:
    """(scalar to differentiate, the losses [P] or [G] without graph). The scalar is a mean inside each group, then over
    groups with their weights."""
    row = LOSSES[config.name]
    logit = head.logit(judged, structure.chosen, structure.rejected)
    losses = row.loss(judged, logit, structure, **{name: getattr(config, name) for name in row.options})
    return reduce(losses, structure, row.over), losses.detach()


def needs_fields(config: LossConfig) -> frozenset[str]:
    """Fields that the data must have: the loss's own, and those that its options ask for."""
    more = {config.strength} if measures_strength(config.margin, config.flip_below) else set()
    more |= {"user"} if config.one_taste == "user" else set()
    return LOSSES[config.name].needs | more


def check_loss(config: LossConfig, head: str) -> None:
    """Raise ValueError for an option that differs from its default and that the loss does not use, and for a head (a
    name in HEADS) that does not give what the loss reads; it names those that do."""
    row = LOSSES[config.name]
    for field in fields(config):
        if field.name not in row.options | {"name"} and getattr(config, field.name) != field.default:
            users = ", ".join(name for name, other in LOSSES.items() if field.name in other.options)
            raise ValueError(
                f"loss.{field.name} is not used by loss.name {config.name}; leave it out (it is for {users})"
            )
    if missing := row.reads - HEADS[head].gives:
        able = ", ".join(name for name, other in HEADS.items() if row.reads <= other.gives)
        raise ValueError(
            f"loss.name {config.name} reads {', '.join(sorted(missing))}, which head.name {head} does not give; heads"
            f" that do: {able}"
        )
