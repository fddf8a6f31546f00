"""Every objective, on short vectors: errors [N] and comparisons [P] in, one loss per comparison out.

    A = e_ref − e_θ                      advantage of an item: how much better than the reference the policy fits it
    h = (β/2)·(A_chosen − A_rejected)    preference logit; errors are means over elements

so β = 5000 means what Diffusion-DPO's `--beta_dpo 5000` means. With a sum over D elements instead, β_sum = β / D.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ItemErrors(Protocol):
    """What an objective reads of the errors: policy [N], advantage [N] (or None)."""

    policy: Tensor
    advantage: Tensor | None


class Comparisons(Protocol):
    """What an objective reads of the batch's structure: chosen [P], rejected [P] item indices, weight [P]."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor


def margin(errors: ItemErrors, batch: Comparisons) -> Tensor:
    """A_chosen − A_rejected, [P]."""
    return errors.advantage[batch.chosen] - errors.advantage[batch.rejected]


def logit(errors: ItemErrors, batch: Comparisons, beta: float, cap: float | None) -> Tensor:
    """h = (β/2)·margin, [P]; constant, so without gradient, beyond the cap: a pair that is won need not be won more."""
    h = 0.5 * beta * margin(errors, batch)
    return h if cap is None else h.clamp(max=cap)


# Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14 with ω(λ_t)T absorbed in β):  −log σ(min(h, cap))
def dpo(errors: ItemErrors, batch: Comparisons, *, beta: float, margin_cap: float | None = None) -> Tensor:
    """Loss per comparison, [P]; ln 2 where policy = reference. β multiplies half the margin of mean errors."""
    return -F.logsigmoid(logit(errors, batch, beta, margin_cap))


# Supervised fine-tuning on the winners:  e_θ(x_chosen)
def sft(errors: ItemErrors, batch: Comparisons, *, beta: float, margin_cap: float | None = None) -> Tensor:
    """Loss per comparison, [P]: the winner's own denoising error. β and cap are not used."""
    return errors.policy[batch.chosen]


@dataclass(frozen=True)
class Objective:
    """A loss function and what it needs: `reference` says whether the batch goes through the reference model as
    well."""

    loss: Callable[..., Tensor]
    reference: bool


OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo, reference=True),
    "sft": Objective(sft, reference=False),
}


@torch.no_grad()
def preference_metrics(errors: ItemErrors, batch: Comparisons, *, beta: float) -> dict[str, Tensor]:
    """Vectors [P] under TRL's names where TRL has them; the trainer averages them.

    rewards/* = (β/2)·A; rewards/accuracies = 1 where the margin is positive, ½ at exactly 0; errors/* = e_θ;
    drift/* = e_θ − e_ref: above zero for winners, the policy has become worse at what it should make (the known
    failure of margin losses).
    """
    sides = {"chosen": batch.chosen, "rejected": batch.rejected}
    metrics = {f"errors/{side}": errors.policy[items] for side, items in sides.items()}
    if errors.advantage is None:
        return metrics
    difference = margin(errors, batch)
    metrics |= {f"rewards/{side}": 0.5 * beta * errors.advantage[items] for side, items in sides.items()}
    metrics |= {f"drift/{side}": -errors.advantage[items] for side, items in sides.items()}
    metrics["rewards/margins"] = 0.5 * beta * difference
    metrics["rewards/accuracies"] = 0.5 * (1 + difference.sign())
    return metrics
