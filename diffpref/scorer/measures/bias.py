"""Does the score follow what it should not: the number of pixels, the shape, the length of the prompt?"""

from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, interval, mean
from diffpref.scorer.measures.measured import Measured, counted
from diffpref.scorer.measures.pairs import accuracy, checked, chosen, right, with_winner


# ρ = cov(x, y) / √(var x · var y) of ranks, from sums of (1, x, y, x², y², xy).
def pearson(sums: np.ndarray) -> np.ndarray:
    """Sums [R,6] -> correlations [R]; NaN where one of the two does not vary."""
    n, x, y, xx, yy, xy = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(n * xx - x * x, 0) * np.maximum(n * yy - y * y, 0))
        return np.where(spread > 1e-9 * n * n, (n * xy - x * y) / spread, np.nan)


def correlation(
    scores: np.ndarray, quantity: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT
) -> Measured | None:
    """Spearman's rank correlation of scores [N] with a quantity [N]; None where one of them is the same throughout.

    A resample keeps the ranks of the whole sample.
    """
    scores, quantity = checked(scores, quantity)
    if np.ptp(scores) == 0 or np.ptp(quantity) == 0:
        return None
    x, y = (centred(rankdata(values)) for values in (scores, quantity))
    features = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    found = interval(features, pearson, clusters, resampling, limits=(-1.0, 1.0))
    how = described(clusters, len(x), resampling.confidence)
    return Measured(*found, len(x), "rank correlation over pictures with their prompts", how)


def centred(ranks: np.ndarray) -> np.ndarray:
    """Ranks about 0 and of size 1, which loses no digits in the sums."""
    return (ranks - ranks.mean()) / ranks.std()


def by_split(
    margin: np.ndarray,
    label: np.ndarray,
    splits: Mapping[str, np.ndarray],
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
) -> dict[str, Measured]:
    """Accuracy in parts of the pairs, name -> which [P]; parts without a winner are left out."""
    found = {}
    for name, rows in splits.items():
        if (with_winner(label) & rows).any():
            found[name] = accuracy(margin[rows], label[rows], chosen(rows, clusters), resampling)
    return found


def preference_for(
    margin: np.ndarray,
    label: np.ndarray,
    more: np.ndarray,
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
) -> Measured | None:
    """How much oftener than people the scorer prefers the picture with more of something, say pixels.

        mean over pairs that differ of [scorer prefers the larger] − [people do], ties of the scorer half

    Args:
        more: [P], > 0 where the first picture has more of it, < 0 the second, 0 neither.

    Returns:
        The difference of the two shares, with both in `more`; None where no pair with a winner differs.
    """
    margin, label, more = checked(margin, label, more)
    rows = with_winner(label) & (more != 0)
    if not rows.any():
        return None
    names = chosen(rows, clusters)
    scorer, people = (right(x[rows], more[rows]) for x in (margin, label))
    found = mean(scorer - people, names, resampling, limits=(-1.0, 1.0))
    shares = {"scorer": float(scorer.mean()), "people": float(people.mean())}
    policy = (
        f"share of {counted(len(people), 'pair')} in which the scorer prefers the larger, {shares['scorer']:.3f}, less "
        f"that in which people do, {shares['people']:.3f}"
    )
    return Measured(*found, len(people), policy, described(names, len(people), resampling.confidence), shares)
