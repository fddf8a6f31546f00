"""Intervals of what was measured on choices of people who saw several prompts, under prompts seen by several people.

Two choices of one prompt are not independent, and neither are two of one user. With a single clustering (the prompts)
the interval is the percentile interval of a bootstrap that draws whole clusters. With two, that is done with the one of
greater variance, and the interval is stretched about the value until its variance is

    V = V_prompt + V_user − V_cell        (Cameron, Gelbach & Miller 2011, "Robust inference with multiway clustering")

where a cell is what one user said under one prompt; V is not less than either of the first two. Their ratio to one
another is that of jackknife variances, which leave out a cluster at a time. Drawing prompts and users at once, with the
product of their counts as weights (the pigeonhole bootstrap, Owen 2007), was not taken: it counts the noise of single
choices three times over, and most of the variance of an accuracy is such noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffpref.winrate import exact_interval

Statistic = Callable[[np.ndarray], np.ndarray]  # sums of features [R,F] -> values [R]
Clusters = Mapping[str, Sequence]  # "prompt", "user" -> N names; None is a cluster by itself
CELLS = 2**22  # counts drawn at once


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn. confidence: that they cover.  resamples: of each clustering.  seed: of the draws."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


DEFAULT = Resampling()


def numbered(names: Sequence) -> np.ndarray:
    """Names -> numbers from 0 [N], equal ones alike; each None has a number of its own."""
    places: dict = {}
    return np.array([places.setdefault((i,) if name is None else name, len(places)) for i, name in enumerate(names)])


def usable(clusters: Clusters, n: int) -> dict[str, np.ndarray]:
    """The clusterings that have two clusters or more, numbered; N single choices where there is none.

    Raises ValueError where one does not have N names.
    """
    for name, names in clusters.items():
        if len(names) != n:
            raise ValueError(f"{len(names)} names of the clustering by {name}, but {n} values")
    found = {name: numbered(names) for name, names in clusters.items()}
    return {name: index for name, index in found.items() if index.max(initial=0) > 0} or {"single": np.arange(n)}


def described(clusters: Clusters, n: int, confidence: float) -> str:
    """What was resampled, in words."""
    names, level = list(usable(clusters, n)), f"{100 * confidence:g} % interval"
    if names == ["single"]:
        lacking = " or ".join(f"two {name}s" for name in clusters)
        return f"{level}: bootstrap of single choices, for there are not {lacking}"
    whole = " and of whole ".join(f"{name}s" for name in names)
    return f"{level}: bootstrap of whole {whole}{', variances combined' if len(names) > 1 else ''}"


def interval(
    features: np.ndarray,
    statistic: Statistic,
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
    *,
    limits: tuple[float, float] = (-np.inf, np.inf),
    reflected: bool = False,
) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of summed features.

    Args:
        features: [N,F]; a resample gives the statistic the sums over its choices.
        clusters: N names each. None is a cluster by itself.
        limits: The interval is cut there.
        reflected: Turn the draws about the value (the basic bootstrap), for what resampling itself makes larger.

    Raises:
        ValueError: there is nothing, or names of another number.
    """
    if not len(features):
        raise ValueError("there is nothing to measure")
    value, found = float(statistic(features.sum(0)[None])[0]), usable(clusters, len(features))
    widest, stretch = found.popitem()[1], 1.0
    if found:
        widest, stretch = combined(features, [widest, found.popitem()[1]], statistic)
    draws = replicates(features, widest, statistic, resampling)
    draws = 2 * value - draws if reflected else draws
    edges = np.nanquantile(draws, [(1 - resampling.confidence) / 2, (1 + resampling.confidence) / 2])
    low, high = np.clip(value + stretch * (edges - value), *limits).tolist()
    return value, low, high


def combined(features: np.ndarray, both: list[np.ndarray], statistic: Statistic) -> tuple[np.ndarray, float]:
    """The clustering of greater variance, and √V in units of its deviation: V = V_prompt + V_user − V_cell."""
    cells = np.unique(np.stack(both), axis=1, return_inverse=True)[1].reshape(-1)
    one, other, cell = (jackknife(features, index, statistic) for index in (*both, cells))
    greatest = max(one, other)
    stretch = float(np.sqrt(max(one + other - cell, greatest) / greatest)) if greatest > 0 else 1.0
    return both[int(other > one)], stretch


def summed(features: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sums of features by cluster, [G,F]."""
    return np.stack([np.bincount(index, weights=column) for column in features.T], axis=1)


# V = (G − 1)/G · Σ_g (θ_−g − mean θ_−g)²
def jackknife(features: np.ndarray, index: np.ndarray, statistic: Statistic) -> float:
    """Variance of the statistic from leaving out each of G clusters; those without which nothing is left do not
    count."""
    sums = summed(features, index)
    without = statistic(sums.sum(0) - sums)
    return float(np.nanvar(without) * (len(sums) - 1))


def replicates(features: np.ndarray, index: np.ndarray, statistic: Statistic, resampling: Resampling) -> np.ndarray:
    """The statistic [R] of resamples of whole clusters; as many as there are are drawn, with replacement."""
    sums, rng = summed(features, index), np.random.default_rng(resampling.seed)
    at_once = max(1, CELLS // len(sums))
    sizes = [min(at_once, resampling.resamples - done) for done in range(0, resampling.resamples, at_once)]
    return np.concatenate([statistic(counts(rng, size, len(sums)) @ sums) for size in sizes])


def counts(rng: np.random.Generator, draws: int, groups: int) -> np.ndarray:
    """How often each of the groups is drawn, [draws, groups] as floats."""
    drawn = rng.integers(groups, size=(draws, groups)) + groups * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * groups).reshape(draws, groups).astype(np.float64)


# --- means ------------------------------------------------------------------------------------------------------------


def ratio(sums: np.ndarray) -> np.ndarray:
    """Sums [R,2] of weighted values and of weights -> means [R]; NaN where nothing has weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / sums[:, 1]


def mean(
    values: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT, *, weight: np.ndarray | None = None, **cut
) -> tuple[float, float, float]:
    """(value, low, high) of Σ w·x / Σ w; x, w [N]. Raises as `interval`, and ValueError where nothing has weight."""
    w = np.ones(len(values)) if weight is None else np.asarray(weight, dtype=np.float64)
    if len(w) and not w.sum() > 0:
        raise ValueError("all weights are 0: there is nothing to measure")
    return interval(np.stack([w * values, w], axis=1), ratio, clusters, resampling, **cut)


def share(
    values: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT, *, weight: np.ndarray | None = None
) -> tuple[float, float, float]:
    """`mean` of values in [0,1]. Where all agree, the exact binomial interval with the clusters as trials, for a
    bootstrap's would have no width; of two clusterings, the one of fewer clusters."""
    value, low, high = mean(values, clusters, resampling, weight=weight, limits=(0.0, 1.0))
    if high - low < 1e-12:  # rounding is no width
        trials = min(int(index.max()) + 1 for index in usable(clusters, len(values)).values())
        low, high = exact_interval(min(max(value, 0.0), 1.0), trials, resampling.confidence)
    return value, low, high
