"""Several scorers instead of one label: data.scorers names columns that hold one number for each picture of a row.

A majority needs no common scale, which the scores of different models do not have (BalancedDPO, 2503.12575). A scorer
that finds two pictures equal gives half a vote to each.

Where users weigh the scorers instead (diffpref/users/sources/rewards.py), nobody votes: the rows carry the numbers.
"""

import math
from typing import Any

from diffpref.config import DataConfig

GIVEN = "given"  # column of what each scorer gave to each picture, [n][k], pictures as they stand in the row


def scores_of(row: dict[str, Any], config: DataConfig) -> list[list[float]] | None:
    """What each scorer gave to each of the k pictures, [n][k]; None, a fault of the row, where a scorer does not have
    one finite number for each."""
    table = [row[name] for name in config.scorers]
    return table if all(complete(values, row["pictures"]) for values in table) else None


def complete(values: Any, pictures: int | None) -> bool:
    """Whether there is one finite number for each picture."""
    counted = isinstance(values, list) and len(values) == pictures
    return counted and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


# w_ij: the share of the n scorers that put i above j, ties half; w_ij + w_ji = 1.
def shares(scores: list[list[float]]) -> list[list[float]]:
    """Scores [n][k] -> w [k][k], zero where i = j."""
    pictures = range(len(scores[0]))
    return [[0.0 if i == j else share(scores, i, j) for j in pictures] for i in pictures]


def share(scores: list[list[float]], i: int, j: int) -> float:
    """w_ij."""
    return sum(1.0 if given[i] > given[j] else 0.5 * (given[i] == given[j]) for given in scores) / len(scores)


# RankDPO (2410.18013): φ_i = C_i / (n (k - 1)), where C_i counts the comparisons that i wins, over scorers and others.
def fractions(wins: list[list[float]], voters: int) -> list[float]:
    """w [k][k] of n voters -> φ in [0, 1], [k]. Votes are counted in halves, which are whole: summed as shares, equal
    counts would differ in the last digit, and two pictures that tie would be a pair."""
    halves = [round(2 * voters * sum(line)) for line in wins]
    return [count / (2 * voters * max(len(wins) - 1, 1)) for count in halves]


def list_votes(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Lists: φ in [0, 1] as scores [k], and who beats whom as wins [k][k]; both None where a vote is broken."""
    scores = scores_of(row, config)
    if scores is None:
        return {"scores": None, "wins": None}
    wins = shares(scores)
    return {"scores": fractions(wins, len(scores)), "wins": wins}


def pair_votes(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Pairs: turned round where the majority says so; probability is the share of the scorers for the winner, margin
    what it is ahead by, 0 for an even split, which is a tie. All None where a vote is broken."""
    scores = scores_of(row, config)
    if scores is None:
        return {"turned": None, "probability": None, "margin": None}
    first = share(scores, 0, 1)
    return {"turned": first < 0.5, "probability": max(first, 1 - first), "margin": abs(2 * first - 1)}


def list_numbers(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Lists: what each scorer gave; as scores the votes, which are those of nobody in particular."""
    return {GIVEN: scores_of(row, config), "scores": list_votes(row, config)["scores"]}


def pair_numbers(row: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Pairs, as they stand: what each scorer gave. An even split is no tie: users disagree on it."""
    return {GIVEN: scores_of(row, config)}


VOTES = {"pairs": (pair_votes, ("probability", "margin")), "lists": (list_votes, ("scores", "wins"))}
NUMBERS = {"pairs": (pair_numbers, (GIVEN,)), "lists": (list_numbers, (GIVEN, "scores"))}
LABELS = ("probability", "margin", "wins")  # columns that say who is better; the numbers replace them
