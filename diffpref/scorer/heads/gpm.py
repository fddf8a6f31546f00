"""The General Preference Model: preferences that need not be transitive, and what to choose by them."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged

SMALL = 0.02  # standard deviation of the weights at the start
SLOWEST = 0.01  # share of a batch in the running reference, once there have been a hundred


# Zhang et al. 2024, arXiv 2410.02197:   s(a ≻ b | p) = v_aᵀ R v_b,   P = σ(s/τ),   R = diag of blocks [[0, −1], [1, 0]]
def skew(first: Tensor, second: Tensor) -> Tensor:
    """s [...] of vectors [..., V], V even; s(a, b) = −s(b, a), to the last bit."""
    a, b = first.unflatten(-1, (-1, 2)), second.unflatten(-1, (-1, 2))
    return (a[..., 1] * b[..., 0] - a[..., 0] * b[..., 1]).sum(-1)


class Gpm(Head):
    """Settings: width D; dim V, even; tau τ; prompt_scales, whether the prompt weighs the V/2 blocks.

    v = normalised W·[f, t, f∘t] + b, with block j times √λ_j(t) where the prompt weighs them; the λ_j are positive with
    mean 1. Where all vectors lie on one half circle the preference is a ranking, and there it begins: v is near
    (1, ⟨f,t⟩, 0, …), so s is near the difference of cosines. The other planes begin small. That is how they find
    cycles: within a plane that ranks already, no small step makes a cycle more probable. So one plane, dim 2, does not
    learn cycles from this start.

    No score gives such a preference, but lists want one: `scores` are s/τ against a reference, the mean vector of the
    training. They rank well where the preferences are near to transitive, and by `borda` or `von_neumann_winner` of
    the logits one chooses where they are not.
    """

    gives = frozenset({"vectors"})

    def __init__(self, width: int, dim: int = 6, tau: float = 0.1, prompt_scales: bool = False) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"head.dim must be even and at least 2, got {dim}: vectors are made of planes")
        self.settings = {"width": width, "dim": dim, "tau": tau, "prompt_scales": prompt_scales}
        self.vectors = nn.Linear(3 * width, dim)
        self.start(width)
        self.scales = nn.Linear(width, dim // 2) if prompt_scales else None
        if self.scales is not None:
            nn.init.zeros_(self.scales.weight)
            nn.init.zeros_(self.scales.bias)
        self.register_buffer("reference", F.one_hot(torch.tensor(0), dim).float())
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def start(self, width: int) -> None:
        """Vectors near (1, ⟨f,t⟩, 0, …)."""
        nn.init.normal_(self.vectors.weight, std=SMALL)
        self.vectors.bias.copy_(F.one_hot(torch.tensor(0), len(self.vectors.bias)))
        self.vectors.weight[:2] = 0
        self.vectors.weight[1, 2 * width :] = 1

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N] against the reference, vectors [N,V]."""
        vectors = F.normalize(self.vectors(torch.cat([image, text, image * text], dim=-1)), dim=-1)
        if self.scales is not None:
            weights = len(self.scales.bias) * self.scales(text).softmax(-1)
            vectors = vectors * weights.sqrt().repeat_interleave(2, dim=-1)
        if self.training:
            self.watch(vectors.detach())
        return Judged(scores=skew(vectors, self.reference.clone()) / self.settings["tau"], vectors=vectors)

    def logit(self, judged: Judged, first: Tensor, second: Tensor) -> Tensor:
        """s/τ, [P]."""
        return skew(judged.vectors[first], judged.vectors[second]) / self.settings["tau"]

    def warm(self, temperature: float) -> None:
        """τ is the scale."""
        self.settings["tau"] *= temperature

    @torch.no_grad()
    def watch(self, vectors: Tensor) -> None:
        """Take a batch [N,V] into the running mean vector; the first ones count alike."""
        self.batches += 1
        self.reference.lerp_(vectors.mean(0), (1 / self.batches).clamp(min=SLOWEST))


def borda(logits: np.ndarray) -> np.ndarray:
    """Log-odds [k,k] that the row is preferred to the column -> mean probability [k] of being preferred to one of the
    others; ½ for one alone."""
    chances = 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))
    np.fill_diagonal(chances, 0)
    return chances.sum(1) / (len(chances) - 1) if len(chances) > 1 else np.full(1, 0.5)


def von_neumann_winner(logits: np.ndarray) -> np.ndarray:
    """Log-odds [k,k], antisymmetric -> shares [k] of the lottery that no other is preferred to (Dudík et al. 2015,
    arXiv 1502.06362): the maximin strategy of the game with payoff σ(logit) − ½. A Condorcet winner gets all of it. Of
    several such lotteries, one whose greatest share is least.

        minimise m subject to Σ_i p_i·A_ij >= 0 for all j, p_i <= m, Σ_i p_i = 1, p_i >= 0
    """
    payoff = 0.5 * np.tanh(0.5 * np.asarray(logits, dtype=np.float64))
    k = len(payoff)
    beaten = np.concatenate([-payoff.T, np.zeros((k, 1))], axis=1)
    greatest = np.concatenate([np.eye(k), -np.ones((k, 1))], axis=1)
    found = linprog(
        c=np.eye(k + 1)[k],
        A_ub=np.concatenate([beaten, greatest]),
        b_ub=np.concatenate([np.full(k, 1e-9), np.zeros(k)]),
        A_eq=[[1.0] * k + [0.0]],
        b_eq=[1.0],
    )
    return found.x[:k]
