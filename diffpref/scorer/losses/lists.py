"""Losses of lists: `loss(judged, logit, structure, *, options) -> [G]`, on the head's scores s [N].

Lists are groups of any length, without padding; a list of one has loss 0. What data say is structure.scores φ [N],
higher is better; items of equal φ are ties.
"""

import torch
from torch import Tensor

from diffpref.batch import Structure
from diffpref.objectives.lists import beats, group_log_softmax, group_sums, ranks
from diffpref.scorer.heads.contract import Judged


# HPS and HPSv2 (Wu et al. 2023, arXiv 2306.09341, its PreferenceLoss), q the best item of the list:
#   −Σ_i q_i·log softmax(s)_i
def hps(judged: Judged, logit: Tensor, structure: Structure) -> Tensor:
    """[G]; ln k where scores are equal; of two, bradley_terry. Only the best item is told from the rest. Items that
    share the first place share q; a list in which all are equal draws its scores together."""
    best = ~beats(structure.scores, structure.group).any(0)
    best = best.to(judged.scores.dtype)
    shares = group_sums(best, structure.group, len(structure.weight))[structure.group]
    losses = -best / shares * group_log_softmax(judged.scores, structure.group)
    return group_sums(losses, structure.group, len(structure.weight))


# How an item meets those of equal φ, itself among them: weights [N,N] in the contest of the row, by the number t [N] of
# items that share the place and this one's number j [N] among them, 0..t-1.
TIE_WEIGHTS = {
    # Breslow 1974: all of them are still there in each of their contests
    "breslow": lambda j, t: torch.ones_like(j),
    # Efron 1977: in each contest, one more has left on average
    "efron": lambda j, t: 1 - j / t,
}


# Plackett 1975, Luce 1959: places are filled from the best, each by a choice among those that are left
#   1/T·Σ_j [log Σ_i w_ji·exp(s_i) − s_j],   w_ji = 1 for items below j, tie weights for those of j's own φ
def plackett_luce(judged: Judged, logit: Tensor, structure: Structure, *, top: int | None, list_ties: str) -> Tensor:
    """[G]; ln(k!)/(k−1) where scores are equal; of two, bradley_terry; without ties and with all places,
    objectives/lists.py's diffusion_lpo. A mean over the T contests that have more than one item and are for one of the
    `top` first places.

    Ties: Breslow's weights, or Efron's, close to the mean over all orders of the tied items.
    """
    phi, group = structure.scores, structure.group
    below, equal = beats(phi, group), (phi[:, None] == phi) & (group[:, None] == group)
    number = equal.tril(-1).sum(1, dtype=judged.scores.dtype)
    weights = TIE_WEIGHTS[list_ties](number, equal.sum(1))[:, None] * equal + below
    losses = (judged.scores + weights.log()).logsumexp(1) - judged.scores
    contests = (below | equal).sum(1) > 1
    # places in the order of φ, ties in the order in which they come
    places = ranks(phi, -number, group)
    return mean_where(losses, contests if top is None else contests & (places <= top), structure)


def mean_where(losses: Tensor, counted: Tensor, structure: Structure) -> Tensor:
    """Means [G] of the losses [N] that count; 0 where none does."""
    counted = counted.to(losses.dtype)
    terms = group_sums(counted, structure.group, len(structure.weight))
    return group_sums(losses * counted, structure.group, len(structure.weight)) / terms.clamp(min=1)


# RankList (Naini et al. 2025, arXiv 2508.09826), levels l_j = how many different φ of the list are above that of j:
#   1/T·Σ_j log(1 + Σ_{i: l_i − l_j = 1} exp(s_i − s_j) + λ·Σ_{i: 2 <= l_i − l_j <= skip} exp(s_i − s_j))
def rank_list(judged: Judged, logit: Tensor, structure: Structure, *, skip: int, skip_weight: float) -> Tensor:
    """[G]; of two, bradley_terry (RankNet); with skip 1 and no ties, RankNet on neighbours.

    From the paper's abstract: RankNet made list-wise, with local constraints and non-local ones, a log-sum-exp
    approximation, and skip-wise comparisons that reach farther by and by. Its equations were not at hand; what is
    defined here is: an item must beat its neighbours (local) and those up to `skip` levels below (non-local, weight λ),
    all in one log-sum-exp, a smooth maximum of what it lacks; a mean over the T items with any below them. With λ = 1
    and a long skip it is Plackett–Luce. Ties share a level and do not compete.
    """
    steps = levels_below(structure)
    weights = (steps == 1) + skip_weight * ((steps >= 2) & (steps <= skip))
    gaps = judged.scores - judged.scores[:, None]
    itself = torch.eye(len(gaps), dtype=gaps.dtype, device=gaps.device)
    losses = (gaps + (weights + itself).log()).logsumexp(1)
    return mean_where(losses, (steps >= 1).any(1), structure)


def levels_below(structure: Structure) -> Tensor:
    """[N,N]: how many levels of φ the item of the column is below that of the row; 0 for all that are not below."""
    ahead = beats(structure.scores, structure.group)
    same = (structure.scores[:, None] == structure.scores) & (structure.group[:, None] == structure.group)
    first = ~same.tril(-1).any(1)
    level = (ahead & first[:, None]).sum(0)
    return torch.where(ahead, level - level[:, None], 0)
