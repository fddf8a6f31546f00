"""One number that makes probabilities right: P(a preferred to b) = σ(margin / T).

T minimises the negative log-likelihood of held-out comparisons (temperature scaling: Guo et al. 2017, arXiv
1706.04599). There is no bias beside it: which picture of a pair stands first means nothing, so the curve goes through
(0, ½), and the loss is the same whichever stands first.
"""

import warnings

import numpy as np
from scipy.optimize import minimize_scalar

BOUNDS = 1e-2, 1e3  # of the temperature, times the median size of the margins
PRECISE = {"xatol": 1e-10}


class TemperatureBound(UserWarning):
    """The loss falls to the end of the range: margins that separate the labels, or say nothing of them."""


# L(T) = Σ w·[y·log(1 + e^(−m/T)) + (1 − y)·log(1 + e^(m/T))] / Σ w
def loss(temperature: float, margin: np.ndarray, target: np.ndarray, weight: np.ndarray) -> float:
    """Mean negative log-likelihood of targets [P] at a temperature, nats; convex in 1/T."""
    z = margin / temperature
    return float(np.average(target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z), weights=weight))


def fit_temperature(
    margin: np.ndarray, probability: np.ndarray | None = None, weight: np.ndarray | None = None
) -> float:
    """The temperature of the least symmetrised loss, found in log T between bounds, in fp64.

    Args:
        margin: s_first − s_second [P]. Without `probability` the first is the one that was preferred.
        probability: That the first is preferred, [P]; a tie is one half.
        weight: Of each pair, [P].

    Returns:
        T. Where certain labels are all as the margins' signs say, or on the whole against them, the loss has no
        minimum: T is then the bound, 1/100 or 1000 times the median size of the margins, with a TemperatureBound
        warning that says so.

    Raises:
        ValueError: no margins, lengths that differ, numbers that are not finite or not probabilities, weights that
            are negative or all 0, margins that are all 0.
    """
    m, y, w = checked(margin, probability, weight)
    scale = float(np.median(np.abs(m[m != 0])))
    end, why = without_minimum(m, y, w)
    if why:
        warnings.warn(f"the temperature is at its bound, {scale * end:.3g}: {why}", TemperatureBound, stacklevel=2)
        return scale * end
    found = minimize_scalar(
        lambda x: loss(scale * np.exp(x), m, y, w), bounds=tuple(np.log(BOUNDS)), method="bounded", options=PRECISE
    )
    return scale * float(np.exp(found.x))


# The loss is convex in 1/T. It has a minimum at a finite 1/T > 0 if it falls at 0, where its slope is −Σ w·m·(y − ½),
# and does not fall for ever, as it does where no pair is wrong and none is in doubt.
def without_minimum(margin: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[float, str]:
    """The bound that T goes to, in units of the margins, and why; or nothing."""
    counts = (margin != 0) & (weight > 0)
    if (weight * margin * (target - 0.5)).sum() <= 0:
        return BOUNDS[1], "the margins say nothing of these labels, or the contrary"
    if (target[counts] == (margin[counts] > 0)).all():
        return BOUNDS[0], "the margins have every one of these labels right; more or harder pairs would fit it"
    return 0.0, ""


def checked(
    margin: np.ndarray, probability: np.ndarray | None, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All as float64 [P], with certain labels and equal weights where none are given. Raises as `fit_temperature`."""
    m = np.asarray(margin, dtype=np.float64)
    y = np.ones_like(m) if probability is None else np.asarray(probability, dtype=np.float64)
    w = np.ones_like(m) if weight is None else np.asarray(weight, dtype=np.float64)
    if m.ndim != 1 or not m.shape == y.shape == w.shape:
        raise ValueError(f"margins {m.shape}, probabilities {y.shape} and weights {w.shape} must be alike, [P] each")
    if not np.isfinite(m).all():
        raise ValueError(f"{int((~np.isfinite(m)).sum())} of {len(m)} margins are NaN or infinite")
    if not ((y >= 0) & (y <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1]")
    if not ((w >= 0) & (w < np.inf)).all() or not (w * (m != 0)).any():
        raise ValueError("a temperature needs a pair whose margin and weight are not 0, and no negative weight")
    return m, y, w
