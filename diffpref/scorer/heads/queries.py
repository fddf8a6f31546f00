"""What several heads are made of: a picture is compared with several things asked of it, all made of its prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

APART = 0.1  # angle, about, by which queries that are to become different begin apart from the prompt


# q_k = normalised t + b_k + U_k·V·t,   U_k [D,r], V [r,D]
class Queries(nn.Module):
    """K queries of a prompt, unit vectors. b_k asks for the same whatever the prompt is, as tastes do; the map of rank
    r asks for something else of each prompt. Where prompts are few it learns them by heart, so r is 0 unless said.

    One query begins as the prompt's own embedding, so that the head begins with the backbone's ranking; several that
    are to become different begin near it (`apart`), as they could never part otherwise.
    """

    def __init__(self, width: int, count: int, *, rank: int, apart: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(count, width) * (APART / width**0.5 if apart else 0.0))
        self.inner = nn.Parameter(torch.randn(rank, width) / width**0.5) if rank else None
        self.outer = nn.Parameter(torch.zeros(count, width, rank)) if rank else None

    def forward(self, text: Tensor) -> Tensor:
        """Prompts' unit vectors [N,D] -> queries [N,K,D]."""
        moved = text[:, None] + self.bias
        if self.inner is not None and self.outer is not None:
            moved = moved + torch.einsum("kdr,re,ne->nkd", self.outer, self.inner, text)
        return F.normalize(moved, dim=-1)
