"""The head of CLIP, PickScore and HPS: how much picture and prompt point the same way."""

import math

import torch
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged

LARGEST = math.log(100)  # CLIP's own limit; beyond it scores only grow over-confident


class Cosine(Head):
    """Settings: width D; logit_scale, the logarithm of the factor before the cosine, at the start."""

    def __init__(self, width: int, logit_scale: float = LARGEST) -> None:
        super().__init__()
        self.settings = {"width": width, "logit_scale": logit_scale}
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N]."""
        # s = exp(τ) · <f, t>: Radford et al., 2021 (arXiv 2103.00020), section 2.3
        return Judged(scores=self.logit_scale.exp() * (image * text).sum(-1))

    @torch.no_grad()
    def clamp(self) -> None:
        """A factor of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)
