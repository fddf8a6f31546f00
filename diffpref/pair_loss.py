"""Errors and loss of a batch: in three launches where a kernel has the objective, by errors.py and objectives/ where
not. The two compute the same."""

import math
from collections.abc import Callable

from torch import Tensor

from diffpref.batch import Errors, Structure
from diffpref.errors import Mixture, parts
from diffpref.objectives import OBJECTIVES, Settings

# The kernel's link of each objective, and its three numbers; triton_kernels/preference_head.py has the equations.
LINKS: dict[str, Callable[..., tuple[str, float, float, float]]] = {
    "dpo": lambda s: ("logistic", 1.0, 0.0, 0.0),
    "dcpo": lambda s: ("logistic", 1.0, 0.0, 0.0),
    "cdpo": lambda s: ("logistic", 1 - s.label_smoothing, s.label_smoothing, 0.0),
    "rdpo": lambda s: (
        "logistic",
        (1 - s.label_smoothing) / (1 - 2 * s.label_smoothing),
        -s.label_smoothing / (1 - 2 * s.label_smoothing),
        0.0,
    ),
    "ipo": lambda s: ("square", 1 / (2 * s.ipo_tau), 0.0, 0.0),
    "hinge": lambda s: ("hinge", 0.0, 0.0, 0.0),
    "exo": lambda s: ("exclusive", math.log1p(-s.label_smoothing), math.log(s.label_smoothing), 0.0),
    "osp": lambda s: ("soft_label", *s.probability_range, 0.0),
    "smpo": lambda s: ("smoothed", *s.probability_range, s.smoothing),
}


def eligible(settings: Settings, structure: Structure) -> bool:
    """Whether `fused_total` has this objective: one of the pair family, without the plug-ins that go beside it."""
    plain = not settings.sft_weight and not settings.drift_weight and settings.safeguard is None
    known = "probability" not in OBJECTIVES[settings.name].needs or structure.probability is not None
    return settings.name in LINKS and plain and known


def fused_total(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor | Mixture,
    weight: Tensor,
    structure: Structure,
    settings: Settings,
    *,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
    reference_error: Tensor | None = None,
) -> tuple[Errors, Tensor, Tensor]:
    """(Errors without graph, scalar to differentiate, the pairs' losses [P] without graph): `item_errors` and
    `objectives.total` in three launches, gradient included. Tensors must be where Triton can run, the objective
    `eligible`.

    Args:
        policy: p [N,...], and reference, target, weight, mask, reference_error as for `item_errors`.
        reference: r [N,...], or None with reference_error.
        target: y.
        weight: w [N].
        structure: Pairs, groups and their weights.
        settings: The objective.
        beta: [] on the device, in place of settings.beta.
        mask: Of the mean.
        reference_error: [N].
    """
    from diffpref.triton_kernels.preference_head import preference_loss

    link, *numbers = LINKS[settings.name](settings)
    found = preference_loss(
        policy,
        reference,
        weight=weight,
        pairs=structure.pairs,
        group=structure.group,
        group_weight=structure.weight,
        link=link,
        numbers=(numbers[0], numbers[1], numbers[2]),
        beta=settings.beta if beta is None else beta,
        cap=settings.margin_cap,
        anchor=settings.winner_anchor,
        probability=structure.probability if link in ("soft_label", "smoothed") else None,
        mask=mask,
        reference_error=reference_error,
        **parts(target),
    )
    loss, losses, _, _, error, advantage = found
    return Errors(error, advantage), loss, losses
