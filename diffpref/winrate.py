"""Policy against base: the share of comparisons won, with an interval.

Pictures of one prompt are not independent, whatever their seeds, so the interval resamples whole prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL.Image import Image
from scipy import stats

Judge = Callable[[list[Image], list[str]], np.ndarray]  # pictures and their prompts -> [N] scores, higher is better


@dataclass(frozen=True)
class WinRate:
    """Share of N comparisons won, ties counted half; [low, high] covers the true share with probability `confidence`.

    n: comparisons.  ties: how many of them had equal scores.  clusters: different prompts.
    """

    value: float
    low: float
    high: float
    n: int
    ties: int
    clusters: int
    confidence: float

    def as_dict(self) -> dict[str, float]:
        """For report.json."""
        return asdict(self)

    def __str__(self) -> str:
        ties = f"{self.ties} tie{'' if self.ties == 1 else 's'}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}], n={self.n}, {ties}"


def compare(
    judge: Judge, before: list[Image], after: list[Image], prompts: list[str], *, confidence: float = 0.95
) -> WinRate:
    """A judge compares pictures with paired seeds, before[i] and after[i] of prompts[i]; clusters are the prompts."""
    return win_rate(scores(judge, after, prompts), scores(judge, before, prompts), prompts, confidence=confidence)


def scores(judge: Judge, images: list[Image], prompts: list[str]) -> np.ndarray:
    """A judge's scores [N] in float64. Raises ValueError when it does not give one number for each picture."""
    if len(images) != len(prompts):
        raise ValueError(f"each picture needs its prompt, got {len(images)} pictures and {len(prompts)} prompts")
    found = np.asarray(judge(images, prompts), dtype=np.float64)
    if found.shape != (len(images),):
        name = getattr(judge, "__name__", type(judge).__name__)
        raise ValueError(f"judge {name} gave scores of shape {found.shape}, not ({len(images)},): one for each picture")
    if not np.isfinite(found).all():
        name = getattr(judge, "__name__", type(judge).__name__)
        raise ValueError(f"judge {name} gave {int((~np.isfinite(found)).sum())} scores that are NaN or infinite")
    return found


def win_rate(
    after: np.ndarray,
    before: np.ndarray,
    clusters: Sequence[str],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> WinRate:
    """Win rate of `after` [N] over `before` [N], with a percentile bootstrap that resamples whole clusters.

        value = (wins + ties / 2) / N

    A resample draws as many clusters as there are, with replacement, and takes all comparisons of each: a ratio of
    summed wins to summed sizes, so clusters may differ in size. Where all clusters agree, as when everything is won,
    that interval would have no width; the exact binomial interval, with clusters as the trials, is given instead.

    Args:
        clusters: N names, of the prompts as a rule: comparisons under one name are taken as dependent.

    Raises:
        ValueError: different lengths, scores that are not finite, fewer than two clusters.
    """
    after, before = checked(after, before, clusters)
    won = (after > before) + 0.5 * (after == before)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    wins, sizes = np.bincount(index, weights=won), np.bincount(index)
    if np.ptp(wins / sizes) == 0:
        low, high = exact_interval(wins[0] / sizes[0], len(sizes), confidence)
    else:
        low, high = bootstrap_interval(wins, sizes, confidence, resamples, seed)
    ties = int((after == before).sum())
    return WinRate(float(won.mean()), low, high, len(won), ties, len(sizes), confidence)


def checked(after: np.ndarray, before: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [N], or ValueError."""
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if not after.shape == before.shape == (len(clusters),):
        raise ValueError(
            f"{after.shape} scores after, {before.shape} before, {len(clusters)} clusters differ in length"
        )
    bad_after, bad_before = (int((~np.isfinite(x)).sum()) for x in (after, before))
    if bad_after or bad_before:
        raise ValueError(
            f"{bad_after + bad_before} scores are NaN or infinite ({bad_before} of {len(before)} before, {bad_after} of"
            f" {len(after)} after): the judge must give a number for every picture"
        )
    if len(set(clusters)) < 2:
        raise ValueError(f"an interval clustered by prompt needs 2 or more different prompts, got {len(set(clusters))}")
    return after, before


def bootstrap_interval(
    wins: np.ndarray, sizes: np.ndarray, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of Σ wins / Σ sizes over resampled clusters; wins, sizes [G]."""
    interval = stats.bootstrap(
        (wins, sizes),
        lambda w, s, axis: w.sum(axis) / s.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=1000,  # bounds the memory
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def exact_interval(share: float, trials: int, confidence: float) -> tuple[float, float]:
    """Clopper-Pearson interval of share·trials successes, which need not be whole."""
    tail, k = (1 - confidence) / 2, share * trials
    low = 0.0 if share == 0 else stats.beta.ppf(tail, k, trials - k + 1)
    high = 1.0 if share == 1 else stats.beta.ppf(1 - tail, k + 1, trials - k)
    return float(low), float(high)
