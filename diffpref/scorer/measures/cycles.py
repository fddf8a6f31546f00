"""A over B, B over C, C over A: does the scorer follow people there? Scores that are numbers on a line never can."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from diffpref.scorer.measures.bootstrap import DEFAULT, Clusters, Resampling, described, share
from diffpref.scorer.measures.measured import Measured

Edges = Mapping[tuple[int, int], float]  # (item, item) -> number; antisymmetric


def edges(pairs: np.ndarray, values: np.ndarray) -> dict[tuple[int, int], float]:
    """Comparisons [P,2] of items and a number for each [P] -> their mean for each two items, under both orders, with
    the sign turned for the second. NaN is left out."""
    sums: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (first, second), value in zip(np.asarray(pairs).tolist(), np.asarray(values).tolist(), strict=True):
        if value == value:
            sums[first, second].append(value)
            sums[second, first].append(-value)
    return {pair: sum(numbers) / len(numbers) for pair, numbers in sums.items()}


def cyclic_triples(said: Edges) -> list[tuple[int, int, int]]:
    """Every (a, b, c) with a over b, b over c, c over a, once, the smallest item first."""
    beats: dict[int, set[int]] = defaultdict(set)
    for (first, second), value in said.items():
        if value > 0:
            beats[first].add(second)
    return [
        (a, b, c)
        for a, losers in sorted(beats.items())
        for b in sorted(losers)
        if b > a
        for c in sorted(beats.get(b, ()))
        if c > a and a in beats.get(c, ())
    ]


def cyclic_accuracy(
    triples: Iterable[tuple[int, int, int]], margins: Edges, clusters: Clusters, resampling: Resampling = DEFAULT
) -> Measured:
    """Share of cyclic triples with all three comparisons right; an exact tie of the scorer is wrong.

    Args:
        margins: The scorer's, of every two items that occur.
        clusters: A name for each triple.

    Raises:
        ValueError: there is no triple.
    """
    triples = list(triples)
    if not triples:
        raise ValueError("there is no cyclic triple in these comparisons")
    right = np.array([all(margins[edge] > 0 for edge in ((a, b), (b, c), (c, a))) for a, b, c in triples], dtype=float)
    policy = (
        "triples whose majorities form a circle, all three comparisons right (a single score per picture gets none), "
        "pairs without a majority left out, exact ties of the scorer wrong"
    )
    how = described(clusters, len(right), resampling.confidence)
    return Measured(*share(right, clusters, resampling), len(right), policy, how)
