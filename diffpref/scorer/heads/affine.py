"""The head of LAION's aesthetic predictors: a score of the picture alone."""

import torch
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged


class Affine(Head):
    """Settings: width D. Starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def warm(self, temperature: float) -> None:
        """The line's slope and height are the scale."""
        self.weight.div_(temperature)
        self.bias.div_(temperature)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N]; the prompts are not read."""
        # s = <w, f> + b
        return Judged(scores=image @ self.weight + self.bias)
