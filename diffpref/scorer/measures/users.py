"""Is everyone served alike? Accuracy user by user."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, numbered, share
from diffpref.scorer.measures.measured import Measured, counted
from diffpref.scorer.measures.pairs import checked, chosen, right, with_winner
from diffpref.winrate import exact_interval

TENTH = 0.1
DRAWS = 200  # of users who are all alike


@dataclass(frozen=True)
class Users:
    """The accuracy of each user, [U] each: value, their number of pairs with a winner, who they are."""

    value: np.ndarray
    n: np.ndarray
    names: list

    def rows(self) -> list[dict]:
        """For JSON, least accuracy first."""
        order = np.argsort(self.value, kind="stable")
        return [{"user": self.names[i], "value": float(self.value[i]), "n": int(self.n[i])} for i in order]


def per_user(margin: np.ndarray, label: np.ndarray, user: Sequence) -> Users:
    """margin, label [P] as in pairs.py, user P names; pairs without a name are nobody's.

    Raises ValueError when no pair of a named user has a winner.
    """
    margin, label = checked(margin, label)
    known = with_winner(label) & named(user)
    if not known.any():
        raise ValueError("no pair with a winner has a user")
    names = [one for one, kept in zip(user, known, strict=True) if kept]
    index = numbered(names)
    n = np.bincount(index)
    return Users(np.bincount(index, right(margin, label)[known]) / n, n, list(dict.fromkeys(names)))


def named(user: Sequence) -> np.ndarray:
    """Which pairs have a user, [P]."""
    return np.array([one is not None for one in user], dtype=bool)


def macro_accuracy(
    margin: np.ndarray, label: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT
) -> Measured:
    """Mean of the users' accuracies: each user counts the same. `clusters` must have "user".

    Raises:
        ValueError: as `per_user`.
    """
    margin, label = checked(margin, label)
    users = per_user(margin, label, clusters["user"])
    known = with_winner(label) & named(clusters["user"])
    names, index = chosen(known, clusters), numbered(chosen(known, clusters)["user"])
    found = share(right(margin, label)[known], names, resampling, weight=1 / users.n[index])
    without = int((~named(clusters["user"])).sum())
    alone = f", {counted(without, 'pair')} without a user left out" if without else ""
    policy = f"mean over {counted(len(users.n), 'user')}, ties as for the accuracy{alone}"
    return Measured(*found, len(users.n), policy, described(names, len(index), resampling.confidence))


def worst_users(users: Users, resampling: Resampling = DEFAULT, tenth: float = TENTH) -> Measured:
    """Mean accuracy of the tenth of users for whom it is least (at least one), with `by_chance`: what it would be were
    all users alike, for among many users someone is always unlucky. Where all draws agree, the interval is the exact
    binomial one with these users as trials."""
    worst = max(1, round(tenth * len(users.n)))
    lowest = lambda values: np.sort(values, axis=-1)[..., :worst].mean(-1)  # noqa: E731
    rng = np.random.default_rng(resampling.seed)
    drawn = users.value[rng.integers(len(users.n), size=(resampling.resamples, len(users.n)))]
    value = float(lowest(users.value))
    low, high = np.quantile(lowest(drawn), [(1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2])
    how = f"{100 * resampling.confidence:g} % interval: bootstrap of whole users"
    if high - low < 1e-12:  # all draws agree, and no width would be too sure
        low, high = exact_interval(value, worst, resampling.confidence)
        how = f"{100 * resampling.confidence:g} % interval: exact, {counted(worst, 'user')} as trials, for all agree"
    overall = float((users.value * users.n).sum() / users.n.sum())
    alike = float(lowest(rng.binomial(users.n, overall, size=(DRAWS, len(users.n))) / users.n).mean())
    policy = (
        f"{counted(worst, 'user')} of {len(users.n)}, each counted the same; were all users alike it would be "
        f"{alike:.3f}"
    )
    return Measured(value, float(low), float(high), worst, policy, how, {"by_chance": alike})
