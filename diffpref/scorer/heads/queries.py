"""What several heads are made of: a picture is compared with several things asked of it, all made of its prompt."""

import torch
from torch import Tensor, nn

APART = 0.1  # angle, about, by which queries that are to become different begin apart from the prompt
SHORTEST = 1e-12  # square of a length, of which rounding could make less than nothing


# q_k = (g_k·t + M_k·z) / n_k,   z = (1, V·t),   n_k² = g_k²·‖t‖² + 2·g_k·⟨t, M_k·z⟩ + zᵀ·M_kᵀM_k·z
#   V [r,D],   M_k [D,1+r] = (b + b_k, U_k)
class Queries(nn.Module):
    """K queries of a prompt, unit vectors. b, common to all, and b_k ask for the same whatever the prompt is, as tastes
    do; the map of rank r asks for something else of each prompt. Where prompts are few it learns them by heart, so r is
    0 unless said.

    One query begins as the prompt's own embedding, so that the head begins with the backbone's ranking; several that
    are to become different (`apart`) begin near it, as they could never part otherwise, and have the common b. g_k is 1
    unless `gated`: then it is learned, and a query may forget the prompt. The queries themselves, [N,K,D], are never
    made.
    """

    def __init__(self, width: int, count: int, *, rank: int, apart: bool, gated: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(count, width) * (APART / width**0.5 if apart else 0.0))
        self.common = nn.Parameter(torch.zeros(width)) if apart else None
        self.gate = nn.Parameter(torch.ones(count)) if gated else None
        self.inner = nn.Parameter(torch.randn(rank, width) / width**0.5) if rank else None
        self.outer = nn.Parameter(torch.zeros(count, width, rank)) if rank else None

    def maps(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g [K], M [K,D,1+r] and z [N,1+r] of prompts [N,D]."""
        gate = self.bias.new_ones(len(self.bias)) if self.gate is None else self.gate
        bias = (self.bias if self.common is None else self.bias + self.common)[..., None]
        one = text.new_ones(len(text), 1)
        if self.inner is None or self.outer is None:
            return gate, bias, one
        return gate, torch.cat([bias, self.outer], -1), torch.cat([one, text @ self.inner.T], -1)

    def lengths(self, text: Tensor, g: Tensor, m: Tensor, z: Tensor) -> Tensor:
        """n_k [N,K]."""
        own = g.square() * text.square().sum(-1, keepdim=True)
        mixed = 2 * g * torch.einsum("nd,kdr,nr->nk", text, m, z)
        return (own + mixed + torch.einsum("nr,krs,ns->nk", z, m.mT @ m, z)).clamp(min=SHORTEST).sqrt()

    def cosines(self, image: Tensor, text: Tensor) -> Tensor:
        """⟨f, q_k(t)⟩ [N,K] of pictures and prompts [N,D]."""
        g, m, z = self.maps(text)
        along = g * (image * text).sum(-1, keepdim=True) + torch.einsum("nd,kdr,nr->nk", image, m, z)
        return along / self.lengths(text, g, m, z)

    def mixed(self, text: Tensor, shares: Tensor) -> Tensor:
        """Σ_k π_k·q_k(t) [N,D] with shares π [N,K]."""
        g, m, z = self.maps(text)
        shares = shares / self.lengths(text, g, m, z)
        return (shares @ g)[:, None] * text + torch.einsum("nk,kdr,nr->nd", shares, m, z)
