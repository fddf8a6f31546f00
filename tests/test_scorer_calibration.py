"""The temperature: known ones found again, data without a minimum, bad input."""

import numpy as np
import pytest
from scipy.special import expit

from diffpref.scorer.calibration import BOUNDS, TemperatureBound, fit_temperature, loss


def choices(count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """True log-odds that the first is preferred, and who was: +1 or −1."""
    rng = np.random.default_rng(seed)
    logit = 1.5 * rng.standard_normal(count)
    return logit, np.where(rng.random(count) < expit(logit), 1.0, -1.0)


@pytest.mark.parametrize("factor", [3.0, 0.01, 100.0])
def test_margins_too_large_by_a_factor_are_found_out(factor):
    """However large the scores, and whichever picture stands first: T = the factor."""
    logit, label = choices()
    winner_first = fit_temperature(factor * logit * label)
    assert winner_first == pytest.approx(factor, rel=0.04)
    assert fit_temperature(factor * logit, 0.5 * (1 + label)) == pytest.approx(winner_first, rel=1e-6)


def test_known_probabilities_give_it_exactly():
    """With probabilities for labels the loss is least where the prediction is the probability."""
    logit, _ = choices(200)
    assert fit_temperature(3 * logit, expit(logit)) == pytest.approx(3, rel=1e-6)


def test_it_is_the_minimum():
    """The slope in 1/T, Σ w·m·(y − σ(m/T)), is 0 there."""
    rng = np.random.default_rng(1)
    margin, probability, weight = rng.normal(0.4, 1, 50), rng.random(50), rng.random(50)
    temperature = fit_temperature(margin, probability, weight)
    terms = weight * margin * (probability - expit(margin / temperature))
    assert abs(terms.sum()) < 1e-6 * np.abs(terms).sum()
    at = loss(temperature, margin, probability, weight)
    assert all(at < loss(temperature * f, margin, probability, weight) for f in (0.9, 1.1))


def test_weights_count_as_repetitions():
    logit, label = choices(300)
    twice = np.where(np.arange(300) < 100, 2, 1)
    repeated = fit_temperature(np.repeat(logit * label, twice))
    assert fit_temperature(logit * label, weight=twice) == pytest.approx(repeated, rel=1e-6)
    nothing = fit_temperature(np.append(logit * label, -50), weight=np.append(np.ones(300), 0))
    assert nothing == pytest.approx(fit_temperature(logit * label), rel=1e-6)


def test_separable_labels_end_at_the_bound():
    """Every pair right, some with no margin at all: the loss falls for ever as T goes to 0."""
    with pytest.warns(TemperatureBound, match="every one of these labels right"):
        assert fit_temperature(np.array([1.0, 2.0, 3.0, 0.0])) == pytest.approx(BOUNDS[0] * 2)
    assert 0.1 < fit_temperature(np.array([1.0, 2.0, 3.0, -0.1])) < 1  # one small mistake is enough for a minimum


def test_labels_against_the_margins_end_at_the_other():
    for margin in ([-1.0, -2.0, 1.0], [1.0, -1.0]):
        with pytest.warns(TemperatureBound, match="nothing of these labels"):
            assert fit_temperature(np.array(margin)) == pytest.approx(BOUNDS[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "whose margin and weight are not 0"),
        (([0.0, 0.0],), "whose margin and weight are not 0"),
        (([1.0, 2.0], None, [0.0, 0.0]), "whose margin and weight are not 0"),
        (([1.0, 2.0], None, [1.0, -1.0]), "no negative weight"),
        (([1.0, np.nan],), "1 of 2 margins are NaN"),
        (([1.0, 2.0], [0.5, 1.5]), r"must lie in \[0, 1\]"),
        (([1.0, 2.0], [0.5, np.nan]), r"must lie in \[0, 1\]"),
        (([1.0, 2.0], [0.5]), "must be alike"),
        (([[1.0], [2.0]],), "must be alike"),
    ],
)
def test_what_cannot_be_fitted(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(*[None if x is None else np.array(x) for x in arguments])
