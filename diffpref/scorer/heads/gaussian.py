"""A head that says how sure it is of its score."""

import math

import torch
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.queries import Queries

NARROWEST, WIDEST = math.log(1e-3), math.log(1e2)  # spreads, in units of the logit


# μ = exp(τ)·⟨f, q(t)⟩,   ln σ = ⟨u, f⟩ + ⟨v, t⟩ + c: HPSv3's two outputs (Ma et al. 2025, arXiv 2508.03789)
class Gaussian(Head):
    """Settings: width D; logit_scale, τ at the start; spread, σ at the start, of all items; prompt_rank, of the query's
    map. Before training, the scores
    are the cosine's."""

    gives = frozenset({"scores", "spread"})

    def __init__(self, width: int, logit_scale: float = LARGEST, spread: float = 1.0, prompt_rank: int = 0) -> None:
        super().__init__()
        self.settings = {"width": width, "logit_scale": logit_scale, "spread": spread, "prompt_rank": prompt_rank}
        self.query = Queries(width, 1, rank=prompt_rank, apart=False, gated=True)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.log_spread = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.log_spread.weight)
        nn.init.constant_(self.log_spread.bias, math.log(spread))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N] with spread [N]."""
        scores = self.logit_scale.exp() * self.query.cosines(image, text)[:, 0]
        log_spread = self.log_spread(torch.cat([image, text], dim=-1))[:, 0]
        return Judged(scores=scores, spread=log_spread.clamp(NARROWEST, WIDEST).exp())

    @torch.no_grad()
    def clamp(self) -> None:
        """A factor of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)
