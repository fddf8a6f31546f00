"""What an exact Bayesian makes of a few choices. The model of users (diffpref/emoji_world/users.py) is known exactly:

    w ~ N(majority, diag(spread²)),  log T ~ N(0, 0.25²),  P(a over b) = flip + (1 - 2 flip)·σ((U_a - U_b) / T)

so the posterior is had by importance sampling: many users as the world could have had them, none of whom is in it, each
weighed by the probability of what was said. No method that is given the same choices can expect to do better.

A crowd is a `User` whose weights are K arrays [H] and whose temperature is an array [H]; the world's own functions then
work on all H at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from diffpref.emoji_world.users import User, choice_probability, make_population, utility

DRAWN = 400_000  # users that stand for the population
KEPT = 3000  # of them, resampled by the posterior, to reckon with
SEED = 6  # 0 made the world's own users, 1 held_out.parquet's population


@cache
def crowd(count: int = DRAWN, seed: int = SEED) -> User:
    """So many users out of the world's distribution."""
    users = make_population(seed, train=count, unseen=0)
    weights = np.array([user.weights for user in users])
    return User(-1, "drawn", tuple(weights.T), np.array([user.temperature for user in users]), users[0].flip)


def those(of: User, index: np.ndarray) -> User:
    """Some of a crowd, which may recur."""
    return replace(of, weights=tuple(w[index] for w in of.weights), temperature=of.temperature[index])


def certain(user: User) -> User:
    """One who knows this user exactly: a crowd of one."""
    return replace(user, weights=tuple(np.array([w]) for w in user.weights), temperature=np.array([user.temperature]))


def chance(of: User, pairs: np.ndarray) -> np.ndarray:
    """Attributes of comparisons [P,2,K] -> probability [P,H] that each of a crowd chooses the first."""
    return choice_probability(of, utility(of, pairs[:, 0]), utility(of, pairs[:, 1]))


@dataclass(frozen=True)
class Belief:
    """What is known of a user: a crowd that is as probable as the posterior says, and the effective number of users
    behind it, 1 / Σ w²."""

    crowd: User
    effective: float

    def prefers(self, pairs: np.ndarray) -> np.ndarray:
        """Probability [P] that the user chooses the first of pairs [P,2,K], slips and noise of choosing included."""
        return chance(self.crowd, pairs).mean(1)

    def better(self, pictures: np.ndarray, than: np.ndarray) -> np.ndarray:
        """Probability [M] that pictures [M,K] have more true utility than one [K]; ties half."""
        gap = utility(self.crowd, pictures - than)
        return ((gap > 0) + 0.5 * (gap == 0)).mean(1)

    def best(self, pictures: np.ndarray, than: np.ndarray) -> int:
        """Which of them is most probably better than that one."""
        return int(self.better(pictures, than).argmax())


def beliefs(of: User, said: np.ndarray, counts: Sequence[int], rng: np.random.Generator) -> Iterable[Belief]:
    """After the first n of a user's choices [N,2,K], chosen first, for each n of counts."""
    log_likelihood = np.log(chance(of, said))
    for n in counts:
        weights = normalised(log_likelihood[:n].sum(0))
        index = rng.choice(len(weights), min(KEPT, len(weights)), p=weights)
        yield Belief(those(of, index), float(1 / np.square(weights).sum()))


def same_user(of: User, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Choices of U users in two sets [U,n,2,K] -> log-probability [U,U] of the second set of the row's user, given the
    first set of the column's: by that an exact Bayesian recognises people."""
    after = np.stack([normalised(np.log(chance(of, said)).sum(0)) for said in first])
    probability = np.stack([chance(of, said).prod(0) for said in second])
    return np.log(probability @ after.T)


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """[H] -> weights that sum to 1."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()
