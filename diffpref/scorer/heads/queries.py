"""What several heads are made of: a picture is compared with several things asked of it, all made of its prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

APART = 0.1  # angle, about, by which queries that are to become different begin apart from the prompt


class Queries(nn.Module):
    """K queries of a prompt, unit vectors: q_k = W_k·t + b_k, normalised. W_k lets a query ask for something else of
    each prompt, b_k for the same of all.

    One query begins as the prompt's own embedding, so that the head begins with the backbone's ranking; several that
    are to become different begin near it (`apart`), as they could never part otherwise.
    """

    def __init__(self, width: int, count: int, *, apart: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).repeat(count, 1, 1))
        self.bias = nn.Parameter(torch.randn(count, width) * (APART / width**0.5 if apart else 0.0))

    def forward(self, text: Tensor) -> Tensor:
        """Prompts' unit vectors [N,D] -> queries [N,K,D]."""
        return F.normalize(torch.einsum("kde,ne->nkd", self.weight, text) + self.bias, dim=-1)
