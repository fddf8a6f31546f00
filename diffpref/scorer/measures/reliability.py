"""Are the probabilities right? σ(margin) against what people said, or against the share of them that said so.

margin [P]: log-odds that the first picture is preferred, temperature applied.  target [P]: probability that it is, 1
and 0 where the label is certain.

Which picture of a pair stands first means nothing, and in most sets it is the winner: all targets are then 1, and
nothing calibrated could look so. Every pair is therefore counted both ways round, (p, y) and (1 − p, 1 − y).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, interval, mean
from diffpref.scorer.measures.measured import Measured
from diffpref.scorer.measures.pairs import checked

BINS = 15
DRAWS = 200  # of labels, for what a calibrated scorer's error would be


@dataclass(frozen=True)
class Reliability:
    """By bin of predicted probability, [B] each: share of the (doubled) pairs, mean prediction, mean target; NaN where
    a bin is empty."""

    share: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        rounded = {name: [None if np.isnan(x) else float(x) for x in values] for name, values in vars(self).items()}
        return rounded | {"bins": len(self.share)}


def target_of(label: np.ndarray, probability: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Labels (+1, 0, −1, NaN) and, where the data have them, probabilities that the first is preferred -> targets [P],
    and which pairs have one [P]. A tie has none unless a probability says one half."""
    label = np.asarray(label, dtype=np.float64)
    if probability is None:
        return 0.5 * (1 + np.sign(label)), np.isfinite(label) & (label != 0)
    probability = np.asarray(probability, dtype=np.float64)
    return probability, np.isfinite(probability)


def checked_targets(margin: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """Both as float64 [P]. Raises ValueError as `checked`, for no pair, and for targets outside [0, 1]."""
    margin, target = checked(margin, target)
    if not len(margin):
        raise ValueError("calibration needs a pair with a winner or a probability, and there is none")
    if not ((target >= 0) & (target <= 1)).all():
        raise ValueError("targets must be probabilities in [0, 1]")
    return [margin, target]


# ECE = Σ_b n_b/n · |mean y − mean p|      (Naeini, Cooper & Hauskrecht 2015; bins of equal width, as in torchmetrics)
# where both runs over (p, y) and (1 − p, 1 − y): torchmetrics has neither this nor targets between 0 and 1.
def binned(margin: np.ndarray, target: np.ndarray, bins: int) -> np.ndarray:
    """[P, 3·bins]: what each pair adds, both ways round, to the count, the predictions and the targets of each bin."""
    added, rows = np.zeros((len(margin), 3, bins)), np.arange(len(margin))
    for m, y in ((margin, target), (-margin, 1 - target)):
        for place, values in enumerate((np.ones_like(m), expit(m), y)):
            np.add.at(added, (rows, place, bin_of(m, bins)), values)
    return added.reshape(len(margin), -1)


def bin_of(margin: np.ndarray, bins: int) -> np.ndarray:
    """Number of the bin of equal width that σ(margin) falls into, [P]; an edge belongs to the bin above."""
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], expit(margin), side="right")


def error_of(sums: np.ndarray) -> np.ndarray:
    """Sums [R, 3·bins] -> ECE [R]."""
    count, predicted, observed = sums.reshape(len(sums), 3, -1).transpose(1, 0, 2)
    return np.abs(observed - predicted).sum(1) / count.sum(1)


def reliability(margin: np.ndarray, target: np.ndarray, bins: int = BINS) -> Reliability:
    """The table behind the calibration error and its plot. Raises ValueError as `checked_targets`."""
    margin, target = checked_targets(margin, target)
    count, predicted, observed = binned(margin, target, bins).sum(0).reshape(3, bins)
    with np.errstate(invalid="ignore"):
        return Reliability(count / count.sum(), predicted / count, observed / count)


def calibration_error(
    margin: np.ndarray,
    target: np.ndarray,
    clusters: Clusters,
    resampling: Resampling = DEFAULT,
    *,
    bins: int = BINS,
) -> Measured:
    """Symmetrised expected calibration error, with `by_chance`: what a calibrated scorer of the same predictions would
    show on so many certain labels, for the error of a finite sample is never 0.

    The middle one of an odd number of bins has no error, for both ways round cancel in it.

    Raises:
        ValueError: as `checked_targets`.
    """
    margin, target = checked_targets(margin, target)
    added = binned(margin, target, bins)
    found = interval(added, error_of, clusters, resampling, limits=(0.0, 1.0), reflected=True)
    certain = bool(np.isin(target, (0.0, 1.0)).all())
    more = {"by_chance": chance(margin, bins, resampling.seed)} if certain else {}
    against = f"labels: a calibrated scorer would show {more['by_chance']:.3f}" if certain else "probabilities"
    policy = f"{bins} bins, each pair both ways round, against {against}; draws turned about the value"
    return Measured(*found, len(margin), policy, described(clusters, len(margin), resampling.confidence), more)


def chance(margin: np.ndarray, bins: int, seed: int) -> float:
    """Mean ECE of labels drawn from the predictions themselves."""
    rng, p, found = np.random.default_rng(seed), expit(margin), []
    here, there = bin_of(margin, bins), bin_of(-margin, bins)
    for _ in range(DRAWS):
        gap = (rng.random(len(p)) < p) - p  # (1 − y) − (1 − p) is its negative
        off = np.bincount(here, gap, minlength=bins) - np.bincount(there, gap, minlength=bins)
        found.append(np.abs(off).sum() / (2 * len(p)))
    return float(np.mean(found))


def log_loss(margin: np.ndarray, target: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT) -> Measured:
    """Mean of −y log p − (1 − y) log(1 − p), nats. The same both ways round. Raises ValueError as `checked_targets`."""
    margin, y = checked_targets(margin, target)
    loss = y * np.logaddexp(0, -margin) + (1 - y) * np.logaddexp(0, margin)
    found = mean(loss, clusters, resampling, limits=(0.0, np.inf))
    return Measured(*found, len(y), "nats", described(clusters, len(y), resampling.confidence))


def brier(margin: np.ndarray, target: np.ndarray, clusters: Clusters, resampling: Resampling = DEFAULT) -> Measured:
    """Mean of (p − y)². The same both ways round. Raises ValueError as `checked_targets`."""
    margin, y = checked_targets(margin, target)
    found = mean((expit(margin) - y) ** 2, clusters, resampling, limits=(0.0, 1.0))
    return Measured(*found, len(y), "mean of (p − y)²", described(clusters, len(y), resampling.confidence))
