"""A head for what people like whatever the prompt is, beside what the prompt asks for."""

import torch
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.queries import Queries


class Taste(Head):
    """Settings: width D; logit_scale, τ at the start.

    A cosine with the prompt's vector moved by a taste b [D] that all prompts share. Before training b is 0 and the
    ranking the backbone's; its D numbers are learned from few pairs, and hold for prompts that training has not seen.
    """

    def __init__(self, width: int, logit_scale: float = LARGEST) -> None:
        super().__init__()
        self.settings = {"width": width, "logit_scale": logit_scale}
        self.queries = Queries(width, 1, rank=0, apart=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N]."""
        # s = exp(τ)·<f, q>,   q = normalised t + b
        return Judged(scores=self.logit_scale.exp() * self.queries.cosines(image, text)[:, 0])

    @torch.no_grad()
    def clamp(self) -> None:
        """A factor of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)
