"""A new user as a mixture of known ones, from a few pairs: nothing is trained but the shares (PAL, Chen et al. 2024,
arXiv 2406.08469; Premier, arXiv 2603.20725, fits new users so)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpref.users.embedding import UserEmbedding

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]  # user [N,U], image [N,D], text [N,D] -> [N], what they think of it
SMALLEST = 1e-6  # length of a mixture below which it points nowhere


@dataclass(frozen=True, eq=False)
class Mixture:
    """weights [K]: shares of the known users, which add up to one.  user [U]: a unit vector. Both fp64."""

    weights: Tensor
    user: Tensor


# Maximum a posteriori of the shares π = softmax(w), under a Dirichlet prior of `strength` pseudo-users spread over all:
#   Σ_pairs −log σ(s_c − s_r) + strength·KL(1/K ‖ π),     s = scores(u, ·),   u = Σ_k π_k u_k / ‖Σ_k π_k u_k‖
def fit_mixture(
    scores: Scores, basis: Tensor, image: Tensor, text: Tensor, pairs: Tensor, *, strength: float = 1.0
) -> Mixture:
    """The mixture of basis [K,U] that explains P pairs (chosen, rejected) [P,2] of items image, text [N,D].

    The prior's cost does not grow with K: to put 90 % of the shares on few of many users costs 2.3·strength nats, and
    each pair gives at most what it surprised. Larger keeps nearer to the mean of all users. It starts at what each
    known user alone would make of the pairs, and runs L-BFGS in fp64, so the same each time.

    Args:
        scores: Of a model whose weights stand still and take fp64, such as `copy.deepcopy(encoder).double().scores`;
            differences are log-odds.
        basis: Known users, such as `UserTable.vectors()` or those an encoder made of training users; their directions
            count.
        image: Features of the pictures.
        text: Features of their prompts, row by row.
        pairs: Numbers of items.
        strength: Of the prior.

    Raises ValueError without a pair or a known user, for numbers that are no numbers, and where known users cancel out.
    """
    checked(basis, image, text, pairs, strength)
    basis, image, text = F.normalize(basis.detach().double(), dim=-1), image.detach().double(), text.detach().double()

    def surprise(user: Tensor) -> Tensor:
        """−log-likelihood of the pairs, for a user [U]."""
        given = scores(user.expand(len(image), -1), image, text)
        return -F.logsigmoid(given[pairs[:, 0]] - given[pairs[:, 1]]).sum()

    with torch.no_grad():
        alone = torch.stack([-surprise(user) for user in basis])
    w = (alone - alone.mean()).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=300, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = surprise(mixed(w.softmax(0), basis)) + strength * divergence(w)
        found.backward(inputs=[w])
        return found

    optimizer.step(loss)
    weights = w.detach().softmax(0)
    return Mixture(weights, pointed(weights, basis))


# KL(1/K ‖ softmax(w)) = logsumexp(w) − mean(w) − log K
def divergence(w: Tensor) -> Tensor:
    """How far the shares are from equal ones, in nats."""
    return w.logsumexp(0) - w.mean() - torch.tensor(len(w), dtype=w.dtype).log()


def mixed(weights: Tensor, basis: Tensor) -> Tensor:
    """The unit vector [U] of shares [K]; short where known users all but cancel out, and never without a gradient."""
    total = weights @ basis
    return total / (total.square().sum() + SMALLEST**2).sqrt()


def pointed(weights: Tensor, basis: Tensor) -> Tensor:
    """The same, of length one. Raises ValueError where there is no direction."""
    total = weights @ basis
    if total.norm() < SMALLEST:
        raise ValueError("the known users cancel out in this mixture, which points nowhere; give more users, or pairs")
    return F.normalize(total, dim=0)


def checked(basis: Tensor, image: Tensor, text: Tensor, pairs: Tensor, strength: float) -> None:
    """Raise ValueError for what no mixture can be fitted to."""
    if basis.ndim != 2 or not len(basis) or not (basis.norm(dim=1) > 0).all():
        raise ValueError(f"the known users must be [K,U], none of them zero; got {list(basis.shape)}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise ValueError(f"a mixture is fitted to one pair or more, [P,2]; got {list(pairs.shape)}")
    if image.shape != text.shape or not 0 <= int(pairs.min()) <= int(pairs.max()) < len(image):
        raise ValueError(f"pairs number the {len(image)} items, whose pictures and prompts are [N,D] alike")
    if not all(value.isfinite().all() for value in (basis, image, text)):
        raise ValueError("known users, pictures and prompts must be finite numbers")
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength must be positive and finite, got {strength}")


def basis_of(users: Sequence[UserEmbedding]) -> Tensor:
    """Embeddings of one vector each, all of one encoder -> [K,U]. Raises ValueError for others."""
    if len({(user.encoder, user.width) for user in users}) != 1 or any(user.sequence for user in users):
        raise ValueError("a mixture is of users who are one vector each, all of one encoder")
    return torch.cat([user.states for user in users])
