"""Accuracies that count ties, of pairs whose margin is too small to call.

margin and label [P] as in pairs.py; label 0 is a tie of people. A threshold is a size of margin (or of difference of
probabilities) up to which the scorer calls a tie. It should come from other pairs than those that are measured: on the
same ones the accuracy is too good, and its policy says so.
"""

from dataclasses import dataclass

import numpy as np

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, share
from diffpref.scorer.measures.measured import Measured, counted
from diffpref.scorer.measures.pairs import checked, chosen

STEPS = np.linspace(0, 1, 11)  # the thresholds that PickScore's evaluation tries


@dataclass(frozen=True)
class Threshold:
    """Up to which difference the scorer calls a tie, and on which pairs that was chosen ("" for those measured)."""

    value: float
    chosen_on: str = ""

    def __str__(self) -> str:
        where = f"chosen on {self.chosen_on}" if self.chosen_on else "chosen in-sample, which flatters"
        return f"{self.value:.3g}, {where}"


def called(difference: np.ndarray, threshold: float) -> np.ndarray:
    """What the scorer says: +1, −1, and 0 where |difference| ≤ threshold."""
    return np.where(np.abs(difference) <= threshold, 0.0, np.sign(difference))


def half_points(said: np.ndarray, label: np.ndarray) -> np.ndarray:
    """PickScore's points: 1 for agreement, one half where just one of the two says tie, 0 for the other winner."""
    return 1 - 0.5 * np.abs(said - label)


def probability_gap(margin: np.ndarray) -> np.ndarray:
    """p − (1 − p) = tanh(margin / 2) for p = σ(margin): the difference that PickScore compares with its threshold."""
    return np.tanh(0.5 * margin)


def pickscore_threshold(margin: np.ndarray, label: np.ndarray, chosen_on: str = "") -> Threshold:
    """The best of 0, 0.1, …, 1 for PickScore's points; of equally good ones the smallest."""
    margin, label = judged(margin, label)
    points = [half_points(called(probability_gap(margin), t), label).mean() for t in STEPS]
    return Threshold(float(STEPS[int(np.argmax(points))]), chosen_on)


def tie_calibration(margin: np.ndarray, label: np.ndarray, chosen_on: str = "") -> Threshold:
    """The threshold ε with the most agreement in three ways (Deutsch, Foster & Freitag 2023, arXiv 2305.14324).

    Sorted by |margin|, a pair that falls under ε gains a point if people tied and loses one if it was right: one sweep
    over running sums, O(P log P). ε is the |margin| of a pair, or 0, where only exact ties are called; of equally good
    ones the smallest.
    """
    margin, label = judged(margin, label)
    order = np.argsort(np.abs(margin), kind="stable")
    size, m, y = np.abs(margin)[order], margin[order], label[order]
    gain = np.where(m == 0, 0, (y == 0).astype(int) - (np.sign(m) == y))  # a margin of 0 is a tie at any threshold
    gained = np.concatenate([[0], np.cumsum(gain)])
    last = np.concatenate([[True], size[1:] != size[:-1], [True]])  # pairs of one size fall together
    best = int(np.argmax(np.where(last, gained, gained.min() - 1)))
    return Threshold(float(size[best - 1]) if best else 0.0, chosen_on)


def judged(margin: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """The pairs of which people said something. Raises ValueError where there are none."""
    margin, label = checked(margin, label)
    known = np.isfinite(label)
    if not known.any():
        raise ValueError("no pair has a label: a threshold is chosen on pairs that people judged")
    return [margin[known], np.sign(label[known])]


def with_half_points(
    margin: np.ndarray, label: np.ndarray, threshold: Threshold, clusters: Clusters, resampling: Resampling = DEFAULT
) -> Measured:
    """PickScore's accuracy: ties of people stay in, half a point where just one of people and scorer says tie."""
    said = called(probability_gap(np.asarray(margin, dtype=np.float64)), threshold.value)
    rule = f"half a point where one of the two ties; scorer ties where |p − (1−p)| ≤ {threshold}"
    return tied(half_points, said, margin, label, threshold, rule, clusters, resampling)


def three_way(
    margin: np.ndarray, label: np.ndarray, threshold: Threshold, clusters: Clusters, resampling: Resampling = DEFAULT
) -> Measured:
    """Share of pairs with the same answer out of first, second, tie: (C + T) / P in the words of Deutsch et al."""
    said = called(np.asarray(margin, dtype=np.float64), threshold.value)
    rule = f"a tie is an answer like the others; scorer ties where |margin| ≤ {threshold}"
    return tied(lambda s, y: (s == y).astype(float), said, margin, label, threshold, rule, clusters, resampling)


def tied(points, said, margin, label, threshold, rule, clusters, resampling) -> Measured:
    """The mean of the points of all pairs that people judged."""
    margin, label, said = checked(margin, label, said)
    known = np.isfinite(label)
    names, y, s = chosen(known, clusters), np.sign(label[known]), said[known]
    if not len(y):
        raise ValueError("no pair has a label")
    policy = f"{counted(int((y == 0).sum()), 'tie')} of people kept; {rule}"
    more = {"threshold": threshold.value, "ties": int((y == 0).sum()), "called_ties": int((s == 0).sum())}
    how = described(names, len(y), resampling.confidence)
    return Measured(*share(points(s, y), names, resampling), len(y), policy, how, more)
