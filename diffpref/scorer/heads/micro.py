"""MiCRo: a few tastes, and a router that weighs them by the context (Shen et al. 2025, arXiv 2505.24846)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.queries import Queries

FAINTEST = 1e-12  # weight of a taste, so that its logarithm stays finite


class Micro(Head):
    """Settings: width D; tastes K; logit_scale, τ at the start; prompt_rank, of the queries' maps.

        r_k = exp(τ)·⟨f, q_k(t)⟩,   f(p) = softmax(G·t + g),   P(a ≻ b) = Σ_k f_k·σ(r_k(a) − r_k(b))

    `scores` are Σ_k f_k·r_k. Before training the tastes are near the cosine and weigh alike. A user's few choices
    change the weights, not the tastes: `context`. A mixture of rankings need not be transitive; its mean score is.
    """

    gives = frozenset({"components", "mixture"})

    def __init__(self, width: int, tastes: int = 8, logit_scale: float = LARGEST, prompt_rank: int = 0) -> None:
        super().__init__()
        self.settings = {"width": width, "tastes": tastes, "logit_scale": logit_scale, "prompt_rank": prompt_rank}
        self.queries = Queries(width, tastes, rank=prompt_rank, apart=tastes > 1, gated=True)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.router = nn.Linear(width, tastes)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N], components [N,K], mixture [N,K]."""
        components = self.logit_scale.exp() * self.queries.cosines(image, text)
        return weighed(components, self.router(text).softmax(-1).clamp(min=FAINTEST))

    def logit(self, judged: Judged, first: Tensor, second: Tensor) -> Tensor:
        """ln P(a ≻ b) − ln P(b ≻ a), [P]. Where the two have different prompts, with the mean of their weights."""
        d = judged.components[first] - judged.components[second]
        weights = (0.5 * (judged.mixture[first] + judged.mixture[second])).log()
        return (weights + F.logsigmoid(d)).logsumexp(-1) - (weights + F.logsigmoid(-d)).logsumexp(-1)

    @torch.no_grad()
    def clamp(self) -> None:
        """A factor of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)


def weighed(components: Tensor, mixture: Tensor) -> Judged:
    """What tastes with these weights say."""
    return Judged(scores=(components * mixture).sum(-1), components=components, mixture=mixture)


# Hedge (Freund and Schapire 1997), as in MiCRo's stage 2:   ω_k ∝ f_k·exp(−L_k/τ)
def hedge(mixture: Tensor, losses: Tensor, temperature: float = 1.0) -> Tensor:
    """Weights [..., K] of tastes after losses [..., K]. With τ = 1 and, for L, the sum of −log P(choice) over a user's
    choices, they are the tastes' posterior probabilities given these choices."""
    return torch.softmax(mixture.log() - losses / temperature, dim=-1)


def context(judged: Judged, pairs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """A user's weights [K] of the tastes, from their P choices (chosen, rejected) [P,2] among what was judged: Hedge
    from the router's mean weights. `in_context` puts them in the router's place."""
    d = judged.components[pairs[:, 0]] - judged.components[pairs[:, 1]]
    return hedge(judged.mixture.mean(0), -F.logsigmoid(d).sum(0), temperature)


def in_context(judged: Judged, weights: Tensor) -> Judged:
    """The same items as a user with weights [K], or each item's user [N,K], sees them."""
    return weighed(judged.components, weights.expand_as(judged.components))
