"""Losses of pairs: `loss(judged, logit [P], structure, *, options) -> [P]`.

The logit d is what the head says: log-odds that the chosen one is preferred, s_c − s_r of heads with one scale.

A tie is a pair whose probability is given and is exactly ½. It has no winner: it counts as half a pair each way, which
draws d to 0, and exchanging its items changes nothing. rao_kupper and aspects give ties a probability of their own.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.batch import Structure
from diffpref.objectives import pairs
from diffpref.scorer.heads.contract import Judged

NODES = 32  # of the Gauss-Hermite rule; for spreads of differences up to 3 it is exact to 1e-4
CERTAIN = 1e-6  # how near to 0 and 1 a probability may come where its log-odds are taken


def tied(structure: Structure) -> Tensor:
    """Which pairs are ties, [P]."""
    if structure.probability is None:
        return torch.zeros(len(structure.pairs), dtype=torch.bool, device=structure.pairs.device)
    return structure.probability == 0.5


def either_way(loss: Callable[[Tensor], Tensor], logit: Tensor, ties: Tensor) -> Tensor:
    """loss(d) of pairs [P], (loss(d) + loss(−d))/2 of those that are ties."""
    won = loss(logit)
    return torch.where(ties, 0.5 * (won + loss(-logit)), won)


# How strong preferences are, [P]. Scores may be means over an ensemble: "Secrets of RLHF II" measures strength so.
STRENGTHS: dict[str, Callable[[Structure], Tensor]] = {
    "scores": lambda structure: structure.scores[structure.chosen] - structure.scores[structure.rejected],
    "probability": lambda structure: torch.logit(structure.probability, CERTAIN),
}
MARGINS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda strength, size: torch.zeros_like(strength),
    "constant": lambda strength, size: torch.full_like(strength, size),
    "strength": lambda strength, size: size * strength,
}


def measures_strength(margin: str, flip_below: float | None) -> bool:
    """Whether these options of bradley_terry ask how strong preferences are."""
    return margin == "strength" or flip_below is not None


def contested(logit: Tensor, strength: Tensor, *, margin: str, margin_size: float, flip_below: float | None) -> Tensor:
    """The logit [P] less its margin; of pairs whose strength is below flip_below, that of the pair turned round, whose
    strength is turned round with it."""
    wrong = torch.zeros_like(strength, dtype=torch.bool) if flip_below is None else strength < flip_below
    sign = 1 - 2 * wrong.to(logit.dtype)
    return sign * logit - MARGINS[margin](sign * strength, margin_size)


# Bradley and Terry 1952, with a margin m and a share ε of the labels wrong, as in "Secrets of RLHF II" (Wang et al.
# 2024, arXiv 2401.06080):   −(1−ε)·log σ(d − m) − ε·log σ(−(d − m))
def bradley_terry(
    judged: Judged,
    logit: Tensor,
    structure: Structure,
    *,
    label_smoothing: float,
    margin: str,
    margin_size: float,
    strength: str,
    flip_below: float | None,
) -> Tensor:
    """[P]; ln 2 where d = m. Also ImageReward's loss, HPSv2's of pairs, PAL's logistic one, and with a head gpm, whose
    logit is s/τ, that of GPM (Zhang et al. 2024, arXiv 2410.02197). A tie has neither margin nor a wrong side."""
    ties = tied(structure)
    if margin != "none" or flip_below is not None:
        measured = STRENGTHS[strength](structure) if measures_strength(margin, flip_below) else torch.zeros_like(logit)
        options = {"margin": margin, "margin_size": margin_size, "flip_below": flip_below}
        logit = torch.where(ties, logit, contested(logit, measured, **options))
    return either_way(lambda d: pairs.conservative(d, structure, label_smoothing=label_smoothing), logit, ties)


# GPM (Zhang et al. 2024, arXiv 2410.02197), d = s/τ with s = v_cᵀ R v_r:   −log σ(s/τ)
def gpm(judged: Judged, logit: Tensor, structure: Structure) -> Tensor:
    """[P]; ln 2 where d = 0. It is bradley_terry on a logit that is no difference; the head divides by τ."""
    return either_way(lambda d: pairs.sigmoid(d, structure), logit, tied(structure))


# PickScore (Kirstain et al. 2023, arXiv 2305.01569), q = (p, 1−p), ties with p = ½:   KL(q ‖ softmax(s_c, s_r))
def soft_label(
    judged: Judged, logit: Tensor, structure: Structure, *, probability_range: tuple[float, float]
) -> Tensor:
    """[P]; 0 where σ(d) = p, so a tie is done at d = 0. The published code subtracts the entropy of ties only, which
    is the same for its labels 0, ½ and 1."""
    p = structure.probability.clamp(*probability_range)
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return pairs.soft_label(logit, structure, probability_range=probability_range) - entropy


# Rao and Kupper 1967, k = tie_factor:   P(c) = σ(d − ln k)   P(r) = σ(−d − ln k)   P(tie) = (k²−1)·P(c)·P(r)
def outcomes(logit: Tensor, tie_factor: float) -> Tensor:
    """log-probabilities [..., 3] that the first is better, the second is, or they tie; k > 1."""
    first, second = F.logsigmoid(logit - math.log(tie_factor)), F.logsigmoid(-logit - math.log(tie_factor))
    return torch.stack([first, second, first + second + math.log(tie_factor**2 - 1)], dim=-1)


def rao_kupper(judged: Judged, logit: Tensor, structure: Structure, *, tie_factor: float) -> Tensor:
    """[P]; −log of what happened; ln(1+k), or −ln((k−1)/(k+1)) for a tie, where d = 0. VideoAlign's and HPSv3's "btt"
    with k = 5."""
    happened = torch.where(tied(structure), 2, 0)
    return -outcomes(logit, tie_factor).gather(-1, happened[:, None])[:, 0]


# HPSv3 (Ma et al. 2025, arXiv 2508.03789), z ~ N(d, σ_c² + σ_r²):   −log E σ(z), or, as its code has it, −E log σ(z)
def gaussian(judged: Judged, logit: Tensor, structure: Structure, *, spread_average: str) -> Tensor:
    """[P]; bradley_terry where the spread is 0. Gauss–Hermite quadrature instead of the published 1000 draws, so it
    has no noise.

    log σ is concave: E log σ(z) <= log σ(d), so the published form is least without any spread, whatever the data. The
    likelihood has a use for spread: it makes a pair that went the wrong way less surprising.
    """
    variance = judged.spread[structure.chosen].square() + judged.spread[structure.rejected].square()
    average = spread_average == "probability"
    return either_way(lambda d: blurred(d, variance.sqrt(), average), logit, tied(structure))


# ∫ f(z) N(z; d, σ²) dz ≈ Σ_i w_i/√π · f(d + √2·σ·x_i), nodes and weights of Hermite's polynomials
def blurred(logit: Tensor, spread: Tensor, average_probability: bool) -> Tensor:
    """−log E σ(z) or −E log σ(z), [P]."""
    x, w = np.polynomial.hermite.hermgauss(NODES)
    nodes, log_weights = logit.new_tensor(x), logit.new_tensor(np.log(w) - 0.5 * math.log(math.pi))
    values = F.logsigmoid(logit[:, None] + math.sqrt(2) * spread[:, None] * nodes)
    return -(values + log_weights).logsumexp(1) if average_probability else -(values * log_weights.exp()).sum(1)


# PAL (Chen et al. 2024, arXiv 2406.08469), margin m, smoothed over γ (Rennie 2005):
#   0 for d >= m,   (m − d)²/(2γ) for m − γ <= d < m,   m − γ/2 − d below
def hinge(
    judged: Judged, logit: Tensor, structure: Structure, *, hinge_margin: float, hinge_smoothing: float
) -> Tensor:
    """[P]; with γ = 0 the plain hinge, relu(m − d)."""
    return either_way(lambda d: smooth_hinge(hinge_margin - d, hinge_smoothing), logit, tied(structure))


def smooth_hinge(short: Tensor, smoothing: float) -> Tensor:
    """Of what is short of the margin [P]: relu, rounded off over `smoothing`."""
    short = F.relu(short)
    if smoothing == 0:
        return short
    return torch.where(short < smoothing, 0.5 / smoothing * short.square(), short - 0.5 * smoothing)


# VideoReward (Liu et al. 2025, arXiv 2501.13918), d_a of aspect a:   Σ_a −log P(what was said of a) + w·(−log σ(d))
def aspects(
    judged: Judged,
    logit: Tensor,
    structure: Structure,
    *,
    tie_factor: float,
    aspect_ties: str,
    overall_weight: float,
) -> Tensor:
    """[P]. An aspect of which nothing was said (NaN) does not count; a pair of which nothing was said has the overall
    term alone. Ties in an aspect: rao_kupper, which also takes k for wins and losses, or ignored, where wins and losses
    are Bradley–Terry's. Every aspect has its own scale in the head."""
    said = structure.aspects
    differences = judged.aspects[structure.chosen] - judged.aspects[structure.rejected]
    losses = torch.where(said.isnan(), 0, ASPECT_TIES[aspect_ties](differences, said.nan_to_num(), tie_factor))
    overall = either_way(lambda d: pairs.sigmoid(d, structure), logit, tied(structure))
    return losses.sum(1) + overall_weight * overall


ASPECT_TIES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rao_kupper": lambda d, said, k: (
        -outcomes(d * torch.where(said == 0, 1, said), k).gather(-1, torch.where(said == 0, 2, 0)[..., None])[..., 0]
    ),
    "ignored": lambda d, said, k: -F.logsigmoid(d * said) * said.abs(),
}
