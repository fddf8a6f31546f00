"""What `reference.draws` cannot be had with, said before any model is loaded."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import DistributedType

from diffpref.config import Config
from diffpref.noise import needs_model
from diffpref.objectives import needs_drift, needs_reference

Refusal = tuple[Callable[[Config], bool], str]

# (whether a configuration is one of these, why its reference's errors are not kept and what to do)
REFUSALS: list[Refusal] = [
    (
        lambda c: not needs_reference(c.objective),
        "objective.name {c.objective.name} asks for no reference, so there is nothing to keep; leave it out",
    ),
    (
        lambda c: needs_drift(c.objective),
        "objective.name {c.objective.name} with drift_weight {c.objective.drift_weight:g} reads the distance of the two"
        " predictions, for which an error is not enough; leave it out, or take an objective without drift",
    ),
    (
        lambda c: needs_model(c.noise) and c.noise.inversion_network == "policy",
        "noise.inversion_network policy makes another noise at every step of training, and the draws are to stay the"
        " same; set it to reference",
    ),
    (
        lambda c: c.data.streaming,
        "data.streaming has no numbers of rows by which an error could be found again; leave one of the two out",
    ),
    (
        lambda c: c.users.source != "none",
        "users.source {c.users.source} draws with a row's noise, too, who is asked and whether anybody (users.dropout):"
        " a row would have the same few users for ever; leave one of the two out",
    ),
]
TOGETHER = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_draws(config: Config, accelerator: Accelerator) -> None:
    """Raise ValueError, with the reason and the mend, where the reference's errors cannot be kept."""
    if config.reference.draws is None:
        return
    for holds, reason in REFUSALS:
        if holds(config):
            raise ValueError(f"reference.draws: {reason.format(c=config)}")
    if accelerator.distributed_type in TOGETHER:
        raise ValueError(
            "reference.draws: with FSDP2 and DeepSpeed all processes go through the reference together, and here each"
            " one skips it where it has the errors; use ddp, or leave it out"
        )
