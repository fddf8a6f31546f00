"""What several heads are made of: a picture is compared with several things asked of it, all made of its prompt."""

import torch
from torch import Tensor, nn

APART = 0.1  # angle, about, by which queries that are to become different begin apart from the prompt


# q_k = (t + M_k·z) / n_k,   z = (1, V·t),   n_k² = ‖t‖² + 2·⟨t, M_k·z⟩ + zᵀ·M_kᵀM_k·z;   M_k [D,1+r], V [r,D]
class Queries(nn.Module):
    """K queries of a prompt, unit vectors. The first column of M_k asks for the same whatever the prompt is, as tastes
    do; the map of rank r asks for something else of each prompt. Where prompts are few it learns them by heart, so r is
    0 unless said.

    One query begins as the prompt's own embedding, so that the head begins with the backbone's ranking; several that
    are to become different begin near it (`apart`), as they could never part otherwise. The queries themselves,
    [N,K,D], are never made.
    """

    def __init__(self, width: int, count: int, *, rank: int, apart: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(count, width) * (APART / width**0.5 if apart else 0.0))
        self.inner = nn.Parameter(torch.randn(rank, width) / width**0.5) if rank else None
        self.outer = nn.Parameter(torch.zeros(count, width, rank)) if rank else None

    def maps(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """M [K,D,1+r] and z [N,1+r] of prompts [N,D]."""
        one = text.new_ones(len(text), 1)
        if self.inner is None or self.outer is None:
            return self.bias[..., None], one
        return torch.cat([self.bias[..., None], self.outer], -1), torch.cat([one, text @ self.inner.T], -1)

    def lengths(self, text: Tensor, m: Tensor, z: Tensor) -> Tensor:
        """n_k [N,K]."""
        square = torch.einsum("nr,krs,ns->nk", z, m.mT @ m, z)
        return (text.square().sum(-1, keepdim=True) + 2 * torch.einsum("nd,kdr,nr->nk", text, m, z) + square).sqrt()

    def cosines(self, image: Tensor, text: Tensor) -> Tensor:
        """⟨f, q_k(t)⟩ [N,K] of pictures and prompts [N,D]."""
        m, z = self.maps(text)
        along = (image * text).sum(-1, keepdim=True) + torch.einsum("nd,kdr,nr->nk", image, m, z)
        return along / self.lengths(text, m, z)

    def mixed(self, text: Tensor, shares: Tensor) -> Tensor:
        """Σ_k π_k·q_k(t) [N,D] with shares π [N,K]."""
        m, z = self.maps(text)
        shares = shares / self.lengths(text, m, z)
        return shares.sum(-1, keepdim=True) * text + torch.einsum("nk,kdr,nr->nd", shares, m, z)
