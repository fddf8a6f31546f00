"""PAL: every user is a mixture of a few prototypes (Chen et al. 2024, arXiv 2406.08469)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpref.scorer.heads.contract import Head, Judged
from diffpref.scorer.heads.cosine import LARGEST
from diffpref.scorer.heads.queries import APART, Queries

NEAREST = 1e-6  # distance below which its square root has no gradient to speak of
SHRINKAGE = 0.1  # share of the identity's part in the prior's covariance, which few users would leave singular


class Pal(Head):
    """Settings: width D; kind "a" or "b"; prototypes K; users, how many it knows; logit_scale, τ at the start;
    prompt_rank, of kind b's maps.

    Shares of user i: π_i [K] = softmax(w_i). A user it does not know, number −1, has the mean shares of those it does.

        kind a, ideal point:        s = −exp(τ)·‖A·f − (t + Σ_k π_ik·p_k)‖
        kind b, mixture of maps:    s = exp(τ)·cos(f, Σ_k π_ik·q_k(t))

    Before training A is the identity, the p_k are small and the q_k near t, all users are alike, and the ranking is the
    backbone's. The paper's ideal point is p alone; here it is where the prompt is, moved by the user's taste.
    """

    def __init__(
        self,
        width: int,
        kind: str = "b",
        prototypes: int = 8,
        users: int = 0,
        logit_scale: float = LARGEST,
        prompt_rank: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"head.kind must be one of {', '.join(KINDS)}, got {kind}")
        self.settings = {
            "width": width,
            "kind": kind,
            "prototypes": prototypes,
            "users": users,
            "logit_scale": logit_scale,
            "prompt_rank": prompt_rank,
        }
        self.tastes = KINDS[kind](width, prototypes, prompt_rank)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.users = nn.Embedding(users, prototypes)
        nn.init.zeros_(self.users.weight)

    def forward(self, image: Tensor, text: Tensor, user: Tensor | None = None) -> Judged:
        """Scores [N] of the users."""
        return self.judge(image, text, self.shares(user, len(image)))

    def judge(self, image: Tensor, text: Tensor, shares: Tensor) -> Judged:
        """Scores [N] of users with the shares [N,K]."""
        return Judged(scores=self.logit_scale.exp() * self.tastes(image, text, shares))

    def shares(self, user: Tensor | None, count: int) -> Tensor:
        """π [N,K] of users by number; without any, the population's."""
        population = self.population().expand(count, -1)
        if user is None or not self.users.num_embeddings:
            return population
        known = self.users(user.clamp(min=0)).softmax(-1)
        return torch.where((user >= 0)[:, None], known, population)

    def population(self) -> Tensor:
        """Mean shares [K] of all users; equal ones if there are none."""
        if not self.users.num_embeddings:
            return self.logit_scale.new_full((self.users.embedding_dim,), 1 / self.users.embedding_dim)
        return self.users.weight.softmax(-1).mean(0)

    def add_user(self, logits: Tensor) -> int:
        """Take in a user by the w [K] that `fit_user` found; returns their number."""
        table = torch.cat([self.users.weight.detach(), logits.to(self.users.weight)[None]])
        self.users = nn.Embedding.from_pretrained(table, freeze=not self.users.weight.requires_grad)
        self.settings["users"] = len(table)
        return len(table) - 1

    @torch.no_grad()
    def clamp(self) -> None:
        """A factor of at most 100."""
        self.logit_scale.clamp_(max=LARGEST)


class IdealPoint(nn.Module):
    """Kind a."""

    def __init__(self, width: int, prototypes: int, rank: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.eye(width))
        self.points = nn.Parameter(torch.randn(prototypes, width) * APART / width**0.5)

    def forward(self, image: Tensor, text: Tensor, shares: Tensor) -> Tensor:
        """−distance [N]."""
        off = image @ self.map.T - text - shares @ self.points
        return -(off.square().sum(-1) + NEAREST**2).sqrt()


class Maps(nn.Module):
    """Kind b."""

    def __init__(self, width: int, prototypes: int, rank: int) -> None:
        super().__init__()
        self.queries = Queries(width, prototypes, rank=rank, apart=prototypes > 1, gated=True)

    def forward(self, image: Tensor, text: Tensor, shares: Tensor) -> Tensor:
        """Cosine [N]."""
        return (image * F.normalize(self.queries.mixed(text, shares), dim=-1)).sum(-1)


KINDS = {"a": IdealPoint, "b": Maps}


# Maximum a posteriori of a new user's w [K] given their choices, with the known users as the prior:
#   Σ_pairs −log σ(s_c − s_r) + strength/2·(w − m)ᵀ C⁻¹ (w − m)
def fit_user(head: Pal, image: Tensor, text: Tensor, pairs: Tensor, *, strength: float = 1.0) -> Tensor:
    """w [K] of a user from P pairs (chosen, rejected) [P,2] of items image, text [N,D]; all else is frozen.

    m and C are mean and covariance of the known users' w, C shrunk towards its mean variance; without two users, 0 and
    the identity. strength 1 takes a new user for one more of the population, larger keeps nearer to its mean, and
    without pairs w is m. In fp64, by L-BFGS, so the same each time.
    """
    head = copy.deepcopy(head).double().eval().requires_grad_(False)
    image, text = image.double(), text.double()
    mean, precision = prior(head)
    w = mean.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        judged = head.judge(image, text, w.softmax(-1).expand(len(image), -1))
        choices = -F.logsigmoid(head.logit(judged, pairs[:, 0], pairs[:, 1])).sum()
        found = choices + 0.5 * strength * (w - mean) @ precision @ (w - mean)
        found.backward()
        return found

    optimizer.step(loss)
    return w.detach()


def prior(head: Pal) -> tuple[Tensor, Tensor]:
    """Mean [K] and inverse covariance [K,K] of the known users' w."""
    known = head.users.weight
    identity = torch.eye(head.users.embedding_dim, dtype=known.dtype, device=known.device)
    if len(known) < 2 or not known.var(0).sum() > 0:
        return known.new_zeros(len(identity)) if len(known) < 2 else known.mean(0), identity
    covariance = torch.cov(known.T).reshape(identity.shape)
    mean_variance = covariance.diagonal().mean()
    return known.mean(0), torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * mean_variance * identity)
