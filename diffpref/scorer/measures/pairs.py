"""Accuracy on pairs: of one scorer, of two side by side, against known probabilities, by aspect.

margin [P]: the scorer's log-odds that the first picture of a pair is preferred.  label [P]: what people said, +1 the
first, −1 the second, 0 neither, NaN nothing.
"""

from collections.abc import Mapping

import numpy as np

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, mean, share
from diffpref.scorer.measures.measured import Measured, counted


def checked(margin: np.ndarray, *others: np.ndarray | None) -> list[np.ndarray]:
    """All as float64 [P]. Raises ValueError for other lengths, and for margins that are NaN or infinite."""
    arrays = [np.asarray(x, dtype=np.float64) for x in (margin, *others) if x is not None]
    if len({x.shape for x in arrays}) > 1 or arrays[0].ndim != 1:
        raise ValueError(f"one number for each pair is needed, got shapes {', '.join(str(x.shape) for x in arrays)}")
    if bad := int((~np.isfinite(arrays[0])).sum()):
        raise ValueError(f"{bad} of {len(arrays[0])} margins are NaN or infinite")
    return arrays


def chosen(rows: np.ndarray, clusters: Clusters) -> dict[str, list]:
    """The names of some of the rows, [P] of booleans."""
    return {name: [one for one, kept in zip(names, rows, strict=True) if kept] for name, names in clusters.items()}


def right(margin: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 where the scorer agrees, 0 where it does not, one half where it says nothing, [P]."""
    return 0.5 * (1 + np.sign(margin) * np.sign(label))


def with_winner(label: np.ndarray) -> np.ndarray:
    """Which pairs have a winner, [P]. Raises ValueError when none has."""
    decided = np.isfinite(label) & (label != 0)
    if not decided.any():
        raise ValueError(f"none of the {len(label)} pairs has a winner: accuracy is of pairs in which people chose")
    return decided


def accuracy(
    margin: np.ndarray,
    label: np.ndarray,
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
    *,
    weight: np.ndarray | None = None,
) -> Measured:
    """Share of pairs with a winner that the scorer ranks right. weight [P]: of each pair; all alike when not given.

    Raises:
        ValueError: no pair has a winner, lengths differ, a margin is not finite.
    """
    margin, label = checked(margin, label)
    decided = with_winner(label)
    names, m = chosen(decided, clusters), margin[decided]
    w = None if weight is None else np.asarray(weight, dtype=np.float64)[decided]
    found = share(right(m, label[decided]), names, resampling, weight=w)
    ties, exact = int((label == 0).sum()), int((m == 0).sum())
    policy = f"{counted(ties, 'tie')} of people left out, {counted(exact, 'exact tie')} of the scorer counted half"
    how, more = described(names, len(m), resampling.confidence), {"ties_dropped": ties, "exact_ties": exact}
    return Measured(*found, len(m), policy, how, more)


def difference(
    margin: np.ndarray,
    other: np.ndarray,
    label: np.ndarray,
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
    *,
    weight: np.ndarray | None = None,
) -> Measured:
    """Accuracy of one scorer less that of another on the same pairs; the interval is of the paired difference.

    Raises:
        ValueError: as `accuracy`.
    """
    margin, other, label = checked(margin, other, label)
    checked(other)
    decided = with_winner(label)
    names = chosen(decided, clusters)
    w = None if weight is None else np.asarray(weight, dtype=np.float64)[decided]
    gained = (right(margin, label) - right(other, label))[decided]
    found = mean(gained, names, resampling, weight=w, limits=(-1.0, 1.0))
    how = described(names, len(gained), resampling.confidence)
    return Measured(*found, len(gained), "paired, ties as for the accuracies", how)


def against_truth(
    margin: np.ndarray, truth: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT
) -> dict[str, Measured]:
    """How often the scorer would be right if people chose anew with known probabilities, and how often anyone could be.

        expected = mean of q where the scorer prefers the first, of 1 − q where the second, of ½ where it is tied
        bound    = mean of max(q, 1 − q)

    Args:
        truth: q [P], the probability that the first is preferred; NaN where nobody knows.

    Returns:
        expected accuracy, Bayes bound, and short of bound (their difference, paired).

    Raises:
        ValueError: no probability is known, or one is outside [0, 1]; and as `accuracy`.
    """
    margin, truth = checked(margin, truth)
    known = ~np.isnan(truth)
    q, names = truth[known], chosen(known, clusters)
    if not len(q):
        raise ValueError("no pair has a known probability")
    if ((q < 0) | (q > 1)).any():
        raise ValueError(f"known probabilities must lie in [0, 1], got {q.min():g} to {q.max():g}")
    expected, bound = 0.5 + np.sign(margin[known]) * (q - 0.5), np.maximum(q, 1 - q)
    policy, how = "from the probabilities, no label is used", described(names, len(q), resampling.confidence)
    columns = {"expected accuracy": expected, "Bayes bound": bound, "short of bound": bound - expected}
    return {
        name: Measured(*mean(x, names, resampling, limits=(0.0, 1.0)), len(q), policy, how)
        for name, x in columns.items()
    }


def by_aspect(
    margin: Mapping[str, np.ndarray] | np.ndarray,
    aspects: Mapping[str, np.ndarray],
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
) -> dict[str, Measured]:
    """Accuracy in each aspect of which people judged at least one pair; `aspects` has a label [P] for each.

    margin: One for all aspects [P], or one for each.
    """
    found = {}
    for name, label in aspects.items():
        own = margin[name] if isinstance(margin, Mapping) else margin
        if (np.nan_to_num(np.asarray(label, dtype=np.float64)) != 0).any():
            found[name] = accuracy(own, label, clusters, resampling)
    return found
