"""Win rates by hand, and intervals that cover what they promise."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffpref.winrate import WinRate, compare, scores, win_rate


def test_by_hand_ties_count_half():
    """Prompt a: win, loss, tie; prompt b: win, win -> (3 + 1/2) / 5."""
    rate = win_rate(np.array([2.0, 1, 5, 3, 4]), np.array([1.0, 2, 5, 0, 0]), ["a", "a", "a", "b", "b"])
    assert rate.value == pytest.approx(3.5 / 5)
    assert (rate.n, rate.ties, rate.clusters, rate.confidence) == (5, 1, 2, 0.95)
    assert rate.low == pytest.approx(1.5 / 3)  # prompt a drawn twice
    assert rate.high == pytest.approx(1.0)  # prompt b drawn twice


def test_unequal_clusters_weigh_by_their_size():
    """Nine wins under one prompt and a loss under another: 0.9, not the 0.5 of a mean over prompts."""
    rate = win_rate(np.array([1.0] * 9 + [-1.0]), np.zeros(10), ["a"] * 9 + ["b"])
    assert rate.value == pytest.approx(0.9)


def test_how_it_reads():
    assert str(WinRate(0.7361, 0.661, 0.808, 144, 3, 36, 0.95)) == "0.74 [0.66, 0.81], n=144, 3 ties"
    assert str(WinRate(0.5, 0.4, 0.6, 10, 1, 5, 0.95)).endswith("n=10, 1 tie")


def test_everything_won_is_not_certainty():
    """With G prompts all won the exact 95 % bound is (1/40)^(1/G), however many seeds each had."""
    after, prompts = np.ones(40), [f"p{i % 10}" for i in range(40)]
    rate = win_rate(after, np.zeros(40), prompts)
    assert (rate.value, rate.high) == (1.0, 1.0)
    assert rate.low == pytest.approx(0.025 ** (1 / 10))
    lost = win_rate(-after, np.zeros(40), prompts)
    assert (lost.value, lost.low, lost.high) == (0.0, 0.0, pytest.approx(1 - rate.low))


def test_everything_tied_is_one_half():
    rate = win_rate(np.ones(8), np.ones(8), list("aabbccdd"))
    assert (rate.value, rate.ties) == (0.5, 8)
    expected = stats.binomtest(2, 4).proportion_ci(0.95, "exact")
    assert (rate.low, rate.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_order_does_not_matter_and_the_seed_does_little():
    rng = np.random.default_rng(1)
    after, before = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)
    prompts = [f"p{i % 15}" for i in range(60)]
    order = rng.permutation(60)
    rate = win_rate(after, before, prompts)
    assert win_rate(after[order], before[order], [prompts[i] for i in order]) == rate
    assert win_rate(after, before, prompts) == rate
    assert win_rate(after, before, prompts, seed=7).low == pytest.approx(rate.low, abs=0.02)


def test_swapping_the_sides_mirrors_the_rate():
    rng = np.random.default_rng(2)
    after, before, prompts = rng.integers(0, 4, 60), rng.integers(0, 4, 60), [f"p{i % 20}" for i in range(60)]
    rate, swapped = win_rate(after, before, prompts), win_rate(before, after, prompts)
    assert swapped.value == pytest.approx(1 - rate.value)
    assert swapped.low == pytest.approx(1 - rate.high, abs=0.02)


def correlated_wins(rng, num_prompts=40, num_seeds=4, concentration=1.0, mean=0.7) -> tuple[np.ndarray, list[str]]:
    """Every prompt has its own win probability, beta-distributed around the mean; ±1 for each seed."""
    p = rng.beta(concentration * mean, concentration * (1 - mean), num_prompts).repeat(num_seeds)
    return np.where(rng.random(len(p)) < p, 1.0, -1.0), [f"p{i // num_seeds}" for i in range(len(p))]


def test_clustered_interval_is_wider_when_seeds_agree():
    after, prompts = correlated_wins(np.random.default_rng(3))
    clustered = win_rate(after, 0 * after, prompts)
    naive = win_rate(after, 0 * after, [str(i) for i in range(len(after))])
    assert clustered.value == naive.value
    assert clustered.high - clustered.low > 1.3 * (naive.high - naive.low)


@pytest.mark.parametrize("confidence, least, most", [(0.95, 0.90, 0.99), (0.8, 0.72, 0.87)])
def test_coverage(confidence, least, most):
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        after, prompts = correlated_wins(rng)
        rate = win_rate(after, 0 * after, prompts, confidence=confidence, resamples=500)
        covered += rate.low <= 0.7 <= rate.high
    assert least <= covered / 200 <= most


def test_clear_errors():
    good = np.zeros(4)
    with pytest.raises(ValueError, match="differ in length"):
        win_rate(good, np.zeros(3), list("aabb"))
    with pytest.raises(ValueError, match="differ in length"):
        win_rate(good[:, None], good[:, None], list("aabb"))
    with pytest.raises(ValueError, match=r"3 scores are NaN or infinite \(1 of 4 before, 2 of 4 after\)"):
        win_rate(np.array([np.nan, np.inf, 0, 0]), np.array([0, 0, 0, np.nan]), list("aabb"))
    with pytest.raises(ValueError, match="2 or more different prompts, got 1"):
        win_rate(good, good, list("aaaa"))
    with pytest.raises(ValueError, match="2 or more different prompts, got 0"):
        win_rate(good[:0], good[:0], [])


def brightness(images, prompts):
    return np.array([np.asarray(image).mean() for image in images])


def test_a_judge_compares_pictures():
    before = [Image.new("RGB", (4, 4), (level,) * 3) for level in (10, 10, 10, 10)]
    after = [Image.new("RGB", (4, 4), (level,) * 3) for level in (20, 5, 10, 20)]
    rate = compare(brightness, before, after, list("aabb"))
    assert (rate.value, rate.ties) == (0.625, 1)
    assert scores(brightness, after, list("aabb")).dtype == np.float64


def test_a_judge_must_give_one_number_for_each_picture():
    images = [Image.new("RGB", (4, 4))] * 2

    def column(images, prompts):
        return np.zeros((len(images), 1))

    with pytest.raises(ValueError, match=r"judge column gave scores of shape \(2, 1\), not \(2,\)"):
        compare(column, images, images, ["a", "b"])
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        compare(brightness, images, images, ["a"])
