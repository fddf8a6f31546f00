"""Losses of heads with several tastes: `loss(judged, logit, structure, *, options) -> [P]`.

Taste k sees the log-odds d_k = r_k(c) − r_k(r) [P,K]; f_k [P,K] is the weight that the head gives it for the pair's
prompt. MiCRo (Shen et al. 2025, arXiv 2505.24846).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.batch import Structure
from diffpref.scorer.heads.contract import Judged
from diffpref.scorer.heads.micro import hedge
from diffpref.scorer.losses.pairs import tied


def log_likelihoods(judged: Judged, structure: Structure) -> Tensor:
    """log P [P,K] of each pair under each taste; of a tie, the mean of both ways."""
    d = judged.components[structure.chosen] - judged.components[structure.rejected]
    half = 0.5 * (F.logsigmoid(d) + F.logsigmoid(-d))
    return torch.where(tied(structure)[:, None], half, F.logsigmoid(d))


def by_user(values: Tensor, structure: Structure) -> Tensor:
    """Sums of values [P,K] over all pairs of a user, at each of these pairs: [P,K]."""
    user = structure.user[structure.chosen]
    same = user[:, None] == user
    return same.to(values.dtype) @ values


# Stage 1:   −log Σ_k f_k·σ(d_k) + α·Σ_k f_k·log f_k
# A taste a user: a user's n pairs are one draw from the mixture, of which each has the share 1/n
#   −1/n·log Σ_k f_k·Π_pairs σ(d_k),   f the mean over the pairs
def mixture(judged: Judged, logit: Tensor, structure: Structure, *, entropy_weight: float, one_taste: str) -> Tensor:
    """[P]; with one taste, bradley_terry.

    One choice does not show which taste made it: with one_taste "pair" tastes are told apart by the prompts alone, as
    published. With "user" the users tell them apart, provided that a batch has several pairs of each.
    """
    f, likelihood = judged.mixture[structure.chosen], log_likelihoods(judged, structure)
    entropy = torch.special.entr(f).sum(1)
    if one_taste == "pair":
        return -(f.log() + likelihood).logsumexp(1) - entropy_weight * entropy
    pairs = by_user(torch.ones_like(f), structure)
    shared = -((by_user(f, structure) / pairs).log() + by_user(likelihood, structure)).logsumexp(1)
    return shared / pairs[:, 0] - entropy_weight * entropy


# Stage 2:   −Σ_k ω_k·log f_k,   ω the Hedge update of f by the losses of a user's pairs in the batch
def routing(judged: Judged, logit: Tensor, structure: Structure, *, hedge_temperature: float) -> Tensor:
    """[P]. Only the router learns: ω has no gradient, and the tastes do not enter otherwise."""
    f = judged.mixture[structure.chosen]
    target = hedge(f, -by_user(log_likelihoods(judged, structure), structure), hedge_temperature).detach()
    return -(target * f.log()).sum(1)
